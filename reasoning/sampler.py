"""LLaDA's sampler: a response starts as masks, and the most confident predictions are committed, block by block.

    --prompt TEXT -> the response on stdout; --in FILE --out FILE -> its rows with a "response"; --task NAME -> solved 93 of 200 (46.5%, ...)
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --prompt "Question: What is 7 + 5?"
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --in examples/prefs.jsonl --out responses.jsonl
    python generate.py --model examples/tiny --gen_length 40 --block_length 1 --task arithmetic --num 20

Each forward pass predicts c_i = argmax_v exp(z_iv) / (-log u_iv)^temperature, u ~ U(0, 1), at the block's masked
positions i and commits those where softmax(z_i)[c_i] is highest; the others stay masked (low-confidence remasking).
With guidance z = u + (cfg_scale + 1)(c - u), c the logits and u those without the prompt.
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py, token for token, but for these, which that leaves
to chance or to an accident of its code:
  * Noise and random confidence come from a CPU generator per response, not from the device's one.
  * Equal confidences are committed from left to right. (Under confidence_eos_eot_inf every eos has confidence 0.)
  * confidence_eos_eot_inf holds for eos at any temperature; there, at temperature 0 only.
  * A mask id in the prompt or predicted (a trained model predicts none) stays; there, later passes may fill it.
  * A response takes no further passes after a block with an end; its text, which is cut there, is the same.
--threshold is an approximation, in return for fewer passes: a pass commits every prediction at least that confident,
and always the surest, as if they did not depend on each other. Source: Fast-dLLM, arXiv 2505.22618.
B batch, P prompt tokens, L = P + gen_length, V vocabulary, N masked positions of the current block, over the batch.
"""

import contextlib
import hashlib
import math
from itertools import groupby
from typing import NamedTuple

import torch

from files import InputError
from models import families
from models.checkpoint import DTYPES, load_model
from models.tokenization import end_token_id, load_tokenizer, mask_token_id, response_tokenizer
from training import deepspeed_config, streaming


class Response(NamedTuple):
    text: str
    tokens: int  # before the end
    ended: bool  # by an eos or end-of-turn; if not, gen_length was too short


def check(sample):
    """Fill in steps, block_length and device in place; InputError for a value or a combination without a meaning."""
    if sample.block_length is None:
        sample.block_length = sample.gen_length
    if sample.threshold is None:
        sample.steps = sample.gen_length if sample.steps is None else sample.steps
    else:
        check_threshold(sample)
    for name in ("gen_length", "block_length", "batch_size", "steps"):
        if getattr(sample, name) is not None and getattr(sample, name) < 1:
            raise InputError(f"--{name} is {getattr(sample, name)}; expected at least 1")
    check_lengths(sample.steps, sample.gen_length, sample.block_length)
    for name, example in (("temperature", 0.7), ("cfg_scale", 0.5)):
        if not 0 <= getattr(sample, name) < math.inf:
            raise InputError(f"--{name} is {getattr(sample, name)}; expected 0 or more, for example --{name} {example}")
    if sample.confidence_eos_eot_inf and sample.remasking == "random":
        raise InputError(
            "--confidence_eos_eot_inf has no meaning with --remasking random, which ignores confidence; leave one out"
        )
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if sample.device not in ["auto"] + devices:
        raise InputError(f"--device is {sample.device!r}; this machine has {', '.join(devices)}")
    sample.device = ("cuda" if "cuda" in devices else "cpu") if sample.device == "auto" else sample.device


def check_threshold(sample):
    if not 0 < sample.threshold <= 1:
        raise InputError(
            f"--threshold is {sample.threshold}; expected more than 0 and at most 1, for example --threshold 0.9"
        )
    if sample.steps is not None:
        raise InputError(
            f"--steps {sample.steps} contradicts --threshold {sample.threshold}, which takes as many passes "
            "as the confidence asks for; leave one out"
        )
    if sample.remasking == "random":
        raise InputError(
            f"--threshold {sample.threshold} has no meaning with --remasking random, which ignores "
            "confidence; leave one out"
        )


