"""Tests of checkpoint.py: strict loading, fingerprints, LLaDA's chat template, saving all or nothing.

.venv/bin/python -m pytest -q tests/test_checkpoint.py
"""

import json
import os
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from files import InputError
from models import architecture, checkpoint, folders, tokenization

BLOCK = "model.transformer.blocks.1."
# LLaDA's own: bos once, contents trimmed, and the assistant's header always at the end, asked for or not
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def load(folder):
    return checkpoint.load_model(str(folder), torch.float32)


def weights_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def edit_json(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


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


# --- fingerprints -----------------------------------------------------------------------------------------


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


def test_tokenizer_fingerprint(tiny_dir, chat):
    def of(change=lambda tokenizer: None, folder=tiny_dir):
        tokenizer = tokenization.load_tokenizer(str(folder))
        change(tokenizer)
        return tokenization.tokenizer_fingerprint(tokenizer)

    prints = [
        of(),
        of(lambda t: t.add_tokens(["<new>"])),
        of(lambda t: t.add_tokens(["7 + 5"], special_tokens=True)),
        of(lambda t: setattr(t, "chat_template", TEMPLATE)),
        of(lambda t: setattr(t, "chat_template", TEMPLATE + " ")),
        of(folder=chat),
    ]
    assert len(set(prints)) == len(prints) and prints[0] == of() and prints[-1] == of(folder=chat)


def test_mask_token_id(tiny_dir):
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    config = architecture.load_config(str(tiny_dir))
    assert tokenization.mask_token_id(config, tokenizer) == 3
    config.mask_token_id = 0
    assert tokenization.mask_token_id(config, tokenizer) == 0  # config.json wins; 0 is an id
    config.mask_token_id = None
    assert tokenization.mask_token_id(config, tokenizer) == 3
    tokenizer.mask_token = None
    refused(lambda: tokenization.mask_token_id(config, tokenizer), "mask_token_id")


# --- text -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tiny_dir, tmp_path_factory):
    """The tiny tokenizer with LLaDA's template and special tokens."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, folder)
    edit_json(
        folder / "tokenizer_config.json",
        chat_template=TEMPLATE,
        bos_token="<|startoftext|>",
        add_bos_token=True,
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    )
    return folder


def test_prompt_text(chat):
    tokenizer = tokenization.load_tokenizer(str(chat))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    want = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n7 + 5?<|eot_id|>" + header
    for template in ("auto", "chat"):
        assert tokenization.prompt_text(tokenizer, " 7 + 5?\n", template) == want
    assert tokenization.prompt_text(tokenizer, " 7 + 5?\n", "none") == " 7 + 5?\n"
    talk = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenization.prompt_text(tokenizer, talk, "auto")
    assert text.count("assistant") == 2 and text.endswith("\n\nu<|eot_id|>" + header)

    ids = tokenization.encode(tokenizer, want)
    special = {
        name: tokenizer.convert_tokens_to_ids(name)
        for name in ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    }
    assert len(set(special.values())) == 4
    got = [{id: name for name, id in special.items()}.get(id) for id in ids]
    assert [name for name in got if name] == [
        "<|startoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    assert got[0] == "<|startoftext|>" and tokenizer.decode(ids) == want  # one bos, at the start


def test_prompt_text_without_template(tiny_dir, chat):
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    assert tokenization.prompt_text(tokenizer, "7 + 5", "auto") == "7 + 5"
    refused(lambda: tokenization.prompt_text(tokenizer, "7 + 5", "chat"), "--template chat", "--template none")
    refused(lambda: tokenization.prompt_text(tokenizer, [{"role": "user", "content": "x"}], "auto"), "chat template")
    strict = tokenization.load_tokenizer(str(chat))
    strict.chat_template = "{{ raise_exception('users speak first') }}"
    refused(lambda: tokenization.prompt_text(strict, "x", "auto"), "users speak first")


def test_end_token_id(tiny_dir, chat):
    """The template's token after an answer, where it is a special one; else eos."""
    tokenizer, plain = (tokenization.load_tokenizer(str(folder)) for folder in (chat, tiny_dir))
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert [tokenization.end_token_id(tokenizer, template) for template in ("auto", "chat", "none")] == [eot, eot, 2]
    assert tokenization.end_token_id(plain, "auto") == 2 != eot
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert tokenization.end_token_id(tokenizer, "auto") == 2


def test_tokenizer_without_eos(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused(lambda: tokenization.load_tokenizer(str(folder)), "eos_token")


@pytest.mark.parametrize("legacy", [True, False])
def test_response_tokenizer(shared, make_llada, tmp_path, legacy):
    """A response follows other text: the ids that sentencepiece gives when its dummy prefix is switched off.

    No two spaces in a row here: transformers 5.23 builds such pieces first, whatever score tokenizer.model gives them.
    """
    make_llada(tmp_path)
    model = shared / "tokenizers" / "llama_32k_tokenizer.model"
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": legacy,
                "eos_token": "</s>",
                "bos_token": "<s>",
                "unk_token": "<unk>",
            }
        )
    )
    tokenizer = tokenization.load_tokenizer(str(tmp_path))
    response = tokenization.response_tokenizer(str(tmp_path), tokenizer)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    golden = []
    for prefix in (True, False):
        proto.normalizer_spec.add_dummy_prefix = prefix
        golden.append(sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()))
    for text in ("Hello world", "1,234 + 5 = 1239\n#### 1239", "\nx y", "é漢<x>"):
        assert tokenization.encode(tokenizer, text) == golden[0].encode(text) != golden[1].encode(text), text
        for follows in (text, " " + text):
            assert tokenization.encode(response, follows) == golden[1].encode(follows), follows


def test_response_tokenizer_of_tiny(tiny_dir, tmp_path):
    """No dummy prefix to begin with: the same object, digits one by one. With one: loaded again without it."""
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    assert tokenization.response_tokenizer(str(tiny_dir), tokenizer) is tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenization.encode(tokenizer, "1239")) == ["1", "2", "3", "9"]
    folder = shutil.copytree(tiny_dir, tmp_path / "prefixed")
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    prefixed = tokenization.load_tokenizer(str(folder))
    response = tokenization.response_tokenizer(str(folder), prefixed)
    assert prefixed.convert_ids_to_tokens(tokenization.encode(prefixed, "7 + 5")) == [
        "\u2581",
        "7",
        "\u2581+",
        "\u2581",
        "5",
    ]
    assert response.convert_ids_to_tokens(tokenization.encode(response, "7 + 5")) == ["7", "\u2581+", "\u2581", "5"]


# --- saving -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_llada, tiny_dir, tmp_path):
    """trained(**fields) -> (save, config.json of the source, weights); save() writes them to runs/final."""

    def make(**fields):
        config, _ = make_llada(source := tmp_path / "source", **fields)
        model, tokenizer = load(source), tokenization.load_tokenizer(str(tiny_dir))
        with torch.no_grad():
            weights = {name: parameter.mul_(1.5).clone() for name, parameter in model.named_parameters()}
        (tmp_path / "runs").mkdir()
        return (
            lambda tokenizer=tokenizer, card="card é": checkpoint.save_model(
                tmp_path / "runs" / "final", model, weights, source, tokenizer, card
            ),
            config,
            weights,
        )

    return make


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2, "include_qkv_bias": True, "weight_tying": True}])
def test_save_and_load(trained, tmp_path, tiny_dir, fields):
    save, config, weights = trained(**fields)
    save()
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
    save, _, _ = trained()
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
