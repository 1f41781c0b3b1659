"""Tests of a full file system, a real one of a few MiB: at any write one sentence; with room, the same command resumes.

bash tests/run.sh tests/faults/test_full_disk.py
"""

import errno
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import LENGTHS, ROOT, call, execute, flags, make_model, make_pairs, numbers, pack, run

sys.path.insert(0, str(ROOT / "bench"))

import convert
import data_prep
import evaluate
import files
import generate
import make_prefs
import merge
import score
from cli import exits
from models import checkpoint, lora, smdm, tokenization
from reasoning import sampler
from training import resume
from training.runs import Run

NOISE = flags(use_mixed_precision="no", diffusion_steps=3, trajectories=2, tokens_per_forward=200)
SMALL_SMDM = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "vocab_size": 512, "head_size": 511}


@pytest.fixture
def disk(tmp_path):
    """A tmpfs of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a file system; test_kills tries a limit on the size of files")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def leave(disk, room):
    """Fill the disk except for `room` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with open(filler, "wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - room))


def until_there_is_room(disk, rooms, attempt):
    """[what attempt() said] for each of `rooms` that was too small; the next one is enough."""
    said = []
    for room in rooms:
        leave(disk, room)
        words = attempt()
        if words is None:
            break
        assert "cannot be written" in words and "Free some disk space, then run: " in words, words
        assert not [path for path in disk.rglob("*") if path.name.endswith(".tmp")]
        said.append(words)
    else:
        raise AssertionError(f"{room} bytes are too few: {said[-1]}")
    return said


def in_process(main, capsys, *argv):
    """attempt() of a command's main: None if it ended well, else its sentence."""

    def attempt():
        capsys.readouterr()
        code = None
        try:
            exits.run(lambda: call(main, *argv))
        except SystemExit as end:  # not kept: its frames hold the lock
            code = end.code
        gc.collect()
        said = capsys.readouterr().err
        assert code in (0, None, 2) and "Traceback" not in said, said
        return said if code else None

    return attempt


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    model = make_model(folder / "model", tiny_dir)
    return SimpleNamespace(folder=folder, model=model, pairs=make_pairs(LENGTHS[:12] * 20, 3))


@pytest.fixture(scope="module")
def trained(home):
    """The command of a run, up to its --output_dir, and what it makes if there is room."""
    data = pack(home.folder / "packed", home.pairs[:12], home.model)
    call(score.main, "--data", data, *NOISE)
    given = flags(learning_rate=3e-3, gradient_accumulation_steps=2, max_steps=4, eval_fraction=0.3, save_total_limit=1)
    given += ["--deepspeed", ROOT / "ds_configs" / "zero3_offload_4080.json"]
    command = [ROOT / "train_dpo.py", *NOISE, "--data", data, *given, "--output_dir"]
    run([*command, home.folder / "whole"])
    return SimpleNamespace(command=command, whole=made(home.folder / "whole"))


def made(folder):
    return numbers(folder), files.file_sha256(folder / "final" / "model.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_data_prep(disk, tiny_dir, tmp_path, capsys):
    argv = "--in", tiny_dir.parent / "prefs.jsonl", "--model_name_or_path", tiny_dir, "--out"
    call(data_prep.main, *argv, tmp_path / "whole")
    attempt = in_process(data_prep.main, capsys, *argv, disk / "packed")
    said = until_there_is_room(disk, range(0, 1 << 20, 16 << 10), attempt)
    assert any("tokens.npy" in words for words in said)
    assert contents(disk / "packed") == contents(tmp_path / "whole")


def test_score(disk, home, tmp_path, capsys):
    for folder in (tmp_path / "whole", disk / "packed"):
        pack(folder, home.pairs, home.model)
    call(score.main, "--data", tmp_path / "whole", *NOISE)
    attempt = in_process(score.main, capsys, "--data", disk / "packed", *NOISE)
    said = until_there_is_room(disk, range(0, 1 << 20, 16 << 10), attempt)
    assert any("/chunks-0/" in words for words in said), said
    [made], [want] = disk.glob("packed/ref-*"), tmp_path.glob("whole/ref-*")
    assert contents(made) == contents(want) != {}


@pytest.mark.parametrize(
    "save_steps, rooms, places",
    [
        (2, [300 << 10, 1 << 20, 2 << 20], ["checkpoints/.step-2.tmp", "checkpoints/.step-4.tmp"]),
        (0, [8 << 10, 12 << 10, 200 << 10, 2 << 20], ["run/events.out.tfevents", "run/log.jsonl", "run/final"]),
    ],
)
def test_training(disk, trained, save_steps, rooms, places):
    """TensorBoard's events, the log, a checkpoint, final/: whatever finds the disk full, finished work is safe."""

    def attempt():
        done = execute([*trained.command, disk / "run", "--save_steps", save_steps])
        assert done.returncode in (0, 2) and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done.stderr if done.returncode else None

    said = until_there_is_room(disk, rooms, attempt)
    for place in places:
        assert any(place in words for words in said), said
    assert made(disk / "run") == trained.whole
    if save_steps:
        convert_without_room(disk)


def convert_without_room(disk):
    """DeepSpeed's own script, which makes a checkpoint one of another number of ranks, finds the disk full."""
    [(_, path)] = Run(disk / "run").saved()
    leave(disk, 64 << 10)
    with pytest.raises(files.InputError, match="the disk is full: .* Free some disk space") as error:
        resume.convert(path, disk / "copy", 1, 2)
    assert f"{disk / 'copy'}: cannot be written" in str(error.value) and f"{path} is complete" in str(error.value)


def test_what_is_said_of_other_errors(tmp_path, capsys):
    """A user's text may hold the words of a full disk; an error of another kind is not taken for one."""

    def fails(error):
        with files.replacing(tmp_path / "file") as file:
            file.write("half")
            raise error

    said, full = "prefs.jsonl:3: found 'No space left, 3 requested'", f"{tmp_path / 'file'}: cannot be written ("
    for error, expected in (
        (files.InputError(said), said),
        (OSError(errno.ENOSPC, "No space left on device"), full),
        (OSError("3 requested and 2 written"), full),
    ):
        with pytest.raises(SystemExit) as end:
            exits.run(functools.partial(fails, error))
        assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {expected}")
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), ValueError("a number"), OSError("no number")):
        with pytest.raises(type(error), match=error.args[-1]):
            exits.run(functools.partial(fails, error))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def outputs(home, tiny_dir):
    """{kind of output: (main, arguments, where it is made with room)} of merge.py and convert.py."""
    folder = home.folder / "outputs"
    weights = load_file(home.model / "model.safetensors")
    pickles = shutil.copytree(home.model, folder / "pickles", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights, pickles / "pytorch_model.bin")
    smdm_config = smdm.SMDMConfig(**SMALL_SMDM)
    model = smdm.SMDMModelLM(smdm_config)
    smdm_file = folder / "mdm.safetensors"
    save_file(smdm.to_original(model.state_dict(), smdm_config.n_heads), smdm_file)
    policy, _ = lora.add(checkpoint.load_model(str(home.model), torch.float32), 4, 8, "auto", 0, home.model)
    adapter = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    tokenizer = tokenization.load_tokenizer(str(home.model))
    lora.save(folder / "adapter", policy, adapter, tokenizer, "", {"is_folder": True})
    made = {
        "merged": (merge.main, [folder / "adapter"]),
        "pickled": (convert.main, [pickles, "--allow_pickle"]),
        "smdm": (convert.main, [smdm_file, "--tokenizer", tiny_dir, "--n_heads", "4"]),
        "mdm.safetensors": (convert.main, [folder / "whole" / "smdm"]),
    }
    (folder / "whole").mkdir()
    for name, (main, argv) in made.items():
        call(main, argv[0], folder / "whole" / name, *argv[1:])
    return {name: (main, argv, folder / "whole" / name) for name, (main, argv) in made.items()}


