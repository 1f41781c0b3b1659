"""Tests of checkpoint.py: strict loading, saving all or nothing.

bash tests/run.sh tests/models/test_checkpoint.py
"""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from originals import edit_json, refused
from safetensors import safe_open
from safetensors.torch import save_file

from models import checkpoint, folders, tokenization

BLOCK = "model.transformer.blocks.1."


def load(folder):
    return checkpoint.load_model(str(folder), torch.float32)


def weights_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# --- loading ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden(shared):
    golden = np.load(shared / "llada_golden" / "ref_logits.npz")
    model = load(shared / "llada_golden")
    got = model.eval()(torch.from_numpy(golden["batch/ids"])).logits
    np.testing.assert_allclose(got.numpy(), golden["batch/fp32"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2, "include_qkv_bias": True, "weight_tying": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_files(make_llada, tmp_path, fields, dtype):
    _, tensors = make_llada(tmp_path, **fields)
    model = checkpoint.load_model(str(tmp_path), dtype)
    got = dict(model.named_parameters())
    assert set(got) == set(tensors) and model.training
    assert all(torch.equal(got[name], tensors[name].to(dtype)) and got[name].requires_grad for name in got)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == fields.get("weight_tying", False)


def test_tied_head_given_twice(make_llada, tmp_path):
    """A tied checkpoint may name its head as well."""
    make_llada(tmp_path, weight_tying=True)
    weights = weights_of(tmp_path)
    head = {"model.transformer.ff_out.weight": weights["model.transformer.wte.weight"].clone()}
    save_file(weights | head, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, head["model.transformer.ff_out.weight"])


def renamed(weights, old, new):
    weights[new] = weights.pop(old)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda w: renamed(w, BLOCK + "up_proj.weight", BLOCK + "upper.weight"), [BLOCK + "upper.weight", "not part"]),
        (lambda w: w.pop(BLOCK + "attn_norm.weight"), [BLOCK + "attn_norm.weight", "missing"]),
        (lambda w: w.pop("model.transformer.ff_out.weight"), ["model.transformer.ff_out.weight", "missing"]),
        (lambda w: w.update({BLOCK + "q_proj.bias": torch.zeros(24)}), [BLOCK + "q_proj.bias", "not part"]),
        (
            lambda w: w.update({BLOCK + "ff_out.weight": torch.zeros(40, 24)}),
            [BLOCK + "ff_out.weight", "[40, 24]", "[24, 40]"],
        ),
        (lambda w: w.update({"model.transformer.ln_f.weight": torch.zeros(1)}), ["ln_f.weight", "[1]", "[24]"]),
    ],
)
def test_wrong_tensor(make_llada, tmp_path, harm, words):
    """Renamed, missing, extra, misshapen (a shape that would broadcast, too): refused by name."""
    make_llada(tmp_path)
    weights = weights_of(tmp_path)
    harm(weights)
    save_file(weights, tmp_path / "model.safetensors")
    refused(lambda: load(tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_torn_file(make_llada, tmp_path, size):
    make_llada(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    refused(lambda: load(tmp_path), "model.safetensors", "download it again")


def test_no_model(make_llada, tmp_path):
    make_llada(folder := tmp_path / "model")
    refused(lambda: checkpoint.load_model(None, torch.float32), "--model_name_or_path")
    for name in (str(tmp_path / "nowhere"), "nowhere", "./a/b", "GSAI-ML/LLaDA/8B", str(folder / "config.json")):
        refused(lambda name=name: checkpoint.load_model(name, torch.float32), name, "no such model folder")
    refused(lambda: checkpoint.load_model("nobody/nothing", torch.float32), "nobody/nothing", "the Hub")  # offline here
    (folder / "model.safetensors").unlink()
    refused(lambda: load(folder), "holds no *.safetensors")
    (folder / "config.json").unlink()
    refused(lambda: load(folder), str(folder), "holds no config.json")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rope": False}, "rope is False"),
        ({"d_model": "wide"}, "config.json"),
        ({"model_type": "unheard_of", "auto_map": {}}, "unheard_of"),
        (None, "JSON"),
    ],
)
def test_wrong_config(make_llada, tmp_path, change, words):
    make_llada(tmp_path)
    if change:
        edit_json(tmp_path / "config.json", **change)
    else:
        os.truncate(tmp_path / "config.json", 30)
    refused(lambda: load(tmp_path), "config.json", words)


def test_another_architecture(tmp_path):
    """Known to transformers, but no mask predictor."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9})
    )
    refused(lambda: load(tmp_path), "model_type gpt2", "--trust_remote_code")


def test_no_remote_code(make_llada, tmp_path):
    """auto_map names files that would leave a trace if they ran."""
    make_llada(folder := tmp_path / "model")
    for name in ("configuration_llada", "modeling_llada"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    load(folder)
    assert not (tmp_path / "trace").exists()


def test_8b_config_and_index(shared, make_llada, tmp_path):
    """LLaDA-8B-Instruct's own config.json and index: 32 layers, every name, every shard; only the widths are small."""
    meta = shared / "llada_8b_instruct_meta"
    index = json.loads((meta / "model.safetensors.index.json").read_text())["weight_map"]
    small = {
        "d_model": 16,
        "n_heads": 2,
        "n_kv_heads": 2,
        "mlp_hidden_size": 24,
        "vocab_size": 40,
        "embedding_size": 40,
    }
    _, tensors = make_llada(tmp_path, index, **json.loads((meta / "config.json").read_text()) | small)
    assert (
        len(index) == len(tensors) == 291 and len(list(tmp_path.glob("*.safetensors"))) == len(set(index.values())) > 1
    )
    got = dict(load(tmp_path).named_parameters())
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    gone = sorted(set(index.values()))[1]
    (tmp_path / gone).unlink()
    refused(lambda: load(tmp_path), gone, "not there")


def test_stray_file_beside_an_index(make_llada, tmp_path):
    """Only the index's files are read; a name that leaves the folder is refused."""
    _, tensors = make_llada(tmp_path / "plain")
    files = {name: f"part-{len(name) % 2}.safetensors" for name in tensors}
    make_llada(folder := tmp_path / "model", files)
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    assert torch.equal(load(folder).get_input_embeddings().weight, tensors["model.transformer.wte.weight"])
    edit_json(folder / "model.safetensors.index.json", weight_map=files | {"x": "../plain/model.safetensors"})
    refused(lambda: load(folder), "../plain/model.safetensors")


def test_dropout_is_zero(monkeypatch, tmp_path):
    """Whatever a config says about dropout. BERT's has it; LLaDA's allows none."""
    transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=9,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.2,
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "fill", lambda model, folder: None)
    modules = checkpoint.load_model(str(tmp_path), torch.float32).modules()
    dropouts = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) > 2 and not any(dropouts)


