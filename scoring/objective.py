"""What one training step scores, and the loss it makes of the scores: DPO on a pair, SFT on a batch of rows.

margin = (S(w) - S_ref(w)) - (S(l) - S_ref(l)),  L = -log sigmoid(beta * margin)     (Rafailov et al., arXiv 2305.18290,
with S the stepwise denoising score of score.py). Noise and S_ref are replayed from disk. Another loss: preference_loss.

n response tokens, S states.
"""

import math

import numpy as np
import torch

from files import InputError, fingerprint
from scoring import noise, recipe
from scoring.losses import preference_loss
from scoring.states import States, response_states

# TRL's names; SFT has the first only
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def counts(args, states):
    """(states of each response of a pair, those that carry the gradient); a third is the SFT row of --sft_weight."""
    if not 0 <= args.backprop_steps <= states:
        raise InputError(
            f"--backprop_steps is {args.backprop_steps}, expected at most the {states} states of a response (0: all)"
        )
    extra = [1] if args.sft_weight else []
    return [states, states] + extra, [args.backprop_steps or states] * 2 + extra


def split(packed, eval_fraction, seed):
    """(train, held out) pair indices; a prompt is on one side only. The prompts with the smallest hashes are held out."""
    key = [fingerprint(packed[index][0], seed) for index in range(len(packed))]
    prompts = sorted(set(key))
    held = set(prompts[: math.ceil(eval_fraction * len(prompts))])
    train = np.array([index for index, name in enumerate(key) if name not in held], np.int64)
    if not len(train):
        raise InputError(f"{packed.folder}: --eval_fraction {eval_fraction} leaves no pair to train on")
    return train, np.array([index for index, name in enumerate(key) if name in held], np.int64)


class Stream:
    """Endless order of the training pairs: epoch after epoch, each a permutation of its own. A place in it is one number.

    With `lengths` (SFT), pairs of like prompt length stand together in blocks of `block`, so that little is padded.
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
        order = rng.permutation(self.train)
        if self.lengths is None:
            return order
        pool = 32 * self.block
        near = np.concatenate(
            [
                part[np.argsort(self.lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        blocks = np.split(near, range(self.block, len(near), self.block))
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


class Preference:
    """DPO on pairs: a piece of work is (pair index, epoch), scored by itself."""

    def __init__(self, args, noise_args, packed, reference, mask_id):
        self.args, self.noise, self.packed, self.reference, self.mask_id = args, noise_args, packed, reference, mask_id
        self.metrics, self.lengths, self.lines = METRICS, None, packed.lines()
        self.counts, self.carrying = counts(args, recipe.state_count(noise_args))

    def work(self, batch):
        """Pieces of a micro-batch [(pair, epoch)] that are scored one after the other, each with its share of the loss."""
        return [(item, 1 / len(batch)) for item in batch]

    def responses(self, item):
        """The States of chosen and rejected and, under sft_weight, the chosen's SFT row."""
        index, epoch = item
        prompt, *sides = self.packed[index]
        masks = self.reference.masks(index, epoch % self.noise.noise_sets)
        states = [recipe.replay(prompt, side, masked, self.noise, self.mask_id) for side, masked in zip(sides, masks)]
        if (
            self.carrying != self.counts
        ):  # drawn anew each epoch: no noise set's gradient rests on the same states for ever
            k, parts = self.args.backprop_steps, []
            for masked, side in zip(masks, states):  # by the same numbers: the same states of both
                rng = noise.generator(self.noise.noise_seed, self.packed.content(index), "pair gradient", epoch)
                parts.append(side.carrying(noise.gradient_states(masked, side.weight, k, rng), k))
            states = parts
        return states + (
            [sft_rows([item], self.packed, 0, self.noise.noise_seed, self.mask_id)] if self.args.sft_weight else []
        )

    def ref_scores(self, item):
        """S_ref of chosen and rejected, (2,) float32."""
        index, epoch = item
        return self.reference.scores[epoch % self.noise.noise_sets][index].sum(-1)

    def per(self, item):
        """What the scores of chosen and rejected are divided by: sums over the response count, but for ipo, whose target
        1 / (2 beta) is meant for means over its tokens."""
        return [len(side) for side in self.packed[item[0]][1:]] if self.args.loss_type == "ipo" else [1, 1]

    def chosen_tokens(self, pairs):
        """Mean tokens of the chosen of `pairs`; 1 where rewards are per token."""
        return 1 if self.args.loss_type == "ipo" else float(np.diff(self.packed.bounds[pairs, 1:3]).mean())

    def loss(self, item):
        """The function from the pair's scores [S(w), S(l)(, -NLL)] to its loss."""
        ref_scores, tokens = [float(score) for score in self.ref_scores(item)], self.per(item)

        def of(scores):
            chosen, rejected = ((score - ref) / n for score, ref, n in zip(scores, ref_scores, tokens))
            loss = preference_loss(chosen - rejected, self.args.beta, self.args.loss_type, self.args.label_smoothing)
            return loss - self.args.sft_weight * scores[2] if self.args.sft_weight else loss

        return of

    def measure(self, item, loss, scores):
        """The pair's METRICS, and 1 for the pair; rewards = beta * (policy - reference), of the loss's scores (ipo: per token);
        logps summed per completion."""
        logps = [state.sum().double() for state in scores[:2]]
        rewards = [
            self.args.beta * (logp - float(ref)) / n
            for logp, ref, n in zip(logps, self.ref_scores(item), self.per(item))
        ]
        return numbers(loss, *rewards, rewards[0] - rewards[1], rewards[0] > rewards[1], *logps, torch.ones_like(loss))

    def entry(self, item, scores):
        """What scores.jsonl has of a pair: its place, its line in the source, each state's score of [chosen, rejected], the reference's."""
        index, epoch = item
        policy = torch.stack(scores[:2]).double().cpu().numpy()  # (2, S)
        return {
            "pair": index,
            "line": int(self.lines[index]),
            "policy": finite(policy),
            "ref": finite(self.reference.scores[epoch % self.noise.noise_sets][index].astype(np.float64)),
        }

    def tokens(self):
        """(pairs,) through the model for each pair."""
        prompt, chosen, rejected = np.diff(self.packed.bounds.astype(np.int64), axis=1).T
        return self.counts[0] * (2 * prompt + chosen + rejected) + bool(self.args.sft_weight) * (prompt + chosen)


