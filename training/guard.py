"""Checks of a run's numbers: before the first step, of each gradient, of each evaluation.

runs/NAME/skipped.jsonl     a line for each pair of a step without a finite gradient: its index and line
"""

import math

import torch

from files import InputError

FIRST_STEP = {"bf16": 2e-2, "no": 1e-4}  # per token: how far the policy may be from the reference before the first step
IN_A_ROW = 3  # steps without a finite gradient that end a run
UNLEARNED = 0.5  # nats per token that chosen responses may lose against the reference before a warning


@torch.no_grad()
def check_reference(job, batch, dtype):
    """Raise InputError if the policy does not reproduce the stored scores: other weights, dtype, masks or tokens.

    batch: [(pair, epoch)] of this rank. Returns the largest gap per token on any rank.
    """
    largest = 0.0
    for item in batch:
        lengths = [len(response) for response in job.objective.packed[item[0]][1:]]
        scores = job.scores(job.objective.responses(item)[:2])
        for score, stored, n in zip(scores, job.objective.ref_scores(item), lengths):
            largest = max(largest, abs(float(score.sum()) - float(stored)) / n)
    gaps = job.ranks.gather(largest)
    if not all(gap <= FIRST_STEP[dtype] for gap in gaps):
        folder, mend = job.objective.reference.folder, job.objective.reference.mend
        raise InputError(
            f"{folder}: its scores differ from the policy's by {max(gaps):.2g} per token before the first step "
            f"(expected at most {FIRST_STEP[dtype]:.0e}); remove that folder and run: {mend}"
        )
    return max(gaps)


def poison(loss):
    """1, or NaN if the loss is not finite: loss * poison(loss) then has a NaN gradient, which DeepSpeed skips."""
    return torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Skips:
    """Steps without a finite gradient, which change no weight: lists their pairs, and refuses too many in a row."""

    def __init__(self, job, run):
        self.job, self.run, self.in_a_row = job, run, 0

    def see(self, step, norm, pieces):
        """Whether `step` (1-based) was skipped. norm: of its gradient. pieces: this rank's [(item, loss, scores)]."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        entries = [entry for rank in self.job.ranks.gather(self.evidence(step, pieces)) for entry in rank]
        culprits = [entry for entry in entries if not entry["finite"]] or entries
        if self.job.ranks.first:
            self.run.add(self.run.skipped_path, culprits)
        named = [f"pair {entry['pair']} (line {entry['line']} of {entry['source']})" for entry in culprits[:3]]
        others = " and others" if len(culprits) > 3 else ""
        words = f"step {step} has no finite gradient and is skipped: {', '.join(named)}{others}"
        if self.in_a_row >= IN_A_ROW:
            raise InputError(
                f"{words}, {self.in_a_row} in a row; {self.run.skipped_path} lists them all. If the weights "
                "overflow, use --use_mixed_precision no or a lower --learning_rate; if one pair overflows, leave it out"
            )
        if self.job.ranks.first:
            print(f"warning: {words} ({self.run.skipped_path})", flush=True)
        return True

    def evidence(self, step, pieces):
        """The lines of skipped.jsonl for this rank's pairs of the step."""
        packed, entries = self.job.objective.packed, []
        lines = packed.lines()
        for item, loss, scores in pieces:
            loss, sums = float(loss), [float(each.sum()) for each in scores]
            rows = item if isinstance(item, list) else [item]  # SFT: a micro-batch at once
            for index, _ in rows:
                entry = {"step": step, "pair": index, "line": int(lines[index]), "source": packed.file_of(index)}
                entry |= {"loss": plain(loss), "scores": [plain(each) for each in sums]}
                entries.append(entry | {"finite": all(map(math.isfinite, [loss, *sums]))})
        return entries


def plain(number):
    """A number that JSON can hold; None for NaN and infinities."""
    return number if math.isfinite(number) else None


def falling(now, before, tokens, beta):
    """Warnings about an evaluation's metrics, as sentences.

    now, before: metrics of this evaluation and of the one before it ({} if there is none). tokens: mean length of the
    chosen responses, 1 where rewards are per token, None where they have no reference.
    """
    warnings = []
    accuracy, interval = now.get("eval_rewards/accuracies"), now.get("eval_rewards/accuracies_ci95")
    lowest = before.get("eval_rewards/accuracies_ci95", [0.5])[0]
    if accuracy is not None and interval[1] < lowest:
        than = f"it was {before['eval_rewards/accuracies']:.3f}" if before else "below chance"
        warnings.append(
            f"held-out accuracy is {accuracy:.3f}, {than}: an earlier checkpoint is the better model; "
            "try a lower --learning_rate or a larger --beta"
        )
    chosen = now.get("eval_rewards/chosen")
    nats = 0.0 if chosen is None or tokens is None else -chosen / beta / tokens
    if nats > UNLEARNED:
        warnings.append(
            f"held-out chosen responses are {nats:.2f} nats per token less likely than under the reference: "
            "the model unlearns them, too; try a lower --learning_rate, a larger --beta or --sft_weight"
        )
    return warnings
