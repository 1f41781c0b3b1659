"""LLaDA's sampler: a response starts as masks; each pass commits the most confident predictions, block by block.

A forward pass predicts c_i = argmax_v exp(z_iv) / (-log u_iv)^temperature, u ~ U(0, 1), at the block's masked positions
i. It commits those with the highest softmax(z_i)[c_i]; the others stay masked (low-confidence remasking).
With guidance, z = u + (cfg_scale + 1)(c - u): c are the logits and u those without the prompt.
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py. The tokens are the same, except that
  * noise and random confidence come from one CPU generator per response, not from the device's generator;
  * equal confidences are committed from left to right (under confidence_eos_eot_inf every eos has confidence 0);
  * confidence_eos_eot_inf holds for eos at any temperature; in the original, at temperature 0 only;
  * a mask id in the prompt, or one that the model predicts, stays; in the original, later passes may fill it;
  * a response takes no further passes after a block with an end; its text, which is cut there, is the same.
A threshold is an approximation that takes fewer passes: each commits every prediction at least that confident, and
always the most confident one, as if they were independent. Source: Fast-dLLM, arXiv 2505.22618.

respond() makes batches of prompts, generate() samples one batch, predict() is its forward pass. A sampler with a cache
replaces predict(); what is chosen, how sure it is and what is committed do not depend on where the logits come from.

B batch, P prompt tokens, L = P + gen_length, V vocabulary, R rows of the batch that need this pass, N masked positions
of the current block, over those rows.
"""

import contextlib
import hashlib
from itertools import groupby
from typing import NamedTuple

import torch

from cli.out_of_memory import OutOfMemory
from files import InputError
from models import families
from models.checkpoint import DTYPES, load_model
from models.tokenization import end_token_id, load_tokenizer, mask_token_id, response_tokenizer
from training import cards

# --- one batch --------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, prompts, sample, mask_id, eos=None, eot=None, keys=None):
    """Sample a response to each of prompts (B, P) int64, all of one length; returns ids (B, gen_length) int64.

    sample: SampleArguments after arguments.check(). eos, eot: ids that end a text; after the first, some ids may still
    be masks. keys: B numbers that key the noise with sample.seed (default 0..B-1), so that no response depends on its
    batch.
    """
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
            counts, draws = masked.sum(1).tolist(), [generators[i] for i in rows.tolist()]
            chosen = choose(logits, counts, draws, sample.temperature)  # (N,)
            # 3. Commit the most confident predictions.
            sure = confidences(logits, chosen, counts, draws, sample, ends)  # (N,)
            confidence = torch.full(masked.shape, -torch.inf, dtype=sure.dtype, device=device)  # (R, block_length)
            confidence[masked] = sure
            commit = most_confident(confidence, commits, sample.threshold)
            x[rows, window] = torch.where(commit, block.masked_scatter(masked, chosen), block)
        # 4. The text ends in the first block that holds an end.
        ended |= torch.isin(x[:, window], ends).any(1)
    return x[:, P:].to(prompts.device)


def commits_per_pass(sample):
    """Positions that each pass over a block commits (with a threshold: at least); their sum is block_length."""
    if sample.threshold is not None:
        return [1] * sample.block_length
    passes = sample.steps * sample.block_length // sample.gen_length
    share, extra = divmod(sample.block_length, passes)
    return [share + (1 if step < extra else 0) for step in range(min(passes, sample.block_length))]


def row_generator(seed, key):
    """CPU randomness of one response; hashed, so that key 1 of seed 0 is not key 0 of seed 1."""
    digest = hashlib.sha256(f"generate|{seed}|{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # the CPU generator reads 32 bits


def predict(model, x, positions, P, mask_id, cfg_scale):
    """Logits (N, V) of x (R, L) at `positions` (N,), indices into x.flatten(), guided where cfg_scale is not 0."""
    if cfg_scale == 0:
        return model(input_ids=x, positions=positions).logits
    blind = x.clone()
    blind[:, :P] = mask_id
    both = model(input_ids=torch.cat((x, blind)), positions=torch.cat((positions, positions + x.numel()))).logits
    c, u = both.chunk(2)  # (N, V) each
    return u + (cfg_scale + 1) * (c - u)


def choose(logits, counts, draws, temperature):
    """The predicted id (N,) of each row of logits (N, V): the argmax, at a temperature that of exp(z) / (-log u)^T.

    counts, draws: for each batch row, how many of the N are its own, and its generator.
    """
    if temperature == 0:
        return logits.argmax(-1)
    chosen = []
    for z, draw in zip(logits.split(counts), draws):  # row by row: float64 over V is large, and each has its own noise
        u = torch.rand(z.shape, dtype=torch.float64, generator=draw).to(z.device)  # on the CPU: the same on any device
        noise = u.log_().neg_().log_().mul_(-temperature)  # log of (-log u)^-T, so that a z above 709 is not infinite
        chosen.append(noise.add_(z).argmax(-1))
    return torch.cat(chosen)


def confidences(logits, chosen, counts, draws, sample, ends):
    """How sure each of `chosen` (N,) is, (N,): its probability without noise, or U(0, 1) where remasking is random.

    counts, draws: as in choose(). ends: ids that confidence_eos_eot_inf makes least sure. The probability is taken in
    the logits' dtype as in the original, but in float32 where a threshold is compared with it.
    """
    if sample.remasking == "random":
        drawn = [torch.rand(n, dtype=torch.float64, generator=draw) for n, draw in zip(counts, draws)]
        return torch.cat(drawn).to(logits.device)
    if sample.confidence_eos_eot_inf:
        logits = logits.index_fill(-1, ends, -torch.inf)  # they get 0, and the others share their probability
    if sample.threshold is not None:
        logits = logits.float()
    return logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]


def most_confident(confidence, commits, threshold):
    """Which positions to commit, (R, block_length): the `commits` highest, and all that are at least `threshold`."""
    order = confidence.argsort(dim=-1, descending=True, stable=True)  # stable: ties fall the same way on any device
    commit = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, order[:, :commits], True)
    return commit if threshold is None else commit | (confidence >= threshold)


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


def most_passes(prompts, sample):
    """Forward passes that respond() needs at most; fewer where texts end early or a threshold is passed."""
    passes = sample.gen_length if sample.steps is None else min(sample.steps, sample.gen_length)
    return len(batches(prompts, sample.batch_size)) * passes


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
