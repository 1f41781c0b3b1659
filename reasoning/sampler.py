"""LLaDA's sampler, of bidirectional models: a response starts as masks; passes commit the most confident predictions.

A response is filled block by block; commits.py says what a pass commits. With guidance, z = u + (cfg_scale + 1)(c - u):
c are the logits and u those without the prompt.
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py. The tokens are the same, except that
  * noise and random confidence come from one CPU generator per response, not from the device's generator;
  * equal confidences are committed from left to right (under confidence_eos_eot_inf every eos has confidence 0);
  * confidence_eos_eot_inf holds for eos at any temperature; in the original, at temperature 0 only;
  * a mask id in the prompt, or one that the model predicts, stays; in the original, later passes may fill it;
  * a response takes no further passes after a block with an end; its text, which is cut there, is the same.

respond() makes batches of prompts; generate() samples one batch, which blockwise.py does for a block-causal model.

B batch, P prompt tokens, L = P + gen_length, V vocabulary, R rows of the batch that need this pass, N masked positions
of the current block, over those rows.
"""

import contextlib
from itertools import groupby
from typing import NamedTuple

import torch

from cli.out_of_memory import OutOfMemory
from files import InputError
from models import families
from models.checkpoint import DTYPES, load_model
from models.tokenization import end_token_id, load_tokenizer, mask_token_id, response_tokenizer
from reasoning import blockwise
from reasoning.blockwise import blocks_of
from reasoning.commits import commits_per_pass, reveal, row_generator
from training import cards

# --- one batch --------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, prompts, sample, mask_id, eos=None, eot=None, keys=None):
    """Sample a response to each of prompts (B, P) int64, all of one length; returns ids (B, gen_length) int64.

    model: load()'s, bidirectional or block-causal. sample: SampleArguments after arguments.check(). eos, eot: ids that
    end a text; after the first, some ids may still be masks. keys: B numbers that key the noise with sample.seed
    (default 0..B-1), so that no response depends on its batch.
    """
    if blocks_of(model):
        return blockwise.generate(model, prompts, sample, mask_id, eos, eot, keys)
    (B, P), device = prompts.shape, model.device
    generators = [row_generator(sample.seed, key) for key in (range(B) if keys is None else keys)]
    ends = torch.tensor(sorted({eos, eot} - {None}), dtype=torch.long, device=device)
    x = torch.full((B, P + sample.gen_length), mask_id, dtype=torch.long, device=device)  # (B, L)
    x[:, :P] = prompts
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # (B,)
    for start in range(P, x.shape[1], sample.block_length):
        window = slice(start, start + sample.block_length)
        for commits in commits_per_pass(sample):
            # 1. Leave out rows whose block is full or whose text has ended.
            rows = ((x[:, window] == mask_id).any(1) & ~ended).nonzero()[:, 0]  # (R,)
            if not len(rows):
                break
            # 2. Predict the block's masked positions, and only those.
            part = x[rows]  # (R, L)
            block = part[:, window]  # (R, block_length)
            masked = block == mask_id
            row, offset = masked.nonzero(as_tuple=True)  # (N,), (N,) in row order
            positions = row * part.shape[1] + start + offset  # (N,)
            logits = predict(model, part, positions, P, mask_id, sample.cfg_scale)  # (N, V)
            if sample.logits_eos_inf:
                logits[:, eos] = -torch.inf
            # 3. Commit the most confident predictions.
            draws = [generators[i] for i in rows.tolist()]
            x[rows, window] = reveal(block, masked, logits, draws, commits, sample, ends)
        # 4. The text ends in the first block that holds an end.
        ended |= torch.isin(x[:, window], ends).any(1)
    return x[:, P:].to(prompts.device)


def predict(model, x, positions, P, mask_id, cfg_scale):
    """Logits (N, V) of x (R, L) at `positions` (N,), indices into x.flatten(), guided where cfg_scale is not 0."""
    if cfg_scale == 0:
        return model(input_ids=x, positions=positions).logits
    blind = x.clone()
    blind[:, :P] = mask_id
    both = model(input_ids=torch.cat((x, blind)), positions=torch.cat((positions, positions + x.numel()))).logits
    c, u = both.chunk(2)  # (N, V) each
    return u + (cfg_scale + 1) * (c - u)


# --- a model, and batches of prompts ----------------------------------------------------------------------


class Response(NamedTuple):
    text: str
    tokens: int  # before the end
    ended: bool  # by an eos or end-of-turn; if not, gen_length was too short


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

    if deepspeed_config.read_ds_config(sample.deepspeed)["zero_optimization"]["stage"] != 3:
        raise InputError(
            f"--deepspeed {sample.deepspeed}: sampling streams weights with ZeRO stage 3 only; leave it out, or name "
            "ds_configs/zero3_offload_4080.json"
        )
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
    return getattr(model, "module", model).config


@contextlib.contextmanager
def memory_of(device):
    """Turn a lack of memory on `device` into a user's error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(f"{device} ran out of memory; lower --batch_size or add --device cpu") from None


def batches(prompts, batch_size):
    """Lists of at most `batch_size` indices of `prompts` (lists of ids), of one length each, so that nothing is padded.

    The longest come first, so that a lack of memory shows at once.
    """

    def length(index):
        return len(prompts[index])

    by_length = groupby(sorted(range(len(prompts)), key=length, reverse=True), key=length)
    groups = [list(group) for _, group in by_length]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def most_passes(model, prompts, sample):
    """Forward passes that respond() needs at most; fewer where texts end early or a threshold is passed."""
    blocks, per_part = blocks_of(model), len(commits_per_pass(sample))
    total = 0
    for first, *_ in batches(prompts, sample.batch_size):
        start, end = 0, sample.gen_length
        if blocks:
            start, end = blockwise.span(len(prompts[first]), sample.gen_length, blocks)
            total += (end - start) // blocks.size * blocks.first_from_clean
        total += (end - start) // sample.block_length * per_part
    return total


def respond(model, tokenizer, prompts, sample, *, keys=None, finished=None):
    """A Response to each of `prompts`, lists of ids.

    model, tokenizer: load()'s. sample: after arguments.check(). keys: ints that key each response's noise with
    sample.seed (default: its index). finished: called after each batch with its {index: Response}.
    """
    check_longest(model, prompts, sample)
    mask_id = mask_token_id(config_of(model), tokenizer, sample.mask_token_id)
    eos, eot = tokenizer.eos_token_id, sample.end_token_id
    if eot is None:
        eot = end_token_id(tokenizer, "auto")
    decoder = response_tokenizer(sample.model_name_or_path, tokenizer, sample.trust_remote_code)
    keys = range(len(prompts)) if keys is None else keys
    responses = {}
    for batch in batches(prompts, sample.batch_size):
        ids = torch.tensor([prompts[i] for i in batch], dtype=torch.long)  # (B, P)
        with memory_of(sample.device):
            sampled = generate(model, ids, sample, mask_id, eos, eot, [keys[i] for i in batch]).tolist()
        replies = {i: decode(decoder, response, (eos, eot)) for i, response in zip(batch, sampled)}
        responses |= replies
        if finished:
            finished(replies)
    return [responses[i] for i in range(len(prompts))]


def check_longest(model, prompts, sample):
    """Refuse what has more positions than a model with learned ones."""
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
