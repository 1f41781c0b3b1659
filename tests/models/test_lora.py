"""Tests of lora.py: adapters through the engine, alone in what they change, merged to the same model."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from originals import edit_json, refused
from safetensors.torch import load_file, save_file
from small import ADAPTER_LENGTHS, ADAPTER_RUN, call, ds_config, flags, log, make_home, refusal, run_jobs

import config
import generate
import merge
import train_dpo
from files import InputError
from models import checkpoint, folders, lora
from models.head import Head

STAGES = ("zero0", "zero2_offload_4080", "zero3_offload_4080")
RUN = flags(**ADAPTER_RUN)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("lora"), tiny_dir, ADAPTER_LENGTHS, 5)


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, home):
    """Three steps in every stage, on 1 or 2 ranks; in each the third again, from the checkpoint of the second."""
    world, folder = request.param, home.folder / f"ranks-{request.param}"
    folder.mkdir()
    base, first, rest = ["--data", home.data] + RUN, [], []
    for stage in STAGES:
        argv = (
            base
            + ["--deepspeed", ds_config(folder / f"{stage}.json", stage, eps=1e-3)]
            + flags(output_dir=folder / stage, save_steps=2)
        )
        first.append((stage, "train_dpo", argv))
        rest.append((f"{stage}-rest", "train_dpo", argv))
    did = run_jobs(folder / "out", world, [("score", "score", base)] + first)
    for stage in STAGES:
        shutil.move(folder / stage / "final", folder / f"{stage}-final")
    did |= run_jobs(folder / "out", world, rest)
    assert [(name, rank["error"]) for name, ranks in did.items() for rank in ranks if rank["error"]] == []
    return SimpleNamespace(folder=folder, did=did)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def load(folder):
    return checkpoint.load_model(str(folder), torch.float32)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("stage", STAGES)
def test_training(home, trained, stage):
    """Margin 0 at first; only adapters are trained and saved, in peft's format; all stages and a resumed run agree."""
    lines = log(trained.folder / stage)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert abs(lines[0]["rewards/margins"]) < 1e-4 and lines[2]["loss"] < math.log(2)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    first, resumed = weights(trained.folder / f"{stage}-final"), weights(trained.folder / stage / "final")
    assert first.keys() == resumed.keys() and all(torch.equal(first[name], resumed[name]) for name in first)
    assert len(first) == 2 * 2 * 7  # 2 matrices in each of 2 blocks of 7 layers
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in first)
    assert all(tensor.any() for tensor in first.values())
    other = weights(trained.folder / f"{STAGES[0]}-final")
    assert all(torch.allclose(first[name], other[name], atol=1e-5) for name in first)
    states = (trained.folder / stage / "checkpoints").rglob("*model_states.pt")
    assert sum(path.stat().st_size for path in states) < 60000 * 4


def test_base_stays(home, trained):
    """The weights after each step, gathered from the engine: nothing of the base is among them."""
    got = torch.load(trained.folder / "out" / "zero3_offload_4080.step-3.pt")
    assert got and all("lora_" in name for name in got)


def test_merged_is_the_adapters_model(home, trained, tmp_path):
    """Our merge, our loading of the adapter, and peft's own forward of base and adapter give the same logits."""
    adapter = trained.folder / "zero3_offload_4080-final"
    ids = torch.randint(4, 500, (2, 19), generator=torch.Generator().manual_seed(0))
    merge.main([str(adapter), str(tmp_path / "merged"), "--use_mixed_precision", "no"])
    merged, loaded, base = (
        checkpoint.load_model(str(name), torch.float32) for name in (tmp_path / "merged", adapter, home.model)
    )
    want = logits(peft.PeftModel.from_pretrained(base, str(adapter)), ids)
    assert (logits(merged, ids) - want).abs().max() < 1e-5 and (logits(loaded, ids) - want).abs().max() < 1e-5
    assert (logits(checkpoint.load_model(str(home.model), torch.float32), ids) - want).abs().max() > 1e-2
    assert folders.model_fingerprint(str(adapter)) != folders.model_fingerprint(str(home.model))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llada"