@pytest.mark.parametrize("name", ["merged", "pickled", "smdm", "mdm.safetensors"])
def test_a_model_is_written_whole_or_not_at_all(disk, outputs, name, capsys):
    """merge.py and convert.py: a disk that is full is refused before the work, one that fills leaves nothing behind."""
    main, argv, whole = outputs[name]
    attempt = in_process(main, capsys, argv[0], disk / name, *argv[1:])

    def attempt_that_leaves_nothing():
        words = attempt()
        assert words is None or [path.name for path in disk.iterdir()] == ["filler"]
        return words

    said = until_there_is_room(disk, range(0, 1 << 20, 64 << 10), attempt_that_leaves_nothing)
    assert len(said) > 1 and all(name in words for words in said)
    for path in [whole] if whole.is_file() else whole.iterdir():
        copy = disk / name if whole.is_file() else disk / name / path.name
        assert copy.read_bytes() == path.read_bytes()


def test_a_full_disk_is_found_before_the_work(disk, outputs, monkeypatch, capsys):
    leave(disk, 0)
    for module, work in ((merge, "merge"), (convert.pickled, "convert"), (convert, "from_smdm"), (convert, "to_smdm")):
        monkeypatch.setattr(module, work, None)  # not callable: no work may begin
    for name, (main, argv, _) in outputs.items():
        words = in_process(main, capsys, argv[0], disk / name, *argv[1:])()
        assert f"{disk / name}: cannot be written (No space left on device)" in words


