"""Bidirectional attention over rows of any length, end to end in one sequence: a token sees its own row alone.

So a forward pass needs no padding, and each linear layer takes all rows in one product. On a CUDA card it is torch's
variable-length flash attention; elsewhere each run of rows of equal length is a batch of SDPA, with the same result.

N tokens of all rows, B rows, H heads, G key/value heads, hd head width.
"""

import itertools

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "end_to_end"  # of this attention among transformers'


class Rows:
    """Where rows of these lengths stand in a sequence of N tokens.

    places (N,) int64: each token's place in its row. ends (B + 1,) int32: where rows begin and
    the last one ends, flash attention's cu_seq.
    """

    def __init__(self, lengths, device):
        self.lengths, self.longest = lengths, max(lengths)
        self.places = torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)
        ends = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
        self.ends = ends.to(device, non_blocking=True)

    def groups(self):
        """(start, rows, length) of each run of neighbours of equal length."""
        start = 0
        for length, group in itertools.groupby(self.lengths):
            count = len(list(group))
            yield start, count, length
            start += count * length


def attend(q, k, v, rows, scale=None):
    """Attention of each row to itself: q (1, H, N, hd), k and v (1, G, N, hd) -> (1, H, N, hd).

    scale: of the products, hd^-0.5 without one.
    """
    if has_flash(q):
        return flash(q, k, v, rows, scale)
    parts = []
    for start, count, length in rows.groups():
        span = slice(start, start + count * length)
        batch = [
            x[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v)
        ]  # (count, H, length, hd)
        out = F.scaled_dot_product_attention(*batch, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(out.transpose(0, 1).flatten(1, 2))  # (H, count * length, hd)
    return torch.cat(parts, 1)[None]


def has_flash(q):
    """Whether torch's flash attention takes a tensor: half precision, on a card from compute capability 8.0 on.

    Heads must be multiples of 8 wide and at most 256: unlike SDPA, variable-length attention does not pad them.
    """
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash(q, k, v, rows, scale):
    """attend() by torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, hd)
    out = varlen_attn(q, k, v, rows.ends, rows.ends, rows.longest, rows.longest, scale=scale)
    return out.transpose(0, 1)[None]


def in_transformers(module, query, key, value, attention_mask, rows=None, scaling=None, **options):
    """attend() with the signature that transformers calls; without `rows`, transformers' own SDPA attention."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return attend(query, key, value, rows, scaling).transpose(1, 2), None  # (1, N, H, hd)


AttentionInterface.register(NAME, in_transformers)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
