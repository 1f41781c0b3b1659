"""What of a run is worth a sentence: its headline figures, and what is wrong or doubtful in it. Rules with figures, no praise.

headlines(run) -> [(what, figure, what it is of)];  findings(run) -> [sentence]
"""

import numpy as np

from reporting.history import correlation
from training import runs

TAIL = 0.1  # the share of the steps, the last of them, that training's figures are means of
RISEN = 1.05  # held-out loss against its lowest that is worth a sentence
SEEN = 0.005  # a reward below 0 by more than rounding
EXPLAINED = 0.3  # |r| of margin and length that is


def recent(run, name):
    """Mean of a training column over the last steps, or None."""
    values = run.column(name)[1]
    return float(values[-max(1, round(TAIL * len(values))) :].mean()) if len(values) else None


def latest(run, name):
    """(value, of which pairs) of the last evaluation, else of training's last steps; (None, ...) if there is none."""
    held = run.last(f"eval_{name}")
    return (
        (held, "held-out pairs") if held is not None else (recent(run, name), "training pairs, last tenth of the steps")
    )


def headlines(run):
    """[(what, figure, of what)], each text; what the run has no number for is left out."""
    found = []
    accuracy, where = latest(run, "rewards/accuracies")
    if accuracy is not None:
        interval = next(reversed(run.intervals.values()), None) if where == "held-out pairs" else None
        n = f", {len(run.scored.pair) + run.scored.unusable} pairs" if run.scored and run.scored.held else ""
        found.append(
            (
                f"{'held-out' if interval else 'training'} accuracy",
                f"{accuracy:.3f}",
                f"95% interval {interval[0]:.3f} to {interval[1]:.3f}{n}" if interval else where,
            )
        )
    for name, title in (("rewards/margins", "margin"), ("loss", "loss")):
        value, where = latest(run, name)
        if value is not None and (name != "loss" or run.sft):
            said = (f"{value:.3f}", "nats a token") if name == "loss" else (f"{value:+.3f}", f"reward, {where}")
            found.append((f"{'held-out' if where == 'held-out pairs' else 'training'} {title}", *said))
    found.append(("steps", f"{run.done} of {run.record['steps']}", run.state))
    speed = run.column("pairs_per_second")[1]
    if len(speed):
        average, unit = len(speed) / (1 / speed).sum(), "rows" if run.sft else "pairs"
        found.append(
            (f"{unit}/s", f"{average:.3g}", f"{clock(run.per_step * (1 / speed).sum())} of training, evaluations aside")
        )
    for name, title in (("gpu_peak_gib", "GPU"), ("host_peak_gib", "host")):
        values = run.column(name)[1]
        if len(values):
            whose = "of the first rank" if run.arguments["ranks"] > 1 else "of the process"
            found.append((f"peak memory, {title}", f"{values.max():.1f} GiB", whose))
    return found


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def findings(run):
    """Sentences, the gravest first."""
    return [
        words
        for rule in (progress, skips, unusable, idle, chance, both_fall, overfitted, length, restarted)
        for words in rule(run)
    ] + run.missing


def progress(run):
    of = f" of {run.record['steps']}"
    if run.state == "running":
        left = run.last("seconds_left")
        yield f"The run is going on: step {run.done}{of} is done" + (
            f", some {clock(left)} are left." if left is not None else "."
        )
    elif run.state == "stopped":
        saved = runs.Run(run.folder).saved()
        yield (
            f"The run is unfinished: it ended after step {run.done}{of}. The same command goes on "
            + (
                f"after step {saved[-1][0]}, its newest checkpoint."
                if saved
                else "from the beginning: it has no checkpoint."
            )
        )
    if run.unread:
        yield f"{run.unread} line(s) of log.jsonl cannot be read and are left out; a run that is killed may leave one."


def skips(run):
    skipped = run.log.get("skipped", np.zeros(0)) > 0
    if skipped.any():
        row = len(skipped) if skipped.all() else int(np.argmin(skipped[::-1]))
        yield (
            f"{skipped.sum()} of {len(skipped)} steps had no finite gradient and changed nothing"
            + (f", the last {row} in a row." if row > 1 else ".")
        )


def chance(run):
    interval = next(reversed(run.intervals.values()), None)
    if interval and interval[1] < 0.5:
        yield f"Held-out accuracy is below chance: its 95% interval, {interval[0]:.3f} to {interval[1]:.3f}, lies under 0.5."
    elif interval and interval[0] <= 0.5:
        yield f"Held-out accuracy cannot be told from chance: its 95% interval, {interval[0]:.3f} to {interval[1]:.3f}, contains 0.5."


def both_fall(run):
    chosen, where = latest(run, "rewards/chosen")
    rejected, _ = latest(run, "rewards/rejected")
    if chosen is None or rejected is None or chosen > -SEEN:
        return
    start = f"Chosen responses fell below the reference: their reward is {chosen:+.3f} ({where})"
    if rejected < chosen:
        yield f"{start}. Rejected ones fell further, to {rejected:+.3f}: the margin is there because both fall, not because chosen gained."
    elif rejected > 0:
        yield f"{start}, while rejected ones rose, to {rejected:+.3f}."
    else:
        yield f"{start}, and rejected ones, at {rejected:+.3f}, did not fall as far."


def idle(run):
    loss, where = latest(run, "loss")
    plain = (
        run.arguments["loss_type"] == "sigmoid"
        and not run.arguments["label_smoothing"]
        and not run.arguments["sft_weight"]
    )
    if plain and run.done and loss is not None and abs(loss - np.log(2)) < 0.002:
        yield (
            f"Next to nothing was learnt: the loss of {where} is {loss:.4f}, ln 2 is 0.6931, after {run.done} steps at a learning rate of "
            f"{run.arguments['learning_rate']:g}; a higher rate, or more steps."
        )


def unusable(run):
    values, last = (
        run.log.get("eval_loss", np.zeros(0)),
        max(run.intervals, default=0),
    )  # an interval is logged even where the loss is none
    if last and not np.isfinite(values[run.log["step"][: len(values)] == last]).all():
        yield f"The evaluation after step {last} has no finite loss: held-out figures are those of an earlier one."


def overfitted(run):
    steps, loss = run.column("eval_loss")
    if len(loss) > 2 and loss[-1] > RISEN * loss.min() > 0:
        yield f"Held-out loss was lowest after step {steps[loss.argmin()]} ({loss.min():.4f}) and is {loss[-1]:.4f} now."


def length(run):
    if run.scored is None or run.scored.tokens is None:
        return
    found, pairs = (
        correlation(run.scored.longer, run.scored.margin),
        "held-out pairs" if run.scored.held else "training pairs",
    )
    if found and abs(found[0]) >= EXPLAINED and found[1] * found[2] > 0:
        apart = [
            (words, run.scored.margin[which] > 0)
            for words, which in (("longer", run.scored.longer > 0), ("shorter", run.scored.longer < 0))
            if which.any()
        ]
        yield (
            f"Length explains {found[0] ** 2:.0%} of how margins differ between {pairs} (r = {found[0]:+.2f}, 95% interval {found[1]:+.2f} to "
            f"{found[2]:+.2f}): the preference learnt may be one for {'longer' if found[0] > 0 else 'shorter'} responses. Accuracy is "
            + ", ".join(f"{right.mean():.3f} where chosen is {words} (n = {len(right)})" for words, right in apart)
            + "."
        )


def restarted(run):
    if at := [str(each["after_step"]) for each in run.record["starts"][1:]]:
        yield f"The run was stopped and gone on with after step {', '.join(at)}."
