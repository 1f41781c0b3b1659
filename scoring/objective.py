"""What a training step scores, and the loss of those scores: a preference loss on a pair, SFT on a batch of rows.

margin = (S(w) - S_ref(w)) - (S(l) - S_ref(l)),  L = -log sigmoid(beta * margin)     (Rafailov et al., arXiv 2305.18290,
with S the stepwise denoising score of score.py). Noise and S_ref are replayed from disk. The losses: losses.py.

n response tokens, S states.
"""

import math

import numpy as np
import torch

import losses
from files import InputError, fingerprint
from scoring import noise, recipe, sft_noise
from scoring.states import response_states, tokens_of
from scoring.window import Piece

# TRL's names; SFT has the first alone
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def counts(args, states, sft_states=1):
    """(states of each response of a pair, those that carry the gradient); a third entry is of the chosen's SFT row."""
    if not 0 <= args.backprop_steps <= states:
        raise InputError(
            f"--backprop_steps is {args.backprop_steps}, expected at most the {states} states of a response (0: all)"
        )
    sft = [sft_states] if losses.has_nll(args) else []
    carrying = args.backprop_steps or states
    return [states, states, *sft], [carrying, carrying, *sft]


def split(packed, eval_fraction, seed):
    """(training, held out) pair indices, each (pairs,) int64. The prompts with the smallest hashes are held out.

    All pairs of a prompt are on the same side.
    """
    key = [fingerprint(packed[index][0], seed) for index in range(len(packed))]
    prompts = sorted(set(key))
    held_out = set(prompts[: math.ceil(eval_fraction * len(prompts))])
    is_held_out = np.array([name in held_out for name in key], bool)
    if is_held_out.all():
        raise InputError(f"{packed.folder}: --eval_fraction {eval_fraction} leaves no pair to train on")
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


class Stream:
    """The order of the training pairs, epoch after epoch without end, each with its own permutation: stream[place].

    With `lengths` (SFT) pairs of similar prompt length are next to each other in blocks of `block`, for little padding.
    """

    def __init__(self, train, seed, block=1, lengths=None):
        self.train, self.seed, self.block, self.lengths = train, seed, block, lengths
        self.epoch, self.order = None, None

    def __getitem__(self, place):
        """(pair index, epoch) at `place`."""
        epoch, offset = divmod(place, len(self.train))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.shuffle(np.random.default_rng([self.seed, epoch]))
        return int(self.order[offset]), epoch

    def shuffle(self, rng):
        """The order of one epoch: a permutation; with lengths sorted within pools of 32 blocks, the blocks permuted."""
        order = rng.permutation(self.train)
        if self.lengths is None:
            return order
        pool = 32 * self.block
        pools = np.split(order, range(pool, len(order), pool))
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        blocks = np.split(order, range(self.block, len(order), self.block))
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


class Objective:
    """What every objective has."""

    def set_baseline(self, items, score, device):
        """Score what the losses of `items` are measured against: nothing. Returns the tokens that took."""
        return 0

    def means(self, totals):
        """{metric: its mean} of tracking.Totals."""
        return {name: total / totals.pairs for name, total in zip(self.metrics, totals.metrics)}

    @property
    def sums(self):
        """The number of sums that measure() returns."""
        return len(self.metrics) + 1