def check_lengths(steps, gen_length, block_length):
    """steps: None where a threshold decides."""
    if gen_length % block_length:
        raise InputError(
            f"--gen_length {gen_length} is not a multiple of --block_length {block_length}; "
            f"try --block_length {math.gcd(gen_length, block_length)}"
        )
    blocks = gen_length // block_length
    if steps is not None and steps % blocks:
        raise InputError(
            f"--steps {steps} is not a multiple of the {blocks} blocks that --gen_length {gen_length} and "
            f"--block_length {block_length} make; try --steps {-(-steps // blocks) * blocks}"
        )


def row_generator(seed, key):
    """CPU randomness of one response; hashed, so that key 1 of seed 0 is not key 0 of seed 1."""
    digest = hashlib.sha256(f"generate|{seed}|{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # the CPU generator reads 32 bits


def predict(model, x, positions, P, mask_id, cfg_scale):
    """Logits (N, V) of x (B, L) at `positions` (N,), flat indices; guided away from those without the prompt."""
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
        noise = u.log_().neg_().log_().mul_(-temperature)  # the quotient's logarithm: two logs for an exp and a power,
        chosen.append(noise.add_(z).argmax(-1))  # and a z above 709 is not infinite
    return torch.cat(chosen)


def confidences(logits, chosen, counts, draws, sample, ends):
    """How sure each of `chosen` (N,) is, (N,): its probability without noise, or U(0, 1) where remasking is random.

    counts, draws: as in choose(). ends: ids that confidence_eos_eot_inf makes least sure. The probability is taken in the
    logits' dtype as in the original, but in float32 where a threshold is compared with it.
    """
    if sample.remasking == "random":
        drawn = [torch.rand(n, dtype=torch.float64, generator=draw) for n, draw in zip(counts, draws)]
        return torch.cat(drawn).to(logits.device)
    if sample.confidence_eos_eot_inf:
        logits = logits.index_fill(-1, ends, -torch.inf)  # they get 0, and the others share their probability
    if sample.threshold is not None:
        logits = logits.float()
    return logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]


@torch.no_grad()
def generate(model, prompts, sample, mask_id, eos=None, eot=None, keys=None):
    """Sample a response to each of prompts (B, P) int64, all of one length; returns ids (B, gen_length) int64.

    sample: SampleArguments after check(). eos, eot: ids that end a text; after the first, some ids may still be masks.
    keys: B numbers that key the noise with sample.seed (default 0..B-1), so that no response depends on its batch.
    """
    (B, P), device = prompts.shape, model.device
    draws = [row_generator(sample.seed, key) for key in (range(B) if keys is None else keys)]
    ends = torch.tensor(sorted({eos, eot} - {None}), dtype=torch.long, device=device)
    x = torch.full((B, P + sample.gen_length), mask_id, dtype=torch.long, device=device)  # (B, L)
    x[:, :P] = prompts
    settled = torch.zeros(B, dtype=torch.bool, device=device)  # (B,)
    for start in range(P, x.shape[1], sample.block_length):
        window = slice(start, start + sample.block_length)
        for commits in commits_per_pass(sample):
            rows = ((x[:, window] == mask_id).any(1) & ~settled).nonzero()[:, 0]  # those that this pass is for
            if not len(rows):
                break
            # 1. Predict the block's masked positions, and only those.
            part = x[rows]  # (R, L)
            block = part[:, window]  # (R, block_length)
            masked = block == mask_id
            owner, offset = masked.nonzero(as_tuple=True)  # (N,), (N,) in row order
            logits = predict(
                model, part, owner * part.shape[1] + start + offset, P, mask_id, sample.cfg_scale
            )  # (N, V)
            if sample.logits_eos_inf:
                logits[:, eos] = -torch.inf
            counts, row_draws = masked.sum(1).tolist(), [draws[row] for row in rows.tolist()]
            chosen = choose(logits, counts, row_draws, sample.temperature)  # (N,)
            # 2. Confidence, -inf where nothing is to be committed.
            sure = confidences(logits, chosen, counts, row_draws, sample, ends)  # (N,)
            confidence = torch.full(masked.shape, -torch.inf, dtype=sure.dtype, device=device)  # (R, block_length)
            confidence[masked] = sure
            # 3. Commit the most confident; a stable sort, so that ties fall the same way on any device.
            best = confidence.argsort(dim=-1, descending=True, stable=True)[:, :commits]  # (R, commits)
            commit = torch.zeros_like(masked).scatter_(1, best, True)
            if sample.threshold is not None:
                commit |= confidence >= sample.threshold
            x[rows, window] = torch.where(commit, block.masked_scatter(masked, chosen), block)
        # 4. A block that holds an end has settled the text: later blocks come after it.
        settled |= torch.isin(x[:, window], ends).any(1)
    return x[:, P:].to(prompts.device)