@pytest.mark.parametrize("card_gib, flag", [(8, ""), (0.0001, " --deepspeed ds_configs/zero3_offload_4080.json")])
def test_the_next_command_fits_the_card(trained, tmp_path, capsys, monkeypatch, card_gib, flag):
    """A merged model that is larger than the card is streamed."""
    card = SimpleNamespace(total_memory=card_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    adapter = trained.folder / "zero3_offload_4080-final"
    merge.main([str(adapter), str(tmp_path / "merged"), "--use_mixed_precision", "no"])
    assert capsys.readouterr().out.endswith(f"--tasks gsm8k --use_mixed_precision no{flag}\n")


def test_bf16_keeps_the_adapter(home, trained, tmp_path, capsys):
    """Beside its base an adapter counts in bf16, too; merged, most of a small one is rounded away, and that is said."""
    folder, ids = shutil.copytree(trained.folder / "zero0-final", tmp_path / "small"), torch.arange(4, 60)[None]
    tensors = weights(folder)
    factor = 1e-3 * 0.02 / max(float(value.abs().max()) for name, value in tensors.items() if "lora_B" in name)
    save_file(
        {name: value * factor if "lora_B" in name else value for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    loaded = checkpoint.load_model(str(folder), torch.bfloat16)
    layers = dict(loaded.named_modules())
    [name] = [name for name in layers if name.endswith("blocks.0.q_proj")]
    assert layers[name].lora_B.any() and loaded(input_ids=ids).logits.dtype == torch.bfloat16
    merge.main([str(folder), str(tmp_path / "low")])
    low = "".join(capsys.readouterr())
    merge.main([str(folder), str(tmp_path / "high"), "--use_mixed_precision", "no"])
    high = "".join(capsys.readouterr())
    assert "not the model that was trained" in low and float(re.search(r"([\d.]+)% of what it adds", low).group(1)) < 50
    assert "warning" not in high and "100.0% of what it adds" in high


def with_peft(model, r, alpha, names):
    """`model` wrapped by peft, adapters on `names` in the model's dtype."""
    settings = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, bias="none")
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


def drawn(model, seed):
    """The trained tensors of `model` by peft's names, filled with random numbers: {name: parameter}."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name.removeprefix(lora.PREFIX).removesuffix(".weight").removesuffix(".default")] = parameter
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        tensors[name].data = 0.05 * torch.randn(tensors[name].shape, generator=generator)
    return tensors


@pytest.mark.parametrize("checkpointing", [False, True])
def test_against_peft(home, checkpointing):
    """Logits and gradients are those of peft's modules; ours is one module a layer."""
    model, theirs = load(home.model), load(home.model)
    modules = len(list(model.modules()))
    if checkpointing:
        for each in (model, theirs):
            each.activation_checkpointing_enable({"use_reentrant": False})
    model, _ = lora.add(model, 4, 8, "auto", 0, home.model)
    theirs = with_peft(theirs, 4, 8, lora.pattern(model)[1])
    assert len(list(model.modules())) == modules < len(list(theirs.modules()))
    ids = torch.randint(4, 500, (2, 19), generator=torch.Generator().manual_seed(0))
    results = []
    for each in (model, theirs):
        tensors = drawn(each, 1)
        made = each(input_ids=ids).logits
        made.log_softmax(-1)[..., 7].sum().backward()
        results.append((made.detach(), {name: tensor.grad for name, tensor in tensors.items()}))
    (ours, gradients), (want, wanted) = results
    assert torch.allclose(ours, want, atol=1e-6) and gradients.keys() == wanted.keys() and len(wanted) == 28
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (gradient - wanted[name]).norm() <= 1e-6 * wanted[name].norm()


def test_start(home):
    """A new adapter changes nothing, and A has peft's range; the seed alone draws it."""
    base, ids = load(home.model), torch.arange(4, 30)[None]
    want = logits(base, ids)
    made = [dict(lora.add(load(home.model), 4, 8, "q_proj", seed, "")[0].named_parameters()) for seed in (1, 1, 2)]
    name = "model.transformer.blocks.0.q_proj.lora_A"
    assert made[0][name].equal(made[1][name]) and not made[0][name].equal(made[2][name])
    assert 0.8 < made[0][name].abs().max() * 32**0.5 <= 1
    assert logits(lora.add(base, 4, 8, "auto", 1, "")[0], ids).equal(want)


def test_an_adapter_of_peft_loads_here(home, tmp_path):
    theirs = with_peft(load(home.model), 3, 5, ["q_proj", "up_proj"])
    theirs.peft_config["default"].base_model_name_or_path = str(home.model)
    drawn(theirs, 2)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(4, 30)[None]
    assert (logits(load(tmp_path), ids) - logits(theirs, ids)).abs().max() < 1e-5


def test_an_adapter_knows_its_base(home, trained, tmp_path, monkeypatch):
    """Another's weights under the base's name, or no such folder here, are refused; the hub is not asked."""
    folder = shutil.copytree(trained.folder / "zero0-final", tmp_path / "adapter")
    noted = json.loads((folder / "base.json").read_text())
    assert noted["is_folder"] and noted["mask_token_id"] == 3
    assert noted["load_in_4bit"] is False and noted["shift_logits"] is False
    edit_json(folder / "base.json", fingerprint="0" * 16)
    refused(lambda: load(folder), "the weights there have changed")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="examples/nothing")
    refused(lambda: load(folder), 'base_model_name_or_path is "examples/nothing", a folder that is not here')
    monkeypatch.setattr(config.adapters, "base_model", str(home.model))
    refused(lambda: load(folder), "the weights there have changed")
    edit_json(folder / "base.json", fingerprint=noted["fingerprint"])
    assert load(folder)


@pytest.mark.parametrize("base", [None, 7, "", "/moved/base", "org/name/base"])
def test_two_files_of_peft(home, trained, tmp_path, capsys, monkeypatch, base):
    """The base's tokenizer is taken; --base_model names a base that adapter_config.json does not, here or any more."""
    monkeypatch.setattr(config.adapters, "base_model", None)  # as it is afterwards
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained.folder / "zero0-final" / name, tmp_path)
    assert folders.tokenizer_files(str(tmp_path)) == folders.tokenizer_files(str(home.model))
    asked = ["--model", tmp_path, *flags(prompt="7 + 5 =", gen_length=8, use_mixed_precision="no")]
    call(generate.main, *asked)
    want = capsys.readouterr().out
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=base)
    said = refusal(generate.main, capsys, *asked)
    assert f"{tmp_path}/adapter_config.json: base_model_name_or_path is {json.dumps(base)}" in said
    assert "--base_model" in said
    call(generate.main, *asked, "--base_model", home.model)
    assert capsys.readouterr().out == want
    call(merge.main, tmp_path, tmp_path / "merged", "--base_model", home.model)
    assert "merged into " + str(home.model) in capsys.readouterr().out


