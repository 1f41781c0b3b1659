"""Tests of moe.py: the originals' logits and gradients, strict files, training, adapters and 4 bits of experts.

bash tests/run.sh tests/models/test_moe.py

The references were made with the original code; they are not part of the project.
"""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from originals import refused
from safetensors.torch import load_file, save_file
from small import (
    ADAPTER_LENGTHS,
    ADAPTER_RUN,
    MASK,
    ROOT,
    VOCAB,
    ds_config,
    execute,
    flags,
    log,
    make_pairs,
    pack,
    run_jobs,
)
from test_quantized import needs_bitsandbytes

import score
from models import architecture, checkpoint, experts, families, lora, moe, quantized
from models.attention import Rows
from models.families import Blocks
from scoring.states import response_states
from training import engine

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "mask_token_id": MASK,
    "pad_token_id": 2,
}
FIELDS = {  # config.json as the makers write it: with fields that nothing reads, and LLaDA-MoE's model_type
    "lladamoe": SMALL
    | {
        "model_type": "llada",
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAMoEConfig"},
        "num_key_value_heads": 4,
        "expert_intermediate_size": 16,
        "dense_intermediate_size": 40,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_enable_expert_bias": False,
        "partial_rotary_factor": 1,
        "rope_theta": 50000,
        "rope_scaling": None,
        "clip_qkv": None,
        "router_aux_loss_coef": 0.01,
    },
    "llada2_moe": SMALL
    | {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "score_function": "sigmoid",
        "rotary_dim": 4,
    },
}
FAMILIES = tuple(FIELDS)
IDS = torch.randint(4, VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))


