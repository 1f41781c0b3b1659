"""Wrong numbers stop a run, and say where: before the first step, in a step without a finite gradient, in an evaluation that falls apart.

runs/NAME/skipped.jsonl     a line for each pair (its place and its line in the source) that made a step's numbers unusable
"""

import math

import torch

from files import InputError

FIRST = {"bf16": 2e-2, "no": 1e-4}  # |policy - reference| per token that a first step may show
IN_A_ROW = 3  # steps without a finite gradient that end a run
SUNK = 0.5  # nats per token that chosen responses may lose against the reference before it is said


@torch.no_grad()
def check_reference(job, batch, dtype):
    """Refuse to start if the policy does not reproduce the stored scores of `batch`: other weights, dtype, masks or tokens."""
    worst = 0.0
    for item in batch:
        lengths = [len(side) for side in job.objective.packed[item[0]][1:]]
        for states, want, n in zip(job.objective.responses(item), job.objective.ref_scores(item), lengths):
            got = job.scores(states).sum()
            worst = max(worst, abs(float(got) - float(want)) / n)
    gaps = job.ranks.gather(worst)
    if not all(gap <= FIRST[dtype] for gap in gaps):
        folder, mend = job.objective.reference.folder, job.objective.reference.mend
        raise InputError(
            f"{folder}: its scores differ from the policy's by {max(gaps):.2g} per token before the first step "
            f"(at most {FIRST[dtype]:.0e} expected); remove that folder and run: {mend}"
        )
    return max(gaps)


def poison(loss):
    """1, or not-a-number for a loss that is not finite: times the loss it makes the gradient so, too, which DeepSpeed then skips."""
    return torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Skips:
    """Steps whose gradient was not finite, which changed no weight: written down, counted, and too many in a row refused."""

    def __init__(self, job, run, count):
        self.job, self.run, self.count, self.row = job, run, count, 0

    def see(self, step, norm, pieces):
        """Whether step (1-based) was skipped. norm: its gradient's. pieces: this rank's [(item, loss, scores)]."""
        if math.isfinite(norm):
            self.row = 0
            return False
        self.count, self.row = self.count + 1, self.row + 1
        found = sum(self.job.ranks.gather(self.evidence(step, pieces)), [])
        bad = [entry for entry in found if entry["finite"] is False] or found
        if self.job.ranks.first:
            self.run.add(self.run.skipped_path, bad)
        where = ", ".join(f"pair {entry['pair']} (line {entry['line']} of {entry['source']})" for entry in bad[:3])
        said = f"step {step} has no finite gradient and is skipped: {where}{' and others' if len(bad) > 3 else ''}"
        if self.row >= IN_A_ROW:
            raise InputError(
                f"{said}, {self.row} in a row; {self.run.skipped_path} has them all. Weights that overflow want "
                "--use_mixed_precision no or a lower --learning_rate; a pair that does, to be left out"
            )
        if self.job.ranks.first:
            print(f"warning: {said} ({self.run.skipped_path})", flush=True)
        return True

    def evidence(self, step, pieces):
        packed, entries = self.job.objective.packed, []
        lines = packed.lines()
        for item, loss, scores in pieces:
            sums, loss = [float(each.sum()) for each in scores], float(loss)
            for index, _ in item if isinstance(item, list) else [item]:  # SFT: a micro-batch at once
                entries.append(
                    {
                        "step": step,
                        "pair": index,
                        "line": int(lines[index]),
                        "source": packed.meta.get("source"),
                        "loss": plain(loss),
                        "scores": [plain(each) for each in sums],
                        "finite": all(map(math.isfinite, [loss, *sums])),
                    }
                )
        return entries


def plain(number):
    """A number as JSON knows it; null for what is none."""
    return number if math.isfinite(number) else None


def falling(now, before, tokens, beta):
    """What to say of an evaluation's metrics, given those of the one before (or {}): sentences. tokens: chosen responses' mean
    length (1 where rewards are per token)."""
    said, accuracy, chosen = [], "eval_rewards/accuracies", now.get("eval_rewards/chosen")
    if accuracy in now and now[f"{accuracy}_ci95"][1] < before.get(f"{accuracy}_ci95", [0.5])[0]:
        said.append(
            f"held-out accuracy is {now[accuracy]:.3f}, "
            + (f"it was {before[accuracy]:.3f}" if before else "below chance")
            + ": an earlier checkpoint is the better model; a lower --learning_rate or a larger --beta may keep it"
        )
    if chosen is not None and chosen / beta / tokens < -SUNK:
        said.append(
            f"held-out chosen responses are {-chosen / beta / tokens:.2f} nats per token less likely than under the reference: "
            "the model unlearns them, too; a lower --learning_rate, a larger --beta or --sft_weight may hold them"
        )
    return said
