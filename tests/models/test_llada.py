"""Tests of llada.py: the original's logits, and a forward pass of this file's own, in float64, one number at a time.

bash tests/run.sh tests/models/test_llada.py
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import AVX512
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from models import llada
from models.attention import Rows
from models.llada import LLaDAConfig, LLaDAModelLM

FORMS = {
    "plain": {},
    "gqa, bias, tied": {"n_kv_heads": 2, "include_qkv_bias": True, "weight_tying": True},
    "nulls": {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None, "mlp_ratio": 2},
}


def load(folder, **kwargs):
    model, info = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, **kwargs
    )
    assert not any(info.values()), info  # nothing missing, unexpected or misshapen
    assert type(model) is LLaDAModelLM
    return model.eval()


def draw_ids(B, L, seed=0):
    return torch.randint(0, 30, (B, L), generator=torch.Generator().manual_seed(seed))


# --- the original -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, "fp32") for name in ("one", "short", "batch", "full", "beyond", "leftpad", "rightpad", "allones")),
        *((name, "bf16") for name in ("short", "batch", "leftpad")),
    ],
)
@torch.no_grad()
def test_logits_of_the_original(shared, name, kind):
    golden = np.load(shared / "llada_golden" / "ref_logits.npz")
    model = load(shared / "llada_golden", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    mask = torch.from_numpy(golden[f"{name}/mask"]) if f"{name}/mask" in golden else None
    got = model(torch.from_numpy(golden[f"{name}/ids"]), attention_mask=mask).logits.float().numpy()
    want = golden[f"{name}/{kind}"]
    assert got.shape == want.shape and want.std() > 1
    if kind == "fp32" or AVX512:
        np.testing.assert_allclose(got, want, rtol=0, atol={"fp32": 1e-5, "bf16": 0}[kind])
    else:  # a last digit here and there
        np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-5)
        assert (got == want).mean() > 0.95


# --- a forward pass in plain loops ------------------------------------------------------------------------


def norm(x, weight, eps):
    """Rows (L, D): each divided by its root mean square."""
    rows = []
    for row in x:
        mean_square = sum(float(v) ** 2 for v in row) / len(row)
        rows.append(row / math.sqrt(mean_square + eps) * weight)
    return torch.stack(rows)


def turn(x, theta):
    """Rotary positions of one head (L, hd): coordinates j and j + hd/2 turn by position * theta^(-2j/hd)."""
    out, half = x.clone(), x.shape[1] // 2
    for i in range(x.shape[0]):
        for j in range(half):
            angle = i * theta ** (-2 * j / x.shape[1])
            a, b = float(x[i, j]), float(x[i, j + half])
            out[i, j] = a * math.cos(angle) - b * math.sin(angle)
            out[i, j + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def naive_logits(config, tensors, ids, real):
    """Logits (L, V) of one sequence; keys where `real` is 0 are not attended to."""
    w = {name.removeprefix("model.transformer."): tensor.double() for name, tensor in tensors.items()}
    heads, width = config["n_heads"], config["d_model"] // config["n_heads"]
    shared_by = heads // (config["n_kv_heads"] or heads)
    x = torch.stack([w["wte.weight"][id] for id in ids])
    for n in range(config["n_layers"]):

        def linear(h, name, n=n):
            return h @ w[f"blocks.{n}.{name}.weight"].T + w.get(f"blocks.{n}.{name}.bias", 0)

        h = norm(x, w[f"blocks.{n}.attn_norm.weight"], config["rms_norm_eps"])
        q, k, v = (linear(h, name) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = []
        for head in range(heads):
            mine, theirs = (slice(place * width, (place + 1) * width) for place in (head, head // shared_by))
            score = (
                turn(q[:, mine], config["rope_theta"]) @ turn(k[:, theirs], config["rope_theta"]).T / math.sqrt(width)
            )
            share = score.exp() * torch.tensor(real)
            mixed.append(share / share.sum(1, keepdim=True) @ v[:, theirs])
        x = x + linear(torch.cat(mixed, 1), "attn_out")
        h = norm(x, w[f"blocks.{n}.ff_norm.weight"], config["rms_norm_eps"])
        gate = linear(h, "ff_proj")
        x = x + linear(gate / (1 + (-gate).exp()) * linear(h, "up_proj"), "ff_out")
    return (
        norm(x, w["ln_f.weight"], config["rms_norm_eps"])
        @ w["wte.weight" if config["weight_tying"] else "ff_out.weight"].T
    )


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_naive_forward(make_llada, tmp_path, form):
    config, tensors = make_llada(tmp_path, **FORMS[form])
    model, ids = load(tmp_path), draw_ids(3, 7)
    real = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]])
    got = model(ids, attention_mask=real).logits.double()
    for row in range(3):
        want = naive_logits(config, tensors, ids[row].tolist(), real[row].tolist())
        assert got[row].shape == want.shape == (7, config["embedding_size"] or config["vocab_size"])
        torch.testing.assert_close(got[row], want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model(ids).logits[0].double(), got[0], atol=2e-5, rtol=0)  # no mask: all are real
    assert (model(ids).logits[1] - got[1]).abs().max() > 0.1  # and the mask matters


def test_bfloat16_steps():
    """Mean square and rotation in float32, cast back; the norm's weight comes after the cast."""
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    layer = llada.RMSNorm(24, 1e-5).bfloat16()
    layer.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    wide = x.double()
    want = layer.weight * (wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()).float().bfloat16()
    assert torch.equal(layer(x), want) and layer(x).dtype == torch.bfloat16
    cos, sin = llada.rotary(50, 24, 100.0, "cpu")
    assert cos.dtype == sin.dtype == torch.float32
    want = turn(wide, 100.0).bfloat16()
    assert (llada.rotate(x, cos, sin) == want).float().mean() > 0.99  # float64's rounding, but for a few ties