def make(folder, family, **changed):
    """A random checkpoint in the original's layout; returns its tensors."""
    fields = FIELDS[family] | changed
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    config = architecture.load_config(str(folder))
    torch.manual_seed(0)
    model = {"lladamoe": moe.LLaDAMoEModelLM, "llada2_moe": moe.LLaDA2MoeModelLM}[family](config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.2)
    tensors = {name: tensor.contiguous() for name, tensor in experts.split(model, model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load(folder, **options):
    return checkpoint.load_model(str(folder), torch.float32, **options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    tensors = {family: make(folder / family, family) for family in FAMILIES}
    for family in FAMILIES:
        for path in tiny_dir.glob("token*"):
            shutil.copy(path, folder / family)
    return SimpleNamespace(folder=folder, tensors=tensors)


# --- the originals ----------------------------------------------------------------------------------------


class Reference:
    """The model of a folder of references, and its arrays as tensors."""

    def __init__(self, folder):
        self.model, self.arrays = load(folder), np.load(folder / "ref.npz")

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def check_gradients(self, case):
        """The gradients of the model's parameters against all of a case's."""
        parameters = dict(self.model.named_parameters())
        gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        gradients = experts.split(self.model, gradients)
        names = [name for name in self.arrays.files if name.startswith(f"{case}/grad:")]
        assert len(names) >= 4 and any(".experts." in name for name in names)
        for name in names:
            assert_close(gradients[name.partition(":")[2]], self[name])


def assert_close(got, want):
    assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


class Whole:
    """One row with positions and a mask of its own, as models take attention.Rows."""

    def __init__(self, places, mask=None):
        self.places, self.longest, self.mask = places, int(places.max()) + 1, mask

    def attend(self, q, k, v, scale=None, layer=None):
        shared = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, self.mask, scale=scale, enable_gqa=shared)


@pytest.fixture(scope="module")
def lladamoe(shared):
    return Reference(shared / "golden" / "lladamoe")


@pytest.fixture(scope="module")
def llada2(shared):
    return Reference(shared / "golden" / "llada2_moe")


@torch.no_grad()
def test_lladamoe_logits(lladamoe):
    model, ids = lladamoe.model, lladamoe["shifted/ids"]
    for case in ("one", "short", "batch"):
        assert_close(model(lladamoe[f"{case}/ids"]).logits, lladamoe[f"{case}/logits"])
    for case in ("leftpad", "rightpad"):
        real = lladamoe[f"{case}/mask"].bool()
        got = model(lladamoe[f"{case}/ids"], lladamoe[f"{case}/mask"]).logits
        assert_close(got[real], lladamoe[f"{case}/logits"][real])
    for row, places in enumerate(lladamoe["shifted/position_ids"]):
        assert_close(model(ids[row : row + 1], rows=Whole(places)).logits[0], lladamoe["shifted/logits"][row])


def test_lladamoe_score(lladamoe):
    """log p of masked tokens, and the gradient of their sum, router and expert included."""
    masked = lladamoe["score/masked"]
    positions = masked.flatten().nonzero()[:, 0]
    lladamoe.model.zero_grad()
    logps = lladamoe.model(lladamoe["score/xt"], positions=positions, targets=lladamoe["score/x0"][masked])
    assert_close(logps.detach(), lladamoe["score/logp"][masked])
    logps.sum().backward()
    lladamoe.check_gradients("score")


@torch.no_grad()
def test_llada2_logits(llada2):
    assert_close(llada2.model(llada2["full/ids"]).logits, llada2["full/logits"])
    for case in ("fwd_B8", "fwd_B4"):
        got = llada2.model(llada2[f"{case}/ids"], llada2[f"{case}/mask"][None, None]).logits
        assert_close(got, llada2[f"{case}/logits"])


def test_llada2_experts(llada2):
    """The last layer's choice of experts, and their weights, whatever their order."""
    seen, mixture = [], llada2.model.model.layers[-1].mlp
    hook = mixture.gate.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    case = "fwd_B8"
    logits_of = llada2.model(llada2[f"{case}/ids"], llada2[f"{case}/mask"][None, None])
    hook.remove()
    chosen, weights = mixture.route(seen[0])
    want, order = llada2[f"{case}/last_layer_topk_idx"].flatten(0, 1).sort()
    assert logits_of is not None and torch.equal(chosen.sort().values, want)
    want = llada2[f"{case}/last_layer_topk_weight"].flatten(0, 1).gather(1, order)
    assert_close(weights.detach().gather(1, chosen.argsort()), want)


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("form", ["doubled", "shared"])
def test_llada2_score(llada2, size, form):
    """The doubled row of the original, and our shared row of blocks that score something: log p and gradients."""
    case, llada2.model.blocks = f"train_B{size}", Blocks(size)
    x0, masked = llada2[f"{case}/x0"], llada2[f"{case}/masked"]
    llada2.model.zero_grad()
    if form == "doubled":
        scores = doubled_scores(llada2, case)
    else:
        ranks, states = engine.Ranks(0, 1, torch.device("cpu")), []
        for row, start in enumerate(llada2[f"{case}/prompt_len"].tolist()):
            hidden = masked[row, None, start:].numpy()
            text = x0[row].numpy()
            states.append(response_states(text[:start], text[start:], hidden, hidden, 310, Blocks(size)))
        scores = torch.cat(score.state_scores(llada2.model, states, 200, ranks))
    assert_close(scores.detach(), llada2[f"{case}/score"])
    scores.sum().backward()
    llada2.check_gradients(case)


def doubled_scores(llada2, case):
    places, mask, L = llada2[f"{case}/row_position_ids"], llada2[f"{case}/row_mask"], llada2[f"{case}/x0"].shape[1]
    scores = []
    for row, ids in enumerate(llada2[f"{case}/row_ids"]):
        where = Whole(places if places.dim() == 1 else places[row], mask)
        noisy = llada2.model(ids[None], rows=where).logits[0, :L]
        assert_close(noisy.detach(), llada2[f"{case}/logits_noisy"][row])
        logps = noisy.log_softmax(-1).gather(1, llada2[f"{case}/x0"][row][:, None])[:, 0]
        scores.append((logps * llada2[f"{case}/masked"][row]).sum())
    return torch.stack(scores)


# --- routing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_neighbours(home, family, dtype, close):
    """A row alone, and among others that crowd the same experts: the same experts, the same log-probabilities."""
    model = checkpoint.load_model(str(home.folder / family), dtype)
    row = IDS[:1]
    crowd = torch.cat((row[:, :1].expand(-1, 40), row, row[:, :1].expand(-1, 5)), 1)
    chosen, mixture = [], model.model.layers[-1].mlp
    mixture.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    with torch.no_grad():
        alone = model(input_ids=row).logits[0].float().log_softmax(-1)
        among = model(input_ids=crowd, rows=Rows((40, 19, 5), row.device)).logits[0, 40:59].float().log_softmax(-1)
    assert torch.equal(chosen[0], chosen[1][40:59])
    assert (alone - among).abs().max() < close * alone.abs().max()


def test_biases_choose(home, tmp_path):
    """LLaDA2's bias chooses and does not weigh; LLaDA-MoE's, where it is on, does both."""
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    mixture = load(home.folder / "llada2_moe").model.layers[1].mlp
    mixture.gate.expert_bias.zero_()
    mixture.gate.expert_bias[[1, 6]] = 100.0
    chosen, weights = mixture.route(x)
    assert set(chosen.flatten().tolist()) == {1, 6}
    sigmoids = mixture.gate(x).sigmoid().gather(1, chosen)
    assert torch.allclose(weights, 2.5 * sigmoids / sigmoids.sum(1, keepdim=True))

    make(tmp_path / "biased", "lladamoe", moe_router_enable_expert_bias=True)
    mixture = load(tmp_path / "biased").model.layers[1].mlp
    chosen, weights = mixture.route(x)
    probabilities = mixture.gate(x).softmax(-1) + mixture.expert_bias
    assert mixture.expert_bias.any() and torch.equal(weights, probabilities.topk(2).values)


def test_optional_parts(tmp_path):
    """LLaDA-MoE with clipped q, k, v and a shared expert beside the mixture: tensors are read, and all of it counts."""
    make(tmp_path / "plain", "lladamoe")
    make(tmp_path / "clipped", "lladamoe", clip_qkv=0.1)
    assert not torch.allclose(logits(load(tmp_path / "plain")), logits(load(tmp_path / "clipped")), atol=1e-3)
    tensors = make(tmp_path / "shared", "lladamoe", shared_expert_intermediate_size=12)
    model, x = load(tmp_path / "shared"), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    assert tensors["model.layers.1.shared_expert.up_proj.weight"].shape == (12, 32)
    block, seen = model.model.layers[1], []
    block.shared_expert.register_forward_hook(lambda _, __, output: seen.append(output))
    cos, sin = model.rotary(5, x.device)
    whole = block(x, cos, sin, None, None)
    del block.shared_expert
    assert torch.allclose(whole, block(x, cos, sin, None, None) + seen[0], atol=1e-6)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_as_it_was(home, tmp_path, family):
    """Every tensor under its original name, constants too, and the fields of config.json; it loads again."""
    from models import tokenization

    source = home.folder / family
    model, tokenizer = load(source), tokenization.load_tokenizer(str(source))
    checkpoint.save_model(tmp_path / "out", model, dict(model.named_parameters()), str(source), tokenizer, "", MASK)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == home.tensors[family].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in home.tensors[family].items())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: fields[name] for name in FIELDS[family] if name != "auto_map"} == {
        name: value for name, value in FIELDS[family].items() if name != "auto_map"
    }
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_strict(home, tmp_path):
    """An expert's tensor that is missing, unknown or truncated, and a missing bias of the router."""
    folder, tensors = shutil.copytree(home.folder / "llada2_moe", tmp_path / "bad"), home.tensors["llada2_moe"]
    one, bias = "model.layers.1.mlp.experts.7.up_proj.weight", "model.layers.2.mlp.gate.expert_bias"
    beyond = one.replace(".7.", ".8.")
    stack = one.replace(".7.", ".")
    for change, words in (
        ({one: None}, (one, "(1 in all)", "missing")),
        ({bias: None}, (bias, "missing")),
        ({beyond: tensors[one].clone()}, (beyond, "not part")),
        ({stack: torch.zeros(8, 16, 32)}, (stack, "not part")),
        ({one: tensors[one][:-1].contiguous()}, (one, "shape [15, 32]", "expected [16, 32]")),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        refused(lambda: load(folder), *words)


@pytest.mark.parametrize(
    "family, fields, words",
    [
        ("llada2_moe", {"n_group": 3}, "n_group 3 must divide num_experts 8"),
        ("llada2_moe", {"n_group": 8}, "groups of at least 2"),
        ("llada2_moe", {"topk_group": 5}, "topk_group 5 of 4 groups"),
        ("llada2_moe", {"num_experts_per_tok": 5}, "cannot give num_experts_per_tok 5"),
        ("llada2_moe", {"score_function": "softmax"}, "score_function is 'softmax'"),
        ("llada2_moe", {"use_qk_norm": False}, "use_qk_norm is False"),
        ("llada2_moe", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "a rotation of type linear"),
        ("llada2_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("llada2_moe", {"num_key_value_heads": 3}, "num_key_value_heads 3 must divide"),
        ("lladamoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("lladamoe", {"moe_layer_freq": [1, 1]}, "moe_layer_freq has 2 entries for 3 layers"),
        ("lladamoe", {"dense_intermediate_size": None}, "layers without experts"),
        ("lladamoe", {"partial_rotary_factor": -1}, "partial_rotary_factor -1"),
        ("lladamoe", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
        ("lladamoe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ],
)
def test_router_fields(tmp_path, family, fields, words):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS[family] | fields))
    refused(lambda: architecture.load_config(str(tmp_path)), "config.json", words)


def test_lladamoe_by_architecture(home):
    """config.json says llada; it is LLaDA-MoE by the class that it names, for every reader of config.json."""
    from models import folders

    name = str(home.folder / "lladamoe")
    assert architecture.load_config(name).model_type == folders.plain_config(name).model_type == "lladamoe"
    assert families.model_type({"model_type": "llada", "architectures": ["LLaDAModelLM"]}) == "llada"


# --- training ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(home):
    """Three steps of each family under ZeRO-3 with both offloads, in full with and without gradient checkpointing, and
    with LoRA; the last two from the checkpoint of the second step, too."""
    config, first, rest = ds_config(home.folder / "ds.json", "zero3_offload_4080", eps=1e-3), [], []
    full = {name: value for name, value in ADAPTER_RUN.items() if not name.startswith("lora_")}
    kinds = {
        "full": full | {"gradient_checkpointing": "false"},
        "again": full | {"gradient_checkpointing": "true"},
        "lora": ADAPTER_RUN,
    }
    for family in FAMILIES:
        data = pack(home.folder / f"packed-{family}", make_pairs(ADAPTER_LENGTHS, 5), home.folder / family)
        base = ["--data", data, "--deepspeed", config]
        first.append((f"{family}-score", "score", base + flags(**kinds["full"])))
        for kind, options in kinds.items():
            run = base + flags(**options, output_dir=home.folder / f"{family}-{kind}", save_steps=2)
            first.append((f"{family}-{kind}", "train_dpo", run))
            if kind != "full":
                rest.append((f"{family}-{kind}-rest", "train_dpo", run))
    errors = run_jobs(home.folder / "out", None, first)
    for name, script, _ in first:
        if script == "train_dpo":
            shutil.move(home.folder / name / "final", home.folder / f"{name}-final")
    errors |= run_jobs(home.folder / "out", None, rest)
    assert [(name, rank["error"]) for name, ranks in errors.items() for rank in ranks if rank["error"]] == []
    return home.folder


@pytest.mark.parametrize("kind", ["full", "again", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(trained, family, kind):
    """Margin 0 and ln 2 at first, then the model has moved; a resumed run ends alike, to the last bit."""
    lines = log(trained / f"{family}-{kind}")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert abs(lines[0]["rewards/margins"]) < 1e-4 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(lines[2]["rewards/margins"]) > 1e-3 and lines[0]["grad_norm"] > 0
    if kind == "full":
        return
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    first, resumed = (
        load_file(folder / name)
        for folder in (trained / f"{family}-{kind}-final", trained / f"{family}-{kind}" / "final")
    )
    assert first.keys() == resumed.keys() and all(torch.equal(first[name], resumed[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_trained(home, trained, family):
    """Routers and experts move, biases for the choice of experts do not; computing blocks again changes nothing."""
    once, again = (load_file(trained / f"{family}-{kind}-final" / "model.safetensors") for kind in ("full", "again"))
    assert once.keys() == home.tensors[family].keys()
    assert all(torch.allclose(once[name], again[name], atol=1e-6) for name in once)
    still = {name for name, tensor in home.tensors[family].items() if torch.equal(tensor, once[name])}
    constants = {name for name in once if name.endswith("expert_bias")}
    without_tokens = {name.rpartition(".experts.")[2].partition(".")[0] for name in still - constants}
    assert constants <= still and all(".experts." in name for name in still - constants) and len(without_tokens) < 4


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(home, trained, family):
    """On attention, dense layers and shared experts, under the original's names; peft computes the same."""
    folder, base = trained / f"{family}-lora-final", load(home.folder / family)
    names = {name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")}
    if family == "lladamoe":
        inside = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qkvo"}
        inside |= {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    else:
        inside = {f"model.layers.{i}.attention.{part}" for i in range(3) for part in ("query_key_value", "dense")}
        parts = ("layers.0.mlp", "layers.1.mlp.shared_experts", "layers.2.mlp.shared_experts")
        inside |= {f"model.{place}.{part}_proj" for place in parts for part in ("gate", "up", "down")}
    assert names == {f"{name}.lora_{side}.weight" for name in inside for side in "AB"}
    ours = logits(load(folder))
    assert (ours - logits(base)).abs().max() > 1e-2
    assert (logits(peft.PeftModel.from_pretrained(base, str(folder))) - ours).abs().max() < 1e-5


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_nothing_is_fetched_on_demand(recompute, tmp_path):
    """Stacks of experts come ahead of use, once in a forward pass, and at most twice with its backward pass.

    A layer of LLaDA2-mini is 0.8 billion parameters: the limits of a ds_config must hold one (bench/README.md).
    """
    settings = json.loads((ROOT / "ds_configs" / "zero3_offload_4080.json").read_text())
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 2 * 10**9}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    options = flags(family="llada2_moe", blocks=3, only="full, several", recompute=recompute)
    options += flags(ds_config=tmp_path / "ds.json", json=tmp_path / "table")
    done = execute([ROOT / "bench" / "fetches.py", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    [row] = json.loads((tmp_path / "table").read_text())
    assert row["on_demand"] == 0 and row["lost"] == 0
    assert row["models"] < row["forwards"] + 2 * row["backwards"]


# --- 4 bits -----------------------------------------------------------------------------------------------


def unpacked(folder):
    """A plain model whose blocks' matrices are what 4 bits leave of them, each stack of experts as one."""
    import bitsandbytes.functional as F

    model = load(folder)
    layers = [model.get_submodule(name) for name in architecture.block_linears(model)]
    for layer in layers + [each for each in model.modules() if isinstance(each, experts.ExpertLinear)]:
        weight = layer.weight
        weight.data = F.dequantize_4bit(*F.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True))
    return model


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bits(home, family):
    """Logits and the adapters' gradients are those of the unpacked weights; every expert is counted."""
    model, plain, exact = load(home.folder / family, load_in_4bit=True), unpacked(home.folder / family), None
    exact = load(home.folder / family)
    assert (logits(model) - logits(plain)).abs().max() < 1e-5
    assert (logits(model) - logits(exact)).abs().max() > 1e-3
    stacks = [each for each in model.modules() if isinstance(each, experts.ExpertLinear)]
    assert len(stacks) == 6 and all(each.weight.dtype == torch.uint8 for each in stacks)
    assert sum(map(quantized.numel, model.parameters())) == sum(map(torch.Tensor.numel, plain.parameters()))
    gradients = []
    for each in (model, plain):
        lora.add(each, 2, 4, "auto", 0, "base")
        each(input_ids=IDS).logits.square().sum().backward()
        gradients.append({name: value.grad for name, value in each.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[1].items():
        assert (gradients[0][name] - want).abs().max() < 1e-5 * max(1, want.abs().max())


@needs_bitsandbytes
def test_one_stack_at_a_time_is_filled(home, monkeypatch):
    """A layer's stacks are packed before the next is written to: memory holds one of them in 16 bits."""
    order, pack_one = [], quantized.pack

    def noting(parameter):
        open_stacks = [each for each in made[0].modules() if isinstance(each, experts.ExpertLinear)]
        waiting = [each.weight for each in open_stacks if not each.weight.bnb_quantized and each.weight.data.any()]
        order.append(len(waiting))
        pack_one(parameter)

    made, prepare = [], quantized.prepare

    def preparing(model, dtype):
        prepare(model, dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.zero_()
        made.append(model)

    monkeypatch.setattr(quantized, "prepare", preparing)
    monkeypatch.setattr(quantized, "pack", noting)
    load(home.folder / "llada2_moe", load_in_4bit=True)
    assert max(order) == 1 and order.count(1) == 6