def test_sample_from_an_adapter(trained, capsys):
    call(
        generate.main,
        *flags(model=trained.folder / "zero0-final", prompt="7 + 5 =", gen_length=8, use_mixed_precision="no"),
    )
    assert capsys.readouterr().out.endswith("\n")


def test_targets(home):
    """auto takes every linear layer of the blocks; ff_out is the block's, never the head; no match is refused."""
    model = checkpoint.load_model(str(home.model), torch.float32)
    text, names = lora.pattern(model)
    assert len(names) == 14 and "model.transformer.ff_out" not in names
    _, names = lora.pattern(model, "ff_out, q_proj")
    assert names == [f"model.transformer.blocks.{i}.{name}" for i in range(2) for name in ("ff_out", "q_proj")]
    wrapped, said = lora.add(model, 4, 8, "ff_out", 0, home.model)
    assert type(wrapped.model.transformer.ff_out) is Head
    assert "2 layers (ff_out)" in said and f"{2 * 4 * (48 + 32):,}" in said
    for targets in ("query", "q_proj,nothing", ","):
        with pytest.raises(InputError) as error:
            lora.pattern(model, targets)
        assert "--lora_targets" in str(error.value)


def test_refusals(home, trained, tmp_path, capsys):
    folder = shutil.copytree(trained.folder / "zero0-final", tmp_path / "adapter")
    run = ["--data", home.data] + RUN
    said = refusal(train_dpo.main, capsys, *run, "--model_name_or_path", folder, *flags(output_dir=tmp_path / "run"))
    assert "merge.py" in said
    said = refusal(train_dpo.main, capsys, *run, "--lora_targets", "query", *flags(output_dir=tmp_path / "run"))
    assert "--lora_targets query" in said and "q_proj" in said
    tensors, path = weights(folder), folder / "adapter_model.safetensors"
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    refused(lambda: load(folder), name.rpartition(".lora_")[0])
    save_file(tensors | {name: torch.zeros(3, 3)}, path)
    refused(lambda: load(folder), "adapter")
    edit_json(folder / "adapter_config.json", use_dora=True)
    refused(lambda: load(folder), "plain LoRA")
