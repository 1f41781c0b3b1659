"""Responses of a model to prompts, by the sampler of its kind: bidirectional.py or blockwise.py.

    model, tokenizer = load(sample)
    responses = respond(model, tokenizer, prompts, sample)      batches of any lengths, see passes.py

B prompts, P prompt tokens.
"""

import functools
import heapq
import random
import sys
from collections import deque
from typing import NamedTuple

import torch

from cli.out_of_memory import OutOfMemory
from files import InputError
from models import families
from models.architecture import bare
from models.checkpoint import DTYPES, load_model
from models.tokenization import end_token_id, load_tokenizer, mask_token_id, response_tokenizer
from reasoning import arguments, bidirectional, blockwise, passes
from reasoning.commits import commits_per_pass, row_generator
from training import cards, memory, sampling_memory

ONE_LENGTH = 8  # --batch_size auto of models whose rows must have one length: few prompts of a file do
# --- a model ----------------------------------------------------------------------------------------------


def load(sample):
    """(model, tokenizer) of `sample` after arguments.check(): the model in eval mode, its dtype and device as given."""
    tokenizer = load_tokenizer(sample.model_name_or_path, sample.trust_remote_code)
    if sample.deepspeed:
        return streamed(sample), tokenizer
    with cards.loading(sample.model_name_or_path):
        model = load_model(
            sample.model_name_or_path,
            DTYPES[sample.use_mixed_precision],
            trust_remote_code=sample.trust_remote_code,
            shift_logits=sample.shift_logits,
            load_in_4bit=sample.load_in_4bit,
            block_size=sample.block_size,
        )
        return model.eval().to(sample.device), tokenizer


def streamed(sample):
    """The model under ZeRO-3: each forward pass takes the weights over the bus once, whatever the batch."""
    from training import deepspeed_config, engine, streaming  # deepspeed's import is slow, and nothing else needs it

    deepspeed_config.read_for_sampling(sample.deepspeed)
    ranks = engine.start()
    if ranks.world > 1 or ranks.device.type != sample.device.split(":")[0]:
        raise InputError(
            f"--deepspeed with --device {sample.device} on {ranks.world} rank(s): sampling streams to one "
            f"{ranks.device}"
        )
    model = streaming.load(sample, ranks)
    model.eval()  # an engine's returns nothing
    return model


def config_of(model):
    """The configuration of load()'s model; an engine's own is DeepSpeed's."""
    return bare(model).config


def blocks_of(model):
    """The families.Blocks of load()'s model; None if it is bidirectional."""
    return bare(model).blocks


# --- responses --------------------------------------------------------------------------------------------


class Response(NamedTuple):
    text: str
    tokens: int  # before the end
    ended: bool  # by an eos or end-of-turn; if not, gen_length was too short


def generate(model, prompts, sample, mask_id, eos=None, eot=None, keys=None):
    """Sample a response to each of prompts (B, P) int64, in one batch; returns ids (B, gen_length) int64.

    model: load()'s. sample: SampleArguments after arguments.check(). eos, eot: ids that end a text; after the first,
    some ids may still be masks. keys: B numbers that key the noise with sample.seed (default 0..B-1), so that no
    response depends on its batch.
    """
    special = special_ids(mask_id, eos, eot)
    rows = prompts.cpu()
    keys = range(len(rows)) if keys is None else keys
    filled = dict(sum(fill(model, list(rows), sample, special, keys, len(rows)), []))
    return torch.stack([filled[index] for index in range(len(rows))]).to(prompts.device)


def special_ids(mask_id, eos, eot):
    return passes.Special(mask_id, torch.tensor(sorted({eos, eot} - {None}), dtype=torch.long), eos)


@torch.no_grad()
def fill(model, prompts, sample, special, keys, size, pace=None):
    """Yields [(index, ids (gen_length,))] as responses to prompts, (P,) int64 each, end; at most `size` at a time.

    If a pass runs out of memory, half as many go on together; those that it stopped begin again.
    """
    order = order_of(model, prompts)
    waiting = deque(order)
    longest = longest_row(model, prompts, sample)
    if pace:
        pace.begin([len(prompts[index]) + sample.gen_length for index in order], size)
    while waiting:
        made = passes.Passes(model, sample, special, size, longest)
        start = functools.partial(begin, model, prompts, sample, special, keys)
        try:
            yield from passes.run(made, waiting, start, pace)
        except torch.OutOfMemoryError:
            if size == 1:
                raise OutOfMemory(f"{sample.device} ran out of memory with one response; add --device cpu") from None
            size = size // 2
            if pace:
                pace.shrank(size)
            print(f"warning: out of memory; going on with --batch_size {size}", file=sys.stderr, flush=True)