TINY = ROOT / "examples" / "tiny"
SAMPLING = flags(model=TINY, use_mixed_precision="no", device="cpu", gen_length=40, block_length=8, temperature=1)


@pytest.fixture
def sampling(tmp_path):
    """{file that comes out: (main, arguments without its place, flag of the place)} of the commands that sample."""
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + 5 = {'?' * 90}"}) + "\n" for i in range(40)))
    return {
        "prefs.jsonl": (make_prefs.main, flags(task="arithmetic", num=12, k=4, out="")[:-1]),
        "results.json": (evaluate.main, flags(tasks="arithmetic", limit=48, output_dir="")[:-1]),
        "out.jsonl": (generate.main, ["--in", rows, "--out"]),
    }


def place_of(folder, name):
    """What the commands of sampling() are given to write to."""
    return folder / "evaluated" if name == "results.json" else folder / name


def result_of(folder, name):
    """What came out, without the paths in it."""
    path = place_of(folder, name)
    return (path / name if path.is_dir() else path).read_text().replace(str(folder), "FOLDER")


@pytest.mark.parametrize("name", ["prefs.jsonl", "results.json", "out.jsonl"])
def test_samples_stay(disk, sampling, name, tmp_path, capsys):
    """A disk that fills while responses are written: those stay, and the same command makes the rest."""
    main, argv = sampling[name]
    (tmp_path / "whole").mkdir()
    call(main, *SAMPLING, *argv, place_of(tmp_path / "whole", name))
    kept = []  # lines after each attempt

    def attempt():
        words = in_process(main, capsys, *SAMPLING, *argv, place_of(disk, name))()
        paths = [*disk.glob("*.samples.jsonl"), *disk.glob("*/samples/*.jsonl")]
        kept.append(sum(path.read_bytes().count(b"\n") for path in paths))
        return words

    tight = 4 << 10 if name == "out.jsonl" else 8 << 10  # the lock of the samples takes a block
    said = until_there_is_room(disk, [0, tight, 1 << 20], attempt)
    assert len(said) == 2 and all(str(disk) in words for words in said)
    assert name == "out.jsonl" or 1 < kept[1] < kept[2]
    assert result_of(disk, name) == result_of(tmp_path / "whole", name)


@pytest.mark.parametrize("name", ["prefs.jsonl", "results.json", "out.jsonl"])
def test_a_place_that_cannot_be_written_to_is_found_before_sampling(disk, sampling, name, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "load", None)  # not callable: no model may be loaded
    main, argv = sampling[name]
    leave(disk, 0)
    words = in_process(main, capsys, *SAMPLING, *argv, place_of(disk, name))()
    assert "cannot be written (No space left on device)" in words
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    words = in_process(main, capsys, *SAMPLING, *argv, place_of(disk, name))()
    assert str(place_of(disk, name)) in words and "Read-only file system" in words
