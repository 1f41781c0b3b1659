"""A few numbers instead of a model's gradient: those by a factor on each channel of the output of each block.

    Sketch(model); .clear(); backward passes; .gradient() -> float32 (blocks * D,)

The factors are 1 + e with e = 0, so the model computes as before. Weights need no gradient: the price is a backward
pass through activations, with weights in any dtype, in 4 bits, or streamed.

D channels of a block's output.
"""

import torch

from files import InputError
from models import architecture


class Sketch:
    """Hooks on the blocks of `model`, to which they stay attached. Raises InputError for a model without blocks."""

    def __init__(self, model):
        self.blocks = architecture.block_modules(model)
        if not self.blocks:
            raise InputError(
                f"config.json: model_type {model.config.model_type} has no list of blocks, whose gradients a "
                "calibration compares; give --diffusion_steps a number"
            )
        self.factors = {}  # {block: e (D,) float32}
        for block in self.blocks:
            block.register_forward_hook(self.scale)

    def scale(self, block, _, output):
        """The hook: the block's output (..., D), or the first of its outputs, times 1 + e."""
        x = output[0] if isinstance(output, tuple) else output
        if block not in self.factors:
            self.factors[block] = torch.zeros(x.shape[-1], device=x.device, requires_grad=True)
        x = x * (1 + self.factors[block]).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def clear(self):
        """Forget the gradient of earlier backward passes."""
        for factor in self.factors.values():
            factor.grad = None

    def gradient(self):
        """The gradient by all factors that backward passes have added up since, (blocks * D,) on the host."""
        return torch.cat([self.factors[block].grad for block in self.blocks]).cpu()