class SFT:
    """Masked-diffusion NLL of the chosen response: a piece of work is a whole micro-batch, scored in one forward."""

    def __init__(self, args, noise_args, packed, mask_id):
        self.args, self.noise, self.packed, self.mask_id = args, noise_args, packed, mask_id
        self.metrics = METRICS[:1]
        # Rows of a micro-batch have prompts of like length. Their responses must not matter: were rows alike in prompt and
        # response together, the room after a prompt would tell the model how long its response is, which it must not know.
        self.lengths = np.diff(packed.bounds[:, :2].astype(np.int64), axis=1)[:, 0]
        self.counts = self.carrying = [1]  # one backward pass, however many rows

    def chosen_tokens(self, _):
        return 1

    def work(self, batch):
        return [(batch, 1.0)]

    def responses(self, item):
        return [sft_rows(item, self.packed, self.args.sft_pad_to, self.noise.noise_seed, self.mask_id)]

    def loss(self, item):
        return lambda scores: -scores[0] / len(item)

    def measure(self, item, loss, scores):
        return numbers(loss * len(item), torch.full_like(loss, len(item)))

    def tokens(self):
        """(pairs,) through the model for each row, before rows are padded to the longest beside them."""
        prompt, response, _ = np.diff(self.packed.bounds.astype(np.int64), axis=1).T
        return prompt + np.maximum(response, self.args.sft_pad_to)


def finite(array):
    """An array as lists of numbers with four decimals; None for what JSON has no number for."""
    return [[round(float(value), 4) + 0.0 if math.isfinite(value) else None for value in row] for row in array]


def numbers(*values):
    """Scalar tensors as one float64 tensor, left on the device: only what is logged is waited for."""
    return torch.stack([value.detach().double() for value in values])


def sft_rows(rows, packed, pad_to, noise_seed, mask_id):
    """States of SFT: one row per (pair, epoch), one draw of noise each; its score is minus the NLL per response token.

    Responses are padded to `pad_to` tokens, and to the longest row, with end tokens that are masked and counted like any
    other, so that the model learns to stop (LLaDA's GUIDELINES.md).
    """
    pairs = [packed[index] for index, _ in rows]
    length = max(len(prompt) + max(len(chosen), pad_to) for prompt, chosen, _ in pairs)
    parts = []
    for (index, epoch), (prompt, chosen, _) in zip(rows, pairs):
        padding = length - len(prompt) - len(chosen)
        response = np.pad(chosen, (0, padding), constant_values=packed.meta["pad_token_id"])
        masked, weight = noise.sft_noise(
            len(response), noise.generator(noise_seed, packed.content(index), "sft", epoch)
        )
        parts.append(response_states(prompt, response, masked[None], weight[None], mask_id))
    return States(*(np.concatenate(arrays) for arrays in zip(*(part[:3] for part in parts))))
