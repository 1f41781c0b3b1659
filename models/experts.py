"""The experts of a layer as stacks of matrices, and the products of tokens with them, without a loop over tokens.

    experts = Experts(count, width, hidden)
    y = experts(x, chosen, weights)          # sum over a token's experts e of weights * down_e(silu(gate_e x) * up_e x)

Tokens are sorted by expert. Where torch's grouped product has a kernel (bf16 on cards of compute capability 9 and 10),
a stack is one call; elsewhere each expert with tokens is one product, and experts without tokens cost nothing. No token
is dropped, and an expert takes any number of them, so that a token's result does not depend on the others of its pass.

Checkpoints keep a tensor for each expert, experts.7.up_proj.weight; the model keeps the stack experts.up_proj.weight.
file_names() maps one to the other, so that ZeRO-3 gathers three tensors a layer, not 768.

n tokens, K experts of a token, E experts of a layer, D width, F width of an expert.
"""

import torch
from torch import nn
from torch.nn import functional as F

KERNELS = (9, 10)  # major compute capabilities for which torch builds its grouped product; elsewhere it loops and waits


class Groups:
    """The n * K pairs of a token and an expert, sorted by expert.

    chosen (n, K) int64 -> order (nK,): the pair at each sorted place; inverse (nK,): the sorted place of each pair;
    ends (E,) int32: where each expert's pairs end.
    """

    def __init__(self, chosen, count):
        self.each = chosen.shape[1]
        experts, self.order = chosen.flatten().sort(stable=True)
        self.inverse = torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=chosen.device)
        )
        every = torch.arange(count, device=chosen.device)
        self.ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        self.known = None

    def spans(self):
        """[(expert, slice of its sorted pairs)] of the experts that got a token. The host waits for the device once."""
        if self.known is None:
            ends = self.ends.tolist()
            starts = [0, *ends[:-1]]
            self.known = [
                (expert, slice(start, end)) for expert, (start, end) in enumerate(zip(starts, ends)) if start < end
            ]
        return self.known

    def spread(self, x):
        """x (n, D) -> each pair's token, sorted, (nK, D)."""
        return x[self.order // self.each]

    def collect(self, y):
        """Sorted pairs y (nK, D) -> the sum over each token's pairs, (n, D), always in the same order."""
        return y[self.inverse].unflatten(0, (-1, self.each)).sum(1)


class Spread(torch.autograd.Function):
    """Groups.spread, whose gradient is Groups.collect: no sum in an order that varies from run to run."""

    @staticmethod
    def forward(ctx, x, groups):
        ctx.groups = groups
        return groups.spread(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.groups.collect(grad), None


class Collect(torch.autograd.Function):
    """Groups.collect, whose gradient is Groups.spread."""

    @staticmethod
    def forward(ctx, y, groups):
        ctx.groups = groups
        return groups.collect(y)

    @staticmethod
    def backward(ctx, grad):
        return ctx.groups.spread(grad), None


def has_kernel(*tensors):
    """Whether torch's grouped product of these runs as one kernel.

    It wants bf16, rows and addresses at multiples of 16 bytes (torch 2.13, ATen/native/GroupedMMUtils.h).
    """
    if not all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in tensors):
        return False
    aligned = all(tensor.data_ptr() % 16 == 0 and tensor.shape[-1] % 8 == 0 for tensor in tensors)
    return aligned and torch.cuda.get_device_capability(tensors[0].device)[0] in KERNELS


def products(x, stack, groups, transposed):
    """Each row times its expert's matrix: x (nK, in), stack (E, out, in) -> (nK, out); transposed: (E, in, out)."""
    matrices = stack if transposed else stack.transpose(1, 2)  # (E, in, out)
    if has_kernel(x, stack):
        return torch._grouped_mm(x, matrices, offs=groups.ends)
    y = x.new_empty(len(x), matrices.shape[2])
    for expert, rows in groups.spans():
        torch.mm(x[rows], matrices[expert], out=y[rows])
    return y


def outer_products(grad, x, groups):
    """The gradient of a stack: grad (nK, out), x (nK, in) -> (E, out, in), 0 for experts without tokens."""
    if has_kernel(grad, x):
        return torch._grouped_mm(grad.t(), x, offs=groups.ends)
    stack = x.new_zeros(len(groups.ends), grad.shape[1], x.shape[1])
    for expert, rows in groups.spans():
        torch.mm(grad[rows].t(), x[rows], out=stack[expert])
    return stack


class GroupedProducts(torch.autograd.Function):
    """products(), with its gradient.

    The stack is read from its layer again in the backward pass, not saved: under ZeRO-3 it is gathered again, in 4 bits
    it is unpacked again (quantized.py). torch's own backward of the grouped product would keep a view of it.
    """

    @staticmethod
    def forward(ctx, x, weight, layer, groups):
        ctx.layer, ctx.groups = layer, groups
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return products(x, layer.matrices(), groups, transposed=False)

    @staticmethod
    def backward(ctx, grad):
        grad, (x,) = grad.contiguous(), ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = products(grad, ctx.layer.matrices(), ctx.groups, transposed=True)
        if ctx.needs_input_grad[1]:
            grad_weight = outer_products(grad, x, ctx.groups)
        return grad_x, grad_weight, None, None


class ExpertLinear(nn.Module):
    """A linear layer of every expert, without biases: weight (E, out, in). No nn.Linear, so LoRA leaves it alone."""

    def __init__(self, count, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))

    def matrices(self):
        return self.weight

    def forward(self, x, groups):
        """Sorted rows x (nK, in) -> (nK, out)."""
        return GroupedProducts.apply(x, self.weight, self, groups)


class Experts(nn.Module):
    """E multilayer perceptrons with SwiGLU; of each token K of them."""

    def __init__(self, count, width, hidden):
        super().__init__()
        self.count = count
        self.gate_proj = ExpertLinear(count, width, hidden)
        self.up_proj = ExpertLinear(count, width, hidden)
        self.down_proj = ExpertLinear(count, hidden, width)

    def forward(self, x, chosen, weights):
        """x (n, D), chosen (n, K) int64: each token's experts, weights (n, K) float32 -> (n, D)."""
        groups = Groups(chosen, self.count)
        pairs = Spread.apply(x, groups)  # (nK, D)
        h = F.silu(self.gate_proj(pairs, groups)) * self.up_proj(pairs, groups)  # (nK, F)
        h = (h * weights.flatten().gather(0, groups.order)[:, None]).to(x.dtype)  # in float32, rounded once
        return Collect.apply(self.down_proj(h, groups), groups)


def file_names(model):
    """{name of a stack: the names of its experts' tensors in checkpoints, in order}; {} for a model without experts."""
    names = {}
    for place, module in model.named_modules():
        if isinstance(module, Experts):
            for layer in ("gate_proj", "up_proj", "down_proj"):
                names[f"{place}.{layer}.weight"] = [f"{place}.{e}.{layer}.weight" for e in range(module.count)]
    return names


def split(model, tensors):
    """{name in the model: tensor} -> {name in checkpoints: tensor}, the stacks cut into their experts' matrices."""
    stacks, found = file_names(model), {}
    for name, tensor in tensors.items():
        found |= zip(stacks[name], tensor.unbind(0)) if name in stacks else {name: tensor}
    return found