# --- saving -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_llada, tiny_dir, tmp_path):
    """trained(**fields) -> save, config (config.json of the source), weights; save() writes them to runs/final."""

    def make(**fields):
        config, _ = make_llada(source := tmp_path / "source", **fields)
        model, own_tokenizer = load(source), tokenization.load_tokenizer(str(tiny_dir))
        with torch.no_grad():
            weights = {name: parameter.mul_(1.5).clone() for name, parameter in model.named_parameters()}
        (tmp_path / "runs").mkdir()

        def save(tokenizer=own_tokenizer, card="card é"):
            checkpoint.save_model(tmp_path / "runs" / "final", model, weights, source, tokenizer, card)

        return SimpleNamespace(save=save, config=config, weights=weights)

    return make


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2, "include_qkv_bias": True, "weight_tying": True}])
def test_save_and_load(trained, tmp_path, tiny_dir, fields):
    made = trained(**fields)
    config, weights = made.config, made.weights
    made.save()
    final = tmp_path / "runs" / "final"
    assert os.listdir(tmp_path / "runs") == ["final"]
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "README.md"} <= set(os.listdir(final))
    assert (final / "README.md").read_text(encoding="utf-8") == "card é"
    saved = json.loads((final / "config.json").read_text())
    moved = {key for key in config if saved.get(key) != config[key]}  # architectures and auto_map are the source's
    assert moved <= {"transformers_version"}
    written = weights_of(final)
    assert set(written) == set(weights) and all(torch.equal(written[name], weights[name]) for name in weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in load(final).named_parameters())
    assert tokenization.tokenizer_fingerprint(
        tokenization.load_tokenizer(str(final))
    ) == tokenization.tokenizer_fingerprint(tokenization.load_tokenizer(str(tiny_dir)))
    assert folders.model_fingerprint(str(final)) != folders.model_fingerprint(str(tmp_path / "source"))


def test_save_is_all_or_nothing(trained, tmp_path):
    """Killed half-way: no folder, or the old one whole; the next save clears what was left."""
    save = trained().save
    final = tmp_path / "runs" / "final"

    class Broken:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    for card in ("first", "second"):
        before = sorted(os.listdir(final)) if final.exists() else None
        with pytest.raises(KeyboardInterrupt):
            save(tokenizer=Broken())
        assert (sorted(os.listdir(final)) if final.exists() else None) == before
        if before:
            assert (final / "README.md").read_text() == "first" and load(final)
        save(card=card)
        assert (final / "README.md").read_text() == card and os.listdir(tmp_path / "runs") == ["final"]
