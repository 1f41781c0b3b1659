"""Tests of config.py and cli/: YAML under the command line, misspelt names, every script's --help, exit codes.

bash tests/run.sh tests/test_config.py
"""

import importlib
import re
import shlex
import sys
from dataclasses import fields

import pytest
from small import ROOT, execute

import config
from cli import exits
from cli.other_names import OTHER_NAMES
from cli.parser import LISTED, names
from files import InputError


@pytest.fixture
def parse(tmp_path):
    """parse(yaml text or None, *words) -> every argument by name."""

    def call(text, *words):
        if text is not None:
            (tmp_path / "run.yaml").write_text(text)
            words = ("--config_file", str(tmp_path / "run.yaml"), *words)
        return {
            item.name: getattr(group, item.name)
            for group in config.parse(words, "x", *config.GROUPS)
            for item in fields(group)
        }

    return call


def test_defaults(parse):
    got = parse(None)
    assert len(got) == sum(len(fields(group)) for group in config.GROUPS)  # no name is used twice
    wanted = {
        "diffusion_steps": None,
        "trajectories": None,
        "noise_sets": 1,
        "beta": 0.1,
        "learning_rate": 5e-7,
        "seed": 42,
    }
    assert wanted.items() <= got.items()
    assert parse("") == parse("# nothing\n") == got


def test_guide_names(parse):
    """The usual names of a training config.yaml."""
    got = parse(
        """
        model_name_or_path: GSAI-ML/LLaDA-8B-Instruct
        preference_data_path: prefs.jsonl
        output_dir: runs/a
        learning_rate: 5e-6
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 16
        num_train_epochs: 3
        beta: 0.2
        diffusion_steps: 20
        use_mixed_precision: bf16
        gradient_checkpointing: true
        save_steps: 500
        logging_steps: 10
        seed: 7
        resume_from_checkpoint: null
        """.replace("        ", "")
    )
    assert got["learning_rate"] == 5e-6 and got["num_train_epochs"] == 3.0 and got["beta"] == 0.2
    assert got["gradient_checkpointing"] is True and got["resume_from_checkpoint"] is None
    assert (got["per_device_train_batch_size"], got["save_steps"], got["seed"]) == (2, 500, 7)
    assert (got["model_name_or_path"], got["preference_data_path"]) == ("GSAI-ML/LLaDA-8B-Instruct", ["prefs.jsonl"])


def test_command_line_wins(parse):
    text = "beta: 0.3\ndiffusion_steps: 8\ngradient_checkpointing: false\n"
    got = parse(text, "--beta", "0.5", "--gradient_checkpointing", "true")
    assert (got["beta"], got["diffusion_steps"], got["gradient_checkpointing"]) == (0.5, 8, True)
    assert parse(text)["beta"] == 0.3


@pytest.mark.parametrize("form", ["{}", "--config_file={}"])
def test_config_file_forms(tmp_path, form):
    (tmp_path / "a.yaml").write_text("beta: 0.3\n")
    words = ["--config_file", str(tmp_path / "a.yaml")] if form == "{}" else [form.format(tmp_path / "a.yaml")]
    assert config.parse([*words, "--seed=3"], "x", config.TrainArguments)[0].beta == 0.3


def test_values_as_yaml_reads_them(parse):
    """5e-6 is a string to YAML; a value may look like a flag; YAML 1.1 reads a bare `no` as false."""
    assert parse("learning_rate: 5e-6")["learning_rate"] == parse("learning_rate: '5e-6'")["learning_rate"] == 5e-6
    assert parse("max_steps: -1")["max_steps"] == -1 and parse("output_dir: --x")["output_dir"] == "--x"
    assert parse("use_mixed_precision: no")["use_mixed_precision"] == "no"
    assert parse('use_mixed_precision: "no"')["use_mixed_precision"] == "no"


@pytest.mark.parametrize(
    "word, value",
    [("true", True), ("false", False), ("True", True), ("yes", True), ("no", False), ("0", False), ("1", True)],
)
def test_bools(parse, word, value):
    for name in ("gradient_checkpointing", "trust_remote_code"):  # one that is on, one that is off
        assert parse(None, f"--{name}", word)[name] is parse(None, f"--{name}={word}")[name] is value
        assert parse(f"{name}: {word}")[name] is value


def test_bare_bools(parse):
    assert parse(None, "--trust_remote_code")["trust_remote_code"] is True
    assert parse(None, "--no_gradient_checkpointing")["gradient_checkpointing"] is False


def test_groups():
    """Only the groups asked for, in config's order; the others' flags are accepted all the same."""
    data, noise = config.parse(
        ["--in", "x.jsonl", "--out", "y", "--beta", "9"], "x", config.DataArguments, config.NoiseArguments
    )
    assert (data.preference_data_path, data.data) == (["x.jsonl"], "y") and noise.noise_sets == 1


