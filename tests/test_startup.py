"""Tests of what every command does before torch is imported: --help, mistakes, and runs that are done.

bash tests/run.sh tests/test_startup.py
"""

import json
import shlex
import subprocess
import sys

import pytest
from small import ROOT

from cli import exits
from files import quoted

COMMANDS = ["data_prep", "score", "train_dpo", "make_prefs", "generate", "evaluate", "report"]
COMMANDS += ["plan", "calibrate", "merge", "convert", "check"]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib")

# A command as __main__ in a fresh process; the last line says which heavy modules it has imported.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code or 0
print(code, *(name for name in {heavy} if name in sys.modules))
"""


def probe(command, *words, cwd=ROOT):
    """(output, exit code, heavy modules) of a command in a fresh process."""
    source = PROBE.format(heavy=HEAVY)
    argv = [sys.executable, "-c", source, str(ROOT / f"{command}.py"), *map(str, words)]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    code, *heavy = last.split()
    return "\n".join(said) + done.stderr, int(code), heavy


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    said, code, heavy = probe(command, "--help")
    assert "--help" in said and code == 0 and not heavy


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_answered_at_once(command):
    said, code, heavy = probe(command, "--no_such_flag")
    assert said.startswith("error: ") and said.count("\n") == 1 and code == 2 and not heavy


@pytest.mark.parametrize(
    "command, words, sentence",
    [
        ("data_prep", ["--in", "nowhere.jsonl"], "nowhere.jsonl"),
        ("data_prep", [], "--in"),
        ("train_dpo", ["--beta", "0"], "--beta is 0.0"),
        ("score", ["--config_file", "nowhere.yaml"], "nowhere.yaml"),
        ("plan", ["--ranks", "0"], "--ranks is 0"),
        ("generate", ["--task", "nothing"], "--task is 'nothing'"),
        ("make_prefs", ["--task", "arithmetic", "--k", "0"], "--k is 0"),
        ("evaluate", ["--tasks", "nothing"], "no task 'nothing'"),
        ("merge", ["nowhere", "configs"], "configs: exists already"),
    ],
)
def test_a_mistake_is_answered_at_once(command, words, sentence):
    said, code, heavy = probe(command, *words)
    assert said.startswith("error: ") and sentence in said and code == 2 and not heavy


def test_calibrate_with_reuse_has_nothing_to_do_without_auto():
    said, code, heavy = probe("calibrate", "--reuse", "--diffusion_steps", "3")
    assert (said, code, heavy) == ("", 0, [])


@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag"]])
def test_standard_output_on_a_full_disk(words):
    """One sentence and exit code 2, whether --help or an error finds no room."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "data_prep.py", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if words == ["--help"]:
        assert "standard output: cannot be written (No space left on device)" in done.stderr


def test_standard_error_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "data_prep.py", "--no_such_flag"], cwd=ROOT, stderr=full)
    assert done.returncode == 2


def test_a_long_error_keeps_the_place_that_is_full():
    before, after = "begin " * 200, " end" * 200
    error = RuntimeError(f"{before}/dev/shm/nccl-7: No space left on device{after}")
    said = quoted(error)
    assert "/dev/shm/nccl-7: No space left on device" in said and len(said) < 400


def test_a_configuration_from_a_pipe_is_read_once(tmp_path):
    """Arguments are read before the heavy imports and again after them; a pipe gives its text only once."""
    rows = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "prefs.jsonl").write_text(rows)
    words = "--in prefs.jsonl --out packed --model_name_or_path"
    python, script = shlex.quote(sys.executable), shlex.quote(str(ROOT / "data_prep.py"))
    command = f"{python} {script} --config_file <(echo 'max_length: 77') {words} {ROOT / 'examples' / 'tiny'}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True)
    assert json.loads((tmp_path / "packed" / "meta.json").read_text())["max_length"] == 77


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "| true"])
def test_streams_that_are_closed(closed):
    """A command whose output nobody reads ends without a traceback."""
    command = f"set -o pipefail; {shlex.quote(sys.executable)} data_prep.py --help {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.returncode == 0 or closed == "| true" and done.returncode == 1


def test_ctrl_c_in_a_class_body(capsys):
    class Field:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def main():
        type("Holder", (), {"field": Field()})

    with pytest.raises(SystemExit) as end:
        exits.flushed(main)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"
