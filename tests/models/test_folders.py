"""Tests of folders.py: a model's folder and files, what its config.json says, its fingerprint.

bash tests/run.sh tests/models/test_folders.py
"""

import errno
import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from originals import edit_json
from safetensors.torch import load_file, save_file
from small import ROOT, refusal

from models import architecture, families, folders

DOWNLOAD = "org/name is not a local folder and could not be downloaded from the Hub"


def write_json(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


# --- configuration ----------------------------------------------------------------------------------------


def test_finding_a_model_imports_no_torch():
    """A command that finds nothing to do answers before torch is imported: folders.py and families.py are light."""
    code = (
        "import sys; from models import families, folders; print(families.shifted(folders.plain_config(sys.argv[1]))); "
        "assert not sys.modules.keys() & {'torch', 'transformers', 'safetensors', 'huggingface_hub'}"
    )
    done = subprocess.run([sys.executable, "-c", code, "examples/tiny"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("model_type", ["Dream", "llada", "qwen2", "bert"])
def test_plain_config(tmp_path, model_type):
    """config.json's fields, and the notes of an adapter's training, are those that load_config() finds."""
    sizes = {"d_model": 8, "n_heads": 2} if model_type == "llada" else {}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_json(base / "config.json", model_type=model_type, mask_token_id=3, **sizes)
    write_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    write_json(adapter / "base.json", mask_token_id=5, shift_logits=True, load_in_4bit=False)
    for folder, mask_id in ((base, 3), (adapter, 5)):
        plain, full = folders.plain_config(str(folder)), architecture.load_config(str(folder))
        assert plain.model_type == full.model_type == model_type
        assert plain.mask_token_id == full.mask_token_id == mask_id
        assert getattr(plain, "shift_logits", None) == getattr(full, "shift_logits", None)
    assert families.shifted(folders.plain_config(str(adapter))) is (model_type in families.CAUSAL)


# --- download ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), "/cache/blob: cannot be written"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), "{home}: cannot be written"),
        (OSError("Not enough disk space. Needed: 15 GiB"), "{home}: cannot be written (Not enough disk space."),
        (ConnectionError("no route\n to host"), DOWNLOAD + " (ConnectionError: no route to host)"),
    ],
)
def test_a_failed_download(monkeypatch, capsys, error, words):
    """A full disk is named as such, and the place that is full; everything else by what the Hub's client says."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    said = refusal(lambda _: folders.model_folder("org/name"), capsys)
    assert said.startswith("error: " + words.format(home=huggingface_hub.constants.HF_HOME)), said


# --- fingerprint --------------------------------------------------------------------------------------------


def test_model_fingerprint(make_llada, tmp_path):
    make_llada(tmp_path)
    path, first = tmp_path / "model.safetensors", folders.model_fingerprint(str(tmp_path))
    assert first == folders.model_fingerprint(str(shutil.copytree(tmp_path, tmp_path / "copy")))
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1):  # one bit of a weight
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert folders.model_fingerprint(str(tmp_path)) != first
    path.write_bytes(whole + b"\0")
    assert folders.model_fingerprint(str(tmp_path)) != first
    path.write_bytes(whole)
    for change, same in (
        ({"transformers_version": "9", "torch_dtype": "bfloat16", "_name_or_path": "x"}, True),
        ({"rope_theta": 101.0}, False),
    ):
        edit_json(tmp_path / "config.json", **change)
        assert (folders.model_fingerprint(str(tmp_path)) == first) == same


def test_model_fingerprint_of_a_larger_file(make_llada, tmp_path):
    """Beyond the sampled 4 MiB: a change of every weight shows, as any training makes it; so does the last byte."""
    make_llada(tmp_path, d_model=480, mlp_hidden_size=960)
    path, first = tmp_path / "model.safetensors", folders.model_fingerprint(str(tmp_path))
    assert path.stat().st_size > 3 * 64 * 65536 / 2
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert folders.model_fingerprint(str(tmp_path)) != first
    save_file({name: tensor * 1.0001 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert folders.model_fingerprint(str(tmp_path)) != first