def test_help_shows_the_groups_used(capsys):
    with pytest.raises(SystemExit) as done:
        config.parse(["--help"], "what it does", config.DataArguments)
    text = capsys.readouterr().out
    assert done.value.code == 0 and "what it does" in text and "--max_length" in text and "--config_file" in text
    assert not any(word in text for word in ("--beta", "--gradient_checkpointing", "--no_", "--local_rank"))


class Parsed(Exception):
    """Raised where a script has understood its command line and would begin its work."""


@pytest.fixture
def asked(monkeypatch):
    """asked(script, *words) -> (the dataclasses that it parses into, the names that its --help leaves out)."""
    real = config.parse

    def call(script, *words):
        seen = []

        def parse(argv, doc, *used, hide=(), below=()):
            seen.append((used, hide))
            real(argv, doc, *used, hide=hide)
            raise Parsed

        monkeypatch.setattr(config, "parse", parse)
        command, *subcommand = script.split()
        module = importlib.import_module(command)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *subcommand, *words])
        try:
            module.main() if subcommand else module.main(list(words))
        except (Parsed, SystemExit) as end:
            assert isinstance(end, Parsed) or end.code == 0
        return seen[0] if seen else None

    return call


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "script", ["data_prep", "score", "train_dpo", "plan", "generate", "make_prefs", "evaluate", "evaluate lm_eval"]
)
def test_help_of_each_script(script, columns, asked, monkeypatch, capsys):
    """Each argument once and under a heading, each default said, nothing wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    used, hide = asked(script, "--help")
    text = capsys.readouterr().out
    first, options, *sections, examples = re.split(r"\n\n(?=\S)", text)
    shown = [re.findall(r"^  --(\w+)(.*?)(?=^  --|\Z)", section, re.M | re.S) for section in sections]
    assert len(sections) > 1 and all(shown)
    said = [(name, " ".join(words.split())) for each in shown for name, words in each]
    samples = {config.AdapterArguments} if config.SampleArguments in used else set()
    assert sorted(name for name, _ in said) == sorted(names(*used, *samples) - {*hide, "local_rank"})
    assert options.startswith("options:") and set(re.findall(r"^  (-\S+)", options, re.M)) <= {"-h,", "--config_file"}
    assert not any(word in text for word in ("None", "--no_", "True"))
    assert max(map(len, text.splitlines())) <= columns
    defaults = {item.name: item.default for group in (*used, *samples) for item in fields(group)}
    for name, words in said:
        value = str(defaults[name]).lower() if isinstance(defaults[name], bool) else defaults[name]
        assert words.endswith(f" (default: {value})") if value is not None else "(default" not in words


@pytest.mark.parametrize(
    "script",
    [
        "data_prep",
        "score",
        "train_dpo",
        "plan",
        "generate",
        "make_prefs",
        "evaluate",
        "evaluate lm_eval",
        "merge",
        "convert",
    ],
)
def test_examples_of_each_help(script, asked, monkeypatch, capsys, tmp_path):
    """The command lines below a script's arguments are understood, and one is its own."""
    import convert
    import merge
    from reasoning import harness

    def parsed(*_):
        raise Parsed

    asked(script, "--help")
    lines = re.findall(r"^  python (.*)", capsys.readouterr().out.replace(" \\\n      ", " "), re.M)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for module, name in ((merge, "merge"), (convert, "from_smdm"), (convert, "to_smdm"), (convert.pickled, "convert")):
        monkeypatch.setattr(module, name, parsed)
    monkeypatch.setattr(harness, "check_installed", lambda: None)
    command, *subcommand = script.split()
    assert any(line.split()[: 1 + len(subcommand)] == [f"{command}.py", *subcommand] for line in lines)
    for file, *words in map(shlex.split, lines):
        if words[0] == "lm_eval":
            given = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
            with pytest.raises(Parsed):
                harness.MaskedDiffusion.create_from_arg_obj(given)
        else:
            asked(file.removesuffix(".py"), *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", ["learning_rat", "did you mean", "learning_rate"]),
        ("zzz: 1", ["unknown", "zzz"]),
        ("3: 1", ["unknown", "3"]),
        ("- a", ["name: value"]),
        ("just words", ["name: value"]),
        ("a: b: c", ["YAML"]),
        ("a: '", ["YAML"]),
    ],
)
def test_wrong_yaml(parse, text, words):
    with pytest.raises(InputError) as error:
        parse(text)
    assert all(word in str(error.value) for word in ["run.yaml", *words]) and "\n" not in str(error.value)
    assert ("did you mean" in str(error.value)) == ("did you mean" in words)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--learning_rat", "1"], "--learning_rat; did you mean --learning_rate?"),
        (["--zzz"], "--zzz"),
        (["--diffusion", "4"], "--diffusion; did you mean --diffusion_steps?"),
        (["--eval_f", "0.1"], "--eval_f; did you mean --eval_fraction?"),
        (["stray"], "stray"),
    ],
)
def test_unknown_flag(words, said):
    """An abbreviation is unknown, too."""
    with pytest.raises(InputError) as error:
        config.parse(words, "x", config.NoiseArguments)
    assert f"unknown argument {said}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("groups", [config.GROUPS, (config.SampleArguments, config.LikelihoodArguments)])
