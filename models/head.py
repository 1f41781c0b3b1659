"""The output head where tokens are scored: log-probabilities of targets, from at most CHUNK_BYTES of logits at a time.

Only log p (N,) is kept of N hidden states and V words. The backward pass computes each chunk's logits again, so neither
pass holds an N x V array. The result is exact: chunks are rows, and a row's log-softmax needs no other row.

N scored positions, D width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

CHUNK_BYTES = 256 * 2**20  # of float32 logits; a bfloat16 model's backward pass holds half as much again, cast


def chunks(N, V):
    """Row slices of at most CHUNK_BYTES of float32 logits each, at least one row."""
    rows = max(1, CHUNK_BYTES // (4 * V))
    return [slice(first, min(first + rows, N)) for first in range(0, N, rows)]


def logits_of(x, weight, bias):
    """x W' + b in float32: x (N, D), weight (V, D), bias (V,) or None -> (N, V), a tensor of its own.

    On CUDA the products of a bfloat16 model, which are summed in float32 anyway, are not rounded to bfloat16: between 8
    and 16 its numbers are 1/16 apart. torch.mm has no out_dtype on a CPU.
    """
    if x.dtype == torch.bfloat16 and x.is_cuda:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    return F.linear(x, weight, bias).float()


class TargetLogps(torch.autograd.Function):
    """log_softmax(x W' + b)[target] in float32.

    x (N, D), weight (V, D), bias (V,) or None, targets (N,) int64 -> (N,) float32.
    Gradient: d logp_i / d logits_i = onehot(target_i) - softmax(logits_i).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        logps = torch.empty(len(x), dtype=torch.float32, device=x.device)  # (N,)
        norms = torch.empty_like(logps)  # (N,) log of each row's sum of exponentials
        for rows in chunks(len(x), len(weight)):
            logits = logits_of(x[rows], weight, bias)  # (chunk, V); changed in place from here on
            picked, top = logits.gather(1, targets[rows, None])[:, 0], logits.amax(1)
            norms[rows] = logits.sub_(top[:, None]).exp_().sum(1).log_() + top
            logps[rows] = picked - norms[rows]
            del logits  # before the next chunk's are made
        ctx.save_for_backward(x, targets, norms)
        # Held by reference, not saved: under ZeRO-3 they are empty until the backward pass gathers them again.
        ctx.weight, ctx.bias = weight, bias
        return logps

    @staticmethod
    def backward(ctx, grad):
        (x, targets, norms), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        for rows in chunks(len(x), len(weight)):
            logits = logits_of(x[rows], weight, bias)  # (chunk, V)
            slope = logits.sub_(norms[rows, None]).exp_()  # softmax
            slope.scatter_add_(1, targets[rows, None], slope.new_full((len(slope), 1), -1.0))
            slope = slope.mul_(-grad[rows, None])  # d loss / d logits
            if ctx.needs_input_grad[2]:
                grad_bias = slope.sum(0) if grad_bias is None else grad_bias.add_(slope.sum(0))
            slope = slope.to(x.dtype)
            if grad_x is not None:
                torch.mm(slope, weight, out=grad_x[rows])
            if ctx.needs_input_grad[1]:
                grad_weight = slope.t() @ x[rows] if grad_weight is None else grad_weight.addmm_(slope.t(), x[rows])
            del logits, slope
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None


class Head(nn.Linear):
    """The output projection. It is one module, so ZeRO-3 gathers its weight once for all chunks.

    An nn.Linear of another model, with a bias or without, becomes one by `linear.__class__ = Head` (architecture.py).
    """

    def __init__(self, width, words):
        super().__init__(width, words, bias=False)

    def forward(self, x, targets=None):
        """x (..., D) -> logits (..., V). With targets (N,), x (N, D) -> their log-probabilities (N,) float32."""
        return super().forward(x) if targets is None else TargetLogps.apply(x, self.weight, self.bias, targets)
