"""Tests of experts.py: against a loop over tokens, and what it keeps for the backward pass.

bash tests/run.sh tests/models/test_experts.py
"""

import pytest
import torch
from torch.nn import functional as F

from models import experts
from models.experts import Experts, Groups

COUNT, WIDTH, HIDDEN = 8, 16, 24


def make(dtype=torch.float64):
    torch.manual_seed(0)
    layer = Experts(COUNT, WIDTH, HIDDEN).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return layer


def draw(n, each, allowed=COUNT, dtype=torch.float64):
    """x (n, D), chosen (n, K) among the first `allowed` experts, weights (n, K)."""
    rng = torch.Generator().manual_seed(n)
    chosen = torch.stack([torch.randperm(allowed, generator=rng)[:each] for _ in range(n)])
    x, weights = torch.randn(n, WIDTH, generator=rng), torch.rand(n, each, generator=rng)
    return x.to(dtype).requires_grad_(), chosen, weights.requires_grad_()


def by_token(layer, x, chosen, weights):
    """The plain way: each token, each of its experts."""
    gate, up, down = (each.weight for each in (layer.gate_proj, layer.up_proj, layer.down_proj))
    rows = []
    for token, row in enumerate(x):
        parts = [
            weight * (down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)))
            for e, weight in zip(chosen[token].tolist(), weights[token])
        ]
        rows.append(sum(parts))
    return torch.stack(rows).to(x.dtype)


def gradients(layer, inputs, result):
    torch.manual_seed(1)
    leaves = [*layer.parameters(), inputs[0], inputs[2]]
    return torch.autograd.grad((result * torch.randn(result.shape).to(result.dtype)).sum(), leaves)


CASES = {"some": (21, 3, COUNT), "one token": (1, 1, COUNT), "few experts": (9, 2, 3), "all of them": (5, COUNT, COUNT)}


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop_over_tokens(monkeypatch, case, kernel):
    """Values and every gradient, through segments and through torch's grouped product, which a CPU has, too."""
    dtype = torch.float32 if kernel else torch.float64  # torch's takes no float64
    if kernel:
        monkeypatch.setattr(experts, "has_kernel", alike)
    layer, inputs = make(dtype), draw(*CASES[case], dtype=dtype)
    got, want = layer(*inputs), by_token(layer, *inputs)
    close = 1e-6 if kernel else 1e-7  # the weights of the sum are float32
    assert (got - want).abs().max() < close * want.abs().max()
    for ours, plain in zip(gradients(layer, inputs, got), gradients(layer, inputs, want)):
        assert (ours - plain).abs().max() < close * max(1, plain.abs().max())


def alike(*tensors):
    """In place of has_kernel(): true where the shapes suit a card."""
    return all(tensor.shape[-1] % 8 == 0 for tensor in tensors)


def test_experts_without_tokens_cost_nothing():
    chosen = torch.tensor([[5, 2], [2, 6], [5, 2]])
    groups = Groups(chosen, COUNT)
    assert groups.spans() == [(2, slice(0, 3)), (5, slice(3, 5)), (6, slice(5, 6))]
    assert groups.ends.tolist() == [0, 0, 3, 3, 3, 5, 6, 6] and groups.ends.dtype == torch.int32


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept(frozen):
    """No stack, nor a view of one, which ZeRO-3 could not free; of frozen experts not their inputs either."""
    layer, inputs, kept = make().requires_grad_(not frozen), draw(21, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = layer(*inputs)
    stacks = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert not stacks & {tensor.untyped_storage().data_ptr() for tensor in kept}
    wide = [tensor for tensor in kept if tensor.shape == (63, WIDTH)]
    assert len(wide) == (0 if frozen else 2)  # the inputs of gate and up
    result.sum().backward()
    assert inputs[0].grad.any() and all((parameter.grad is None) == frozen for parameter in layer.parameters())


def test_no_kernel_on_a_cpu():
    assert not experts.has_kernel(torch.zeros(8, 8, dtype=torch.bfloat16))


def test_files_keep_a_tensor_for_each_expert():
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": make()}), "dense": torch.nn.Linear(2, 2)})
    names = experts.file_names(model)
    assert names["mlp.experts.up_proj.weight"] == [f"mlp.experts.{e}.up_proj.weight" for e in range(COUNT)]
    tensors = experts.split(model, dict(model.named_parameters()))
    assert len(tensors) == 2 + 3 * COUNT and "dense.weight" in tensors
    stack = model["mlp"]["experts"].down_proj.weight
    assert torch.equal(tensors["mlp.experts.3.down_proj.weight"], stack[3])