class Preference(Objective):
    """A preference loss on pairs: a piece of work is (pair index, epoch).

    reference: the stored masks and scores, or None for a loss without them, whose masks are drawn here. sft: the noise
    of the chosen's SFT row.
    """

    least_tokens, noun = 0, "pairs"  # of a response; what work is counted in

    def __init__(self, args, noise_args, packed, reference, masking, sft=sft_noise.LLADA):
        self.args, self.noise, self.masking, self.sft = args, noise_args, masking, sft
        self.packed, self.reference = packed, reference
        self.metrics = METRICS
        self.lengths = None
        self.lines = packed.lines()
        self.terms, self.has_nll = losses.terms(args), losses.has_nll(args)
        self.leading = losses.leading(args.loss_type)
        self.counts, self.carrying = counts(args, recipe.state_count(noise_args), sft.states)

    def work(self, batch):
        """The pieces of work of a micro-batch [(pair, epoch)], each with its share of the loss."""
        return [(item, 1 / len(batch)) for item in batch]

    def piece(self, item, scale=1.0):
        """The Piece of a piece of work, which counts `scale` in the loss of a step."""
        return Piece(self.responses(item), self.loss(item), scale)

    def responses(self, item):
        """The States of chosen and rejected and, where a loss has_nll, the chosen's SFT row."""
        states = [self.response(item, side) for side in (0, 1)]
        if self.has_nll:
            states += sft_rows([item], self.packed, 0, self.noise.noise_seed, self.masking, self.sft)
        return states

    def response(self, item, side):
        """The States of chosen (side 0) or rejected (side 1)."""
        index, epoch = item
        prompt, *sides = self.packed[index]
        masked = self.masks(index, side, epoch % self.noise.noise_sets)
        states = recipe.replay(prompt, sides[side], masked, self.noise, self.masking, min(map(len, sides)))
        return states if self.carrying == self.counts else self.with_gradient_states(states, masked, item)

    def masks(self, index, side, noise_set):
        """masked (S, n) of a response, bool."""
        if self.reference:
            return self.reference.masks(index, side, noise_set)
        return recipe.draw(self.packed, index, side, self.noise, noise_set, self.masking.blocks)

    def with_gradient_states(self, states, masked, item):
        """`states` of which --backprop_steps carry the gradient.

        Drawn anew in each epoch, so that no noise set's gradient always comes from the same states; by the same numbers
        for both responses, so that the same states of both carry it.
        """
        (index, epoch), k = item, self.args.backprop_steps
        rng = noise.generator(self.noise.noise_seed, self.packed.content(index), "pair gradient", epoch)
        return states.carrying(noise.gradient_states(masked, states.weight, k, rng))

    def ref_scores(self, item):
        """S_ref of chosen and rejected, (2,) float32; 0 without a reference."""
        if not self.reference:
            return np.zeros(2, np.float32)
        index, epoch = item
        return self.reference.scores[epoch % self.noise.noise_sets][index].sum(-1)

    def response_tokens(self, item):
        """The numbers of tokens of chosen and rejected."""
        return [len(side) for side in self.packed[item[0]][1:]]

    def chosen_tokens(self, pairs):
        """Mean number of tokens of the chosen responses of `pairs`; 1 if rewards are per token.

        None where rewards have no reference, and so do not say how far the policy has moved.
        """
        if not self.leading.has_reference:
            return None
        return 1 if self.leading.is_per_token else float(np.diff(self.packed.bounds[pairs, 1:3]).mean())

    def loss(self, item):
        """The function from the pair's scores [S(w), S(l)(, -NLL)] to its loss."""
        ref, tokens = [float(score) for score in self.ref_scores(item)], self.response_tokens(item)

        def loss_of(scores):
            nll = -scores[2] if self.has_nll else None
            total = 0.0
            for loss, weight in self.terms:
                gains = map(loss.gain, scores, ref, tokens)
                total = total + weight * loss.function(losses.Pair(*gains, nll), self.args)
            return total

        return loss_of

    def measure(self, item, loss, scores):
        """The pair's METRICS, and 1 for the pair, (metrics + 1,) float64.

        rewards = beta * gain, of the loss, or of the first in a sum that is about both responses; logps are sums over
        the response.
        """
        chosen, rejected = policy = [states.sum().double() for states in scores[:2]]
        ref, tokens = map(float, self.ref_scores(item)), self.response_tokens(item)
        chosen_reward, rejected_reward = (self.args.beta * gain for gain in map(self.leading.gain, policy, ref, tokens))
        return numbers(
            loss,
            chosen_reward,
            rejected_reward,
            chosen_reward - rejected_reward,
            chosen_reward > rejected_reward,
            chosen,
            rejected,
            torch.ones_like(loss),
        )

    def entry(self, item, scores):
        """A pair's line of scores.jsonl: its index, its line in the source, each state's score of both responses.

        ref is None without a reference.
        """
        (index, epoch), ref = item, None
        policy = torch.stack(scores[:2]).double().cpu().numpy()  # (2, S)
        if self.reference:
            ref = finite(self.reference.scores[epoch % self.noise.noise_sets][index].astype(np.float64))  # (2, S)
        return {"pair": index, "line": int(self.lines[index]), "policy": finite(policy), "ref": ref}

    def tokens(self):
        """(pairs,) through the model for each pair."""
        prompt, chosen, rejected = np.diff(self.packed.bounds.astype(np.int64), axis=1).T
        states, *sft_states = self.counts[1:]
        rows = [(chosen, states), (rejected, states), *((chosen, count) for count in sft_states)]
        return sum(tokens_of(prompt, response, S, self.masking.blocks) for response, S in rows)