def begin(model, prompts, sample, special, keys, index):
    """The passes.Flight of a response."""
    generator, blocks = row_generator(sample.seed, keys[index]), blocks_of(model)
    if blocks:
        filling = blockwise.fill(prompts[index], sample, special, generator, blocks)
    else:
        is_shifted = bare(model).is_shifted
        filling = bidirectional.fill(prompts[index], sample, special, generator, int(is_shifted))
    return passes.Flight(index, filling, generator)


def order_of(model, prompts):
    """The order in which responses begin: the longest prompt, so that a lack of memory shows at once, then mixed.

    Mixed, they end at a steady rate. A model whose rows must have one length gets them by length.
    """
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    if not bare(model).joins_rows:
        return sorted(order, key=lambda index: -len(prompts[index]))
    longest = max(order, key=lambda index: len(prompts[index]), default=0)
    return sorted(order, key=lambda index: index != longest)


def longest_row(model, prompts, sample):
    """Tokens of the longest row."""
    blocks = blocks_of(model)
    lengths = {len(prompt) for prompt in prompts}
    if blocks:
        return max(blockwise.span(P, sample.gen_length, blocks)[1] for P in lengths)
    return max(lengths) + sample.gen_length


def most_passes(model, prompts, sample, size):
    """Forward passes that `size` responses at a time need at most; fewer where texts end early or are sure."""
    blocks, per_part = blocks_of(model), len(commits_per_pass(sample))
    slots = [0] * size
    for index in order_of(model, prompts):
        needed, (start, end) = 0, (0, sample.gen_length)
        if blocks:
            start, end = blockwise.span(len(prompts[index]), sample.gen_length, blocks)
            needed = (end - start) // blocks.size * blocks.first_from_clean
        heapq.heapreplace(slots, slots[0] + needed + (end - start) // sample.block_length * per_part)
    return max(slots)


def respond(model, tokenizer, prompts, sample, *, keys=None, finished=None, pace=None):
    """A Response to each of `prompts`, lists of ids.

    model, tokenizer: load()'s. sample: after arguments.check(). keys: what keys each response's noise with
    sample.seed (default: its index). finished: called with {index: Response} of those that end, in any order. pace:
    told how sampling goes (pace.py).
    """
    if not prompts:
        return []
    check_model(model, prompts, sample)
    mask_id = mask_token_id(config_of(model), tokenizer, sample.mask_token_id)
    eos, eot = tokenizer.eos_token_id, sample.end_token_id
    if eot is None:
        eot = end_token_id(tokenizer, "auto")
    decoder = response_tokenizer(sample.model_name_or_path, tokenizer, sample.trust_remote_code)
    keys = range(len(prompts)) if keys is None else keys
    ids, size = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts], batch_size(model, prompts, sample)
    responses = {}
    for ended in fill(model, ids, sample, special_ids(mask_id, eos, eot), keys, size, pace):
        replies = {index: decode(decoder, filled.tolist(), (eos, eot)) for index, filled in ended}
        responses |= replies
        if finished:
            finished(replies)
    return [responses[index] for index in range(len(prompts))]


def batch_size(model, prompts, sample):
    """How many responses are filled at a time. auto: as memory has room, or few of a model that cannot join rows."""
    size = sample.batch_size
    if size == "auto" and not bare(model).joins_rows:
        size = ONE_LENGTH
    elif size == "auto":
        shape = sampling_memory.sampled_shape(config_of(model), sample)
        _, free = memory.memory_now(torch.device(sample.device))
        size = sampling_memory.batch_rows(shape, sample, longest_row(model, prompts, sample), free)
    return min(size, len(prompts))


def check_model(model, prompts, sample):
    """Refuse what has more positions than a model with learned ones, and a cache where rows must have one length."""
    if not bare(model).joins_rows:  # of models with sliding windows, only known now
        arguments.refuse_cache(sample, config_of(model).model_type)
    longest = families.longest(config_of(model))
    needed = max(map(len, prompts), default=0) + sample.gen_length
    if longest and needed > longest:
        raise InputError(
            f"{sample.model_name_or_path} reads at most {longest} tokens; the longest prompt with --gen_length "
            f"{sample.gen_length} has {needed}"
        )


def decode(decoder, ids, ends):
    """The Response of sampled ids: it ends before the first of `ends`; special tokens are left out."""
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = decoder.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(text, length, length < len(ids))