def test_a_hidden_flag_is_never_suggested(groups):
    """Of names of other software: what to write here, or where that is said, if this command has no such flag."""
    accepted = names(*groups) | {"base_model"} | ({"in"} if config.DataArguments in groups else set())
    for name, instead in OTHER_NAMES.items():
        if name not in accepted:
            for word in (f"--{name}", f"--{name.replace('_', '-')}=1"):
                with pytest.raises(InputError) as error:
                    config.parse([word], "x", *groups)
                known = all(flag[2:] in accepted for flag in re.findall(r"--\w+", instead))
                assert str(error.value) == f"unknown argument {word}; {instead if known else LISTED}"
    with pytest.raises(InputError) as error:
        config.parse(["--local_ran", "0"], "x", *groups)
    assert "local_rank" not in str(error.value)


def test_names_of_other_software(tmp_path):
    for words, said in (
        ("--lora_rank", "write --lora_r"),
        ("--warmup-steps", "write --warmup_ratio, a share of the steps"),
        ("--rpo_alpha", "write --sft_weight"),
        ("--num_epochs", "write --num_train_epochs"),
    ):
        with pytest.raises(InputError, match=f"unknown argument {words}; {said}$"):
            config.parse([words, "1"], "x", *config.GROUPS)
    (tmp_path / "run.yaml").write_text("lora_rank: 8\n")
    with pytest.raises(InputError, match="run.yaml: unknown argument lora_rank; write lora_r$"):
        config.parse(["--config_file", str(tmp_path / "run.yaml")], "x", *config.GROUPS)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--beta 0.1 --beta 0.2", "--beta is given twice; leave one out"),
        ("--beta=0.1 --beta=0.1", "--beta is given twice;"),
        ("--in a --preference-data-path b", "is given twice (--in and --preference-data-path); leave one out"),
        ("--gradient_checkpointing true --no_gradient_checkpointing", "(--gradient_checkpointing and --no_gradient"),
        ("--data x --max_steps 3 --out y", "--data is given twice (--data and --out)"),
        ("--trust_remote_code --trust_remote_code", "--trust_remote_code is given twice"),
    ],
)
def test_a_flag_given_twice(words, said, tmp_path):
    with pytest.raises(InputError) as error:
        config.parse(words.split(), "x", *config.GROUPS)
    assert said in str(error.value)
    (tmp_path / "run.yaml").write_text("beta: 0.3\n")  # the command line wins over a file
    once = ["--config_file", str(tmp_path / "run.yaml"), "--beta", "0.2"]
    assert config.parse(once, "x", config.TrainArguments)[0].beta == 0.2


def test_no_yaml():
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        config.parse(["--config_file", "nowhere.yaml"], "x", config.TrainArguments)


@pytest.mark.parametrize(
    "text, words, said",
    [
        (None, ["--beta", "big"], "--beta"),
        ("beta: big", [], "--beta"),
        (None, ["--seed", "1.5"], "--seed"),
        (None, ["--trust_remote_code", "maybe"], "--trust_remote_code"),
        (None, ["--loss_type", "ipoo"], "ipoo"),
        ("max_steps: [1]", [], "max_steps holds"),
        (None, ["--config_file"], "--config_file"),
    ],
)
def test_wrong_values(parse, text, words, said):
    """A wrong type or choice is refused in one sentence that names the argument."""
    with pytest.raises(InputError) as error:
        parse(text, *words)
    assert said in str(error.value) and "\n" not in str(error.value)


# --- run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rank, local, said",
    [
        (None, False, "error: beta is 0, expected more\n"),
        ("0", False, "error: beta is 0, expected more\n"),
        ("1", False, ""),
        ("0", True, "error: beta is 0, expected more\n"),
        ("3", True, "error (rank 3): beta is 0, expected more\n"),
    ],
)
def test_user_error(monkeypatch, capsys, rank, local, said):
    """One sentence, exit code 2, once: from rank 0, or from the one rank that has met it."""
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)

    def main():
        raise InputError("beta is 0, expected more", local=local)

    with pytest.raises(SystemExit) as done:
        exits.run(main)
    assert done.value.code == 2 and capsys.readouterr() == ("", said)


@pytest.mark.parametrize("result, code", [(0, 0), (None, None), (3, 3)])
def test_exit_code(result, code):
    with pytest.raises(SystemExit) as done:
        exits.run(lambda: result)
    assert done.value.code == code


def test_our_own_errors_are_not_hidden():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        exits.run(main)


def test_subprocess(tmp_path):
    """As a script meets it: one line on stderr, nothing on stdout."""
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    code = "import config; from cli import exits; exits.run(lambda: config.parse(None, 'x', *config.GROUPS) and 0)"
    done = execute(["-c", code, "--config_file", tmp_path / "a.yaml"])
    assert done.returncode == 2 and done.stdout == ""
    line, end = done.stderr.split("\n")
    assert line.startswith(f"error: {tmp_path}/a.yaml: ") and "learning_rate" in line and end == ""
