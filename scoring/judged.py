"""What a training step of KTO scores, and its loss: responses that are judged one by one, desirable or not.

gain = S - S_ref of a response,  kl = max(0, mean gain of responses beside prompts that they do not belong to)
L = w (1 - sigmoid(beta (gain - kl))) if desirable,  w (1 - sigmoid(beta (kl - gain))) if not       (arXiv 2402.01306)

kl carries no gradient: it is the mean over all ranks' rows of a step, or over all held-out rows of an evaluation. A row
of packed data holds its response in the place of a pair's chosen one, and such a mismatched response as rejected.
"""

import numpy as np
import torch
import torch.distributed as dist

import losses
from scoring import objective
from scoring.window import Piece


class Judged(objective.Preference):
    """KTO on judged responses: a piece of work is (row, epoch)."""

    noun = "rows"

    def __init__(self, args, noise_args, packed, reference, masking):
        super().__init__(args, noise_args, packed, reference, masking)
        self.metrics = (*objective.METRICS, "kl")
        self.labels = packed.labels()
        self.kl = torch.zeros(())  # of the step or the evaluation at work

    @property
    def sums(self):
        return len(self.metrics) + 2

    def piece(self, item, scale=1.0):
        return Piece([self.response(item, 0)], self.loss(item), scale)

    def set_baseline(self, items, score, device):
        """Find kl from the mismatched responses of this rank's `items` and those of the others.

        score: list of States -> their scores [(S,)], without a graph. This communicates: every rank must call it.
        Returns the tokens that went through the model.
        """
        states = [self.response(item, 1) for item in items]
        with torch.no_grad():
            scores = score(states)
        total = torch.tensor([0.0, len(items)], dtype=torch.float64, device=device)
        for item, each in zip(items, scores):
            total[0] += each.double().sum() - float(self.ref_scores(item)[1])
        dist.all_reduce(total)
        self.kl = (total[0] / total[1]).clamp(min=0).float()
        return sum(each.tokens for each in states)

    def loss(self, item):
        """The function from the row's scores [S] to its loss."""
        ref, is_desirable, kl = float(self.ref_scores(item)[0]), bool(self.labels[item[0]]), self.kl

        def loss_of(scores):
            return losses.kto(losses.Judgement(scores[0] - ref, kl, is_desirable), self.args)

        return loss_of

    def measure(self, item, loss, scores):
        """Sums of the metrics, and 1 for a desirable row and for any, (metrics + 2,) float64.

        rewards = beta * gain. A row is accurate if its gain is above kl and it is desirable, or neither.
        """
        logp, is_desirable = scores[0].sum().double(), bool(self.labels[item[0]])
        reward, kl = self.args.beta * (logp - float(self.ref_scores(item)[0])), self.kl.to(logp)
        good, bad = torch.ones_like(logp) * is_desirable, torch.ones_like(logp) * (not is_desirable)
        is_right = (reward > self.args.beta * kl) == is_desirable
        margin = torch.zeros_like(logp)  # means() takes the difference
        return objective.numbers(
            *(loss, reward * good, reward * bad, margin, is_right, logp * good, logp * bad, kl, good, good + bad)
        )

    def means(self, totals):
        *sums, desirable = totals.metrics
        counts = {"chosen": desirable, "rejected": totals.pairs - desirable}
        found = {}
        for name, total in zip(self.metrics, sums):
            count = counts.get(name.partition("/")[2], totals.pairs)
            found[name] = total / count if count else np.nan
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def entry(self, item, scores):
        """A row's line of scores.jsonl: its index, its line in the source, its label, each state's score."""
        index, epoch = item
        ref = self.reference.scores[epoch % self.noise.noise_sets][index, :1].astype(np.float64)  # (1, S)
        policy = scores[0].double().cpu().numpy()[None]
        row = {"pair": index, "line": int(self.lines[index]), "label": bool(self.labels[index])}
        return row | {"policy": objective.finite(policy), "ref": objective.finite(ref)}