class SFT(Objective):
    """Masked-diffusion NLL of the chosen response: a piece of work is a micro-batch, whose rows are padded alike.

    sft: how the family draws its noise.
    """

    noun = "rows"

    def __init__(self, args, noise_args, packed, masking, sft=sft_noise.LLADA):
        self.args, self.noise, self.packed, self.masking, self.sft = args, noise_args, packed, masking, sft
        self.metrics = METRICS[:1]
        # Rows of a micro-batch have prompts of similar length. Their responses must not matter: if rows were alike in
        # prompt and response together, the padding would tell the model how long its response is.
        self.lengths = np.diff(packed.bounds[:, :2].astype(np.int64), axis=1)[:, 0]
        self.least_tokens = args.sft_pad_to

    def chosen_tokens(self, _):
        return 1

    def work(self, batch):
        return [(batch, 1.0)]

    def responses(self, item):
        return sft_rows(item, self.packed, self.args.sft_pad_to, self.noise.noise_seed, self.masking, self.sft)

    def piece(self, item, scale=1.0):
        return Piece(self.responses(item), self.loss(item), scale, slopes=[-1 / len(item)] * len(item))

    def loss(self, item):
        return lambda scores: -sum(scores) / len(item)

    def measure(self, item, loss, scores):
        return numbers(loss * len(item), torch.full_like(loss, len(item)))

    def tokens(self):
        """(pairs,) through the model for each row, before rows are padded to the longest of their micro-batch."""
        prompt, response, _ = np.diff(self.packed.bounds.astype(np.int64), axis=1).T
        return tokens_of(prompt, np.maximum(response, self.args.sft_pad_to), self.sft.states, self.masking.blocks)


def finite(array):
    """A 2-D array as lists of numbers with four decimals, for JSON; None where it is not finite."""

    def plain(value):
        return round(float(value), 4) + 0.0 if math.isfinite(value) else None  # + 0.0: no minus zero

    return [list(map(plain, row)) for row in array]


def numbers(*values):
    """Scalar tensors as one float64 tensor (values,), on their device: only logging waits for them."""
    return torch.stack([value.detach().double() for value in values])


def sft_rows(rows, packed, pad_to, noise_seed, masking, sft=sft_noise.LLADA):
    """[States] of SFT, one of each row (pair, epoch), with its own draw of noise; their score is -NLL per token.

    Responses are padded to `pad_to` tokens with end tokens that are masked and counted like any other token, so that
    the model learns to stop (LLaDA's GUIDELINES.md); rows of a bidirectional model all to the length of the longest.
    """
    pairs = [packed[index] for index, _ in rows]
    longest = max(len(prompt) + max(len(chosen), pad_to) for prompt, chosen, _ in pairs)
    made = []
    for (index, epoch), (prompt, chosen, _) in zip(rows, pairs):
        n = max(len(chosen), pad_to) if masking.blocks else longest - len(prompt)
        if masking.blocks and sft.fills_block:
            n += -(len(prompt) + n) % masking.blocks.size
        response = np.pad(chosen, (0, n - len(chosen)), constant_values=packed.meta["pad_token_id"])
        if sft.hides_prompt:
            prompt, response = prompt[:0], np.concatenate((prompt, response))
        rng = noise.generator(noise_seed, packed.content(index), "sft", epoch)
        divided = recipe.partition(len(prompt), len(response), masking.blocks)
        masked, weight = sft_noise.draw(len(response), rng, sft, **divided)
        made.append(response_states(prompt, response, masked, weight, *masking))
    return made