def commits_per_pass(sample):
    """Positions that each pass over a block commits (with a threshold: at least); their sum is block_length."""
    if sample.threshold is not None:
        return [1] * sample.block_length
    passes = sample.steps * sample.block_length // sample.gen_length
    share, extra = divmod(sample.block_length, passes)
    return [share + (step < extra) for step in range(min(passes, sample.block_length))]  # more would change nothing


@contextlib.contextmanager
def memory_of(device):
    """Lack of memory on `device` is a user's error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(f"{device} ran out of memory; lower --batch_size or add --device cpu") from None


def load(sample):
    """(model, tokenizer) of sample, after check(): the model in eval mode, its dtype and device as sample says."""
    tokenizer = load_tokenizer(sample.model_name_or_path, sample.trust_remote_code)
    with memory_of(sample.device):
        if sample.deepspeed:
            return streamed(sample), tokenizer
        model = load_model(
            sample.model_name_or_path,
            DTYPES[sample.use_mixed_precision],
            trust_remote_code=sample.trust_remote_code,
            shift_logits=sample.shift_logits,
            load_in_4bit=sample.load_in_4bit,
        )
        return model.eval().to(sample.device), tokenizer


def streamed(sample):
    """The model under ZeRO-3: each pass takes the weights over the bus once, whatever the batch, so --batch_size is to be large."""
    from training import engine  # deepspeed's import is slow, and nothing else here needs it

    pass
    if deepspeed_config.read_ds_config(sample.deepspeed)["zero_optimization"]["stage"] != 3:
        raise InputError(
            f"--deepspeed {sample.deepspeed}: sampling streams weights with ZeRO stage 3 only; leave it out, or name "
            "ds_configs/zero3_offload_4080.json"
        )
    ranks = engine.start()
    if ranks.world > 1 or ranks.device.type != sample.device.split(":")[0]:
        raise InputError(
            f"--deepspeed with --device {sample.device} on {ranks.world} rank(s): sampling streams to the one {ranks.device}"
        )
    model = streaming.load(sample, ranks)
    model.eval()  # an engine's returns nothing
    return model


def config_of(model):
    """The configuration of load()'s model; an engine's own is DeepSpeed's."""
    return getattr(model, "module", model).config


def respond(model, tokenizer, prompts, sample, *, keys=None, finished=lambda replies: None):
    """A Response to each of `prompts`, lists of ids; in batches of prompts of one length, so that nothing is padded.

    model, tokenizer: load()'s. sample: after check(). keys: ints that key each response's noise with sample.seed
    (default: its index). A text ends before the first eos or end-of-turn; special tokens are left out.
    finished: called after each batch with its {index: Response}.
    """
    model_config = config_of(model)
    mask_id = mask_token_id(model_config, tokenizer, sample.mask_token_id)
    eos, eot = (
        tokenizer.eos_token_id,
        end_token_id(tokenizer, "auto") if sample.end_token_id is None else sample.end_token_id,
    )
    most, needed = families.longest(model_config), max(map(len, prompts), default=0) + sample.gen_length
    if most and needed > most:
        raise InputError(
            f"{sample.model_name_or_path} reads at most {most} tokens; the longest prompt with --gen_length "
            f"{sample.gen_length} has {needed}"
        )
    decoder = response_tokenizer(sample.model_name_or_path, tokenizer, sample.trust_remote_code)
    keys = range(len(prompts)) if keys is None else keys
    responses = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: lack of memory shows at once
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        group = list(group)
        for rows in (group[first : first + sample.batch_size] for first in range(0, len(group), sample.batch_size)):
            ids = torch.tensor([prompts[i] for i in rows], dtype=torch.long)  # (B, P)
            with memory_of(sample.device):
                sampled = generate(model, ids, sample, mask_id, eos, eot, [keys[i] for i in rows]).tolist()
            for i, response in zip(rows, sampled):
                end = next((k for k, token in enumerate(response) if token in (eos, eot)), len(response))
                text = decoder.decode(response[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                responses[i] = Response(text, end, end < len(response))
            finished({i: responses[i] for i in rows})
    return responses