@torch.no_grad()
def test_nothing_attended_is_no_nan(make_llada, tmp_path):
    make_llada(tmp_path)
    real = torch.tensor([[0] * 5, [1] * 5])
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path, dtype=dtype)
        logits = model(draw_ids(2, 5), attention_mask=real).logits
        assert logits.isfinite().all() and logits.dtype == dtype
    assert model(draw_ids(1, 40)).logits.shape == (1, 40, 32)  # longer than max_sequence_length: no limit


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_positions(make_llada, tmp_path, form):
    make_llada(tmp_path, **FORMS[form])
    model, ids = load(tmp_path), draw_ids(2, 6)
    full, positions = model(ids).logits.flatten(0, 1), torch.tensor([0, 3, 11, 7, 7])
    got = model(ids, positions=positions).logits
    assert got.shape == (5, full.shape[1])
    torch.testing.assert_close(got, full[positions], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_end_to_end(make_llada, tmp_path, form):
    """Rows of any length in one sequence: every logit and the gradient are those of the rows alone."""
    make_llada(tmp_path, **FORMS[form])
    model, lengths = load(tmp_path), (7, 3, 3, 1, 12, 3)
    ids, parameters = draw_ids(1, sum(lengths)), list(model.parameters())
    weight = torch.randn(sum(lengths), model.config.rows, generator=torch.Generator().manual_seed(2))

    def loss_and_gradient(logits):
        return logits, torch.autograd.grad((weight * logits.log_softmax(-1)).sum(), parameters)

    joined, gradient = loss_and_gradient(model(ids, rows=Rows(lengths, "cpu")).logits[0])
    alone, true = loss_and_gradient(torch.cat([model(row).logits[0] for row in ids.split(lengths, dim=1)]))
    torch.testing.assert_close(joined, alone, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradient, true):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)
    assert (model(ids).logits[0] - alone).abs().max() > 0.1  # as one row they would see each other
    half = load(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        joined = half(ids, rows=Rows(lengths, "cpu")).logits[0]
        alone = torch.cat([half(row).logits[0] for row in ids.split(lengths, dim=1)])
    torch.testing.assert_close(joined, alone, atol=0 if AVX512 else 2.0**-5, rtol=0)


def test_gradient_checkpointing(make_llada, tmp_path):
    """The same loss and gradients, and the blocks do run a second time."""
    make_llada(tmp_path, **FORMS["gqa, bias, tied"])
    model, calls = load(tmp_path).train(), []
    model.model.transformer.blocks[0].ff_proj.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(draw_ids(2, 6)).logits.log_softmax(-1)[..., 5].sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert len(calls) == 3 and all(tensor.abs().max() > 0 for tensor in results[0])
    for once, twice in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, atol=1e-6, rtol=1e-6)


# --- config.json, names, Auto classes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("rope", False),
        ("alibi", True),
        ("include_bias", True),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("multi_query_attention", True),
        ("block_group_size", 2),
        ("clip_qkv", 8.0),
        ("attention_dropout", 0.1),
        ("residual_dropout", 0.1),
        ("embedding_dropout", 0.1),
        ("layer_norm_with_affine", False),
        ("n_heads", 5),
        ("n_kv_heads", 4),
    ],
)
def test_unsupported_config(make_llada, tmp_path, field, value):
    """What the original could build and this file cannot is refused by name, never ignored."""
    make_llada(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"{field} (is )?{value!r}"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"multi_query_attention": False}, {"clip_qkv": None}, {"attention_dropout": 0}])
def test_off_is_off(change):
    assert LLaDAConfig(d_model=24, n_heads=6, n_layers=2, **change).n_layers == 2


@pytest.mark.parametrize("form", FORMS)
def test_save_pretrained_keeps_names(make_llada, tmp_path, form):
    config, tensors = make_llada(tmp_path / "a", **FORMS[form])
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    moved = {key for key in config if saved.get(key) != config[key]}
    assert moved <= {"transformers_version", "auto_map"}  # checkpoint.save_model writes auto_map back


@pytest.mark.parametrize("where", ["made", "golden"])
def test_auto_classes(make_llada, tmp_path, request, where):
    """An original folder, auto_map and all, loads through transformers without running anything that came with it."""
    if where == "made":
        make_llada(folder := tmp_path)
    else:
        folder = request.getfixturevalue("shared") / "llada_golden"
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert type(config) is LLaDAConfig and config.hidden_size == config.d_model
    logits = [
        cls.from_pretrained(folder, trust_remote_code=False).eval()(draw_ids(1, 4)).logits
        for cls in (AutoModel, AutoModelForMaskedLM)
    ]
    assert torch.equal(*logits) and logits[0].shape == (1, 4, config.embedding_size)


def test_fresh_weights():
    """Training from scratch starts at std init_std, norms 1, biases 0."""
    torch.manual_seed(0)
    model = LLaDAModelLM(
        LLaDAConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=99, init_std=0.04, include_qkv_bias=True)
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.04, rel=0.1), name
