"""What a report says of a run in words: headline figures, problems, and what is not known yet.

    headlines(run) -> [Headline];  findings(run), not_measured(run, evaluations) -> [sentence]

Each rule below yields a sentence where it finds a problem; where none does, findings() says so. No figure of training
tells whether a model reasons better: not_measured() says that, evaluate_command() is the command that measures it.
"""

import shlex
from typing import NamedTuple

import numpy as np

from reporting.scored_pairs import correlation
from training import runs

TAIL = 0.1  # training's figures are means over this share of the steps, the last of them
RISEN = 1.05  # held-out loss over its lowest that is a problem
SEEN = 0.005  # a reward below 0 by more than rounding
NOT_LEARNED = 0.002  # distance of the loss from ln 2
EXPLAINED = 0.3  # |r| of margin and length that is a problem


class Headline(NamedTuple):
    """A figure in large letters."""

    what: str
    figure: str
    note: str  # what it is of


class Latest(NamedTuple):
    """A metric as last known; value is None where there is none."""

    value: float
    pairs: str  # held-out pairs, or training pairs and which
    is_held_out: bool


def recent(run, name):
    """Mean of a training column over the last steps, or None."""
    values = run.column(name)[1]
    return float(values[-max(1, round(TAIL * len(values))) :].mean()) if len(values) else None


def latest(run, name):
    """The Latest of a metric: of the last evaluation, else of training's last steps."""
    held_out = run.last(f"eval_{name}")
    if held_out is not None:
        return Latest(held_out, f"held-out {run.noun}", True)
    return Latest(recent(run, name), f"training {run.noun}, last tenth of the steps", False)


def interval_in_words(interval):
    return f"95% interval {interval[0]:.3f} to {interval[1]:.3f}"


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# --- headlines --------------------------------------------------------------------------------------------


def headlines(run):
    """[Headline]; what the run has no number for is left out."""
    found = [accuracy_headline(run), margin_headline(run), loss_headline(run)]
    found.append(Headline("steps", f"{run.steps_done} of {run.record['steps']}", run.state))
    found.append(speed_headline(run))
    found += [memory_headline(run, "gpu_peak_gib", "GPU"), memory_headline(run, "host_peak_gib", "host")]
    return [headline for headline in found if headline]


def accuracy_headline(run):
    accuracy, interval = latest(run, "rewards/accuracies"), run.last_interval
    if accuracy.value is None:
        return None
    figure = f"{accuracy.value:.3f}"
    if not (accuracy.is_held_out and interval):
        return Headline("training accuracy", figure, accuracy.pairs)
    note = interval_in_words(interval)
    if run.scored and run.scored.is_held_out:
        note += f", {len(run.scored.pair) + run.scored.unusable} pairs"
    return Headline("held-out accuracy", figure, note)


def margin_headline(run):
    margin = latest(run, "rewards/margins")
    if margin.value is None:
        return None
    kind = "held-out" if margin.is_held_out else "training"
    return Headline(f"{kind} margin", f"{margin.value:+.3f}", f"difference of rewards in {run.unit}, {margin.pairs}")


def loss_headline(run):
    """Of SFT, which has no accuracy and no margin."""
    loss = latest(run, "loss")
    if loss.value is None or not run.sft:
        return None
    kind = "held-out" if loss.is_held_out else "training"
    return Headline(f"{kind} loss", f"{loss.value:.3f}", "nats per token")


def speed_headline(run):
    speed = run.column("pairs_per_second")[1]
    if not len(speed):
        return None
    seconds_a_pair = 1 / speed
    training = clock(run.pairs_a_step * seconds_a_pair.sum())
    return Headline(f"{run.noun}/s", f"{1 / seconds_a_pair.mean():.3g}", f"{training} of training, without evaluations")


def memory_headline(run, column, title):
    values = run.column(column)[1]
    if not len(values):
        return None
    whose = "of the first rank" if run.arguments["ranks"] > 1 else "of the process"
    return Headline(f"peak memory, {title}", f"{values.max():.1f} GiB", whose)


# --- what is said of a run ----------------------------------------------------------------------------------


def findings(run):
    """[sentence]: what is wrong, the gravest first, or that nothing is; then what else is to be known."""
    return (problems(run) or [no_problem(run)]) + [*resumed(run), *run.missing]


def problems(run):
    """[sentence], the gravest first."""
    rules = (progress, unread_lines, skips, unusable, idle, chance, both_fall, overfitted, length)
    return [words for rule in rules for words in rule(run)]


def no_problem(run):
    """A sentence with what a log can tell where no rule found a problem."""
    facts = "the run is finished and no step was skipped"
    if run.last_interval:
        facts += f"; held-out accuracy is above chance ({interval_in_words(run.last_interval)})"
    return f"No problem found: {facts}."


def not_measured(run, evaluations):
    """[sentence] about a finished run that evaluate.py has not measured. evaluations: those that were found."""
    if run.state != "finished" or evaluations:
        return []
    kind = "Held-out" if run.last("eval_loss") is not None else "Training"
    metric = "loss" if run.sft else "accuracy"
    return [
        f"{kind} {metric} does not tell whether the model reasons better, and evaluate.py has not been run on this "
        "model."
    ]


def evaluate_command(run):
    """The command that compares final/ with the model that the run started from, with the flags that both need."""
    args = run.arguments
    options = {"model": f"{run.name}/final", "compare": args["model_name_or_path"]}
    if args["use_mixed_precision"] == "no":
        options["use_mixed_precision"] = "no"
    if args["load_in_4bit"]:
        options["load_in_4bit"] = "true"
    elif ds_config := runs.streaming_config(args["deepspeed"]):
        options["deepspeed"] = ds_config
    options["output_dir"] = f"{run.name}/evaluation"
    return " ".join(["python evaluate.py", *(f"--{name} {quoted(value)}" for name, value in options.items())])


def quoted(path):
    """shlex.quote() that leaves the home folder's ~ to the shell."""
    home, rest = ("~/", path[2:]) if path.startswith("~/") else ("", path)
    return home + shlex.quote(rest)


# --- rules: each yields sentences ---------------------------------------------------------------------------


def progress(run):
    so_far = f"step {run.steps_done} of {run.record['steps']}"
    if run.state == "running":
        seconds_left = run.last("seconds_left")
        left = f", about {clock(seconds_left)} left" if seconds_left is not None else ""
        yield f"The run is not finished: it is running, {so_far} is done{left}."
    elif run.state == "stopped":
        saved = runs.Run(run.folder).saved()
        where = f"from its newest checkpoint, step {saved[-1][0]}" if saved else "from the start: it has no checkpoint"
        yield f"The run is not finished: it ended after {so_far}. Run the same command to resume {where}."


def unread_lines(run):
    if run.unread:
        yield (
            f"{run.unread} line(s) of log.jsonl cannot be read and are left out; a run that is killed may leave one."
        )


def skips(run):
    skipped = run.log.get("skipped", np.zeros(0)) > 0
    if skipped.any():
        last = len(skipped) if skipped.all() else int(np.argmin(skipped[::-1]))
        in_a_row = f", the last {last} in a row" if last > 1 else ""
        yield f"{skipped.sum()} of {len(skipped)} steps had no finite gradient and changed nothing{in_a_row}."


def unusable(run):
    """An interval is logged even where the loss is not finite."""
    loss, last = run.log.get("eval_loss", np.zeros(0)), max(run.intervals, default=0)
    at_last = run.log["step"][: len(loss)] == last
    if last and not np.isfinite(loss[at_last]).all():
        yield f"The evaluation after step {last} has no finite loss: held-out figures are those of an earlier one."


def idle(run):
    loss = latest(run, "loss")
    if run.plain_dpo and run.steps_done and loss.value is not None and abs(loss.value - np.log(2)) < NOT_LEARNED:
        yield (
            f"Almost nothing was learned: after {run.steps_done} steps at a learning rate of "
            f"{run.arguments['learning_rate']:g} the loss of {loss.pairs} is {loss.value:.4f}, and ln 2 = 0.6931. "
            "Try a higher rate, or more steps."
        )


def chance(run):
    interval = run.last_interval
    if interval and interval[1] < 0.5:
        yield f"Held-out accuracy is below chance: {interval_in_words(interval)}, which is under 0.5."
    elif interval and interval[0] <= 0.5:
        yield f"Held-out accuracy cannot be told from chance: {interval_in_words(interval)}, which contains 0.5."


def both_fall(run):
    chosen, rejected = latest(run, "rewards/chosen"), latest(run, "rewards/rejected")
    known = chosen.value is not None and rejected.value is not None
    if not (run.loss.has_reference and known) or chosen.value > -SEEN:
        return
    start = f"Chosen responses fell below the reference: their reward is {chosen.value:+.3f} ({chosen.pairs})"
    if rejected.value < chosen.value:
        yield (
            f"{start}. Rejected ones fell further, to {rejected.value:+.3f}: the margin is there because both fall, "
            "not because chosen gained."
        )
    elif rejected.value > 0:
        yield f"{start}, while rejected ones rose, to {rejected.value:+.3f}."
    else:
        yield f"{start}, and rejected ones, at {rejected.value:+.3f}, did not fall as far."


def overfitted(run):
    steps, loss = run.column("eval_loss")
    if len(loss) > 2 and loss[-1] > RISEN * loss.min() > 0:
        best = steps[loss.argmin()]
        yield f"Held-out loss was lowest after step {best} ({loss.min():.4f}) and is {loss[-1]:.4f} now."


def length(run):
    if run.scored is None or run.scored.tokens is None:
        return
    longer, margin = run.scored.longer, run.scored.margin
    found = correlation(longer, margin)
    if not found or abs(found.r) < EXPLAINED or found.low * found.high <= 0:
        return
    accuracies = []
    for word, which in (("longer", longer > 0), ("shorter", longer < 0)):
        if which.any():
            accuracies.append(f"{(margin[which] > 0).mean():.3f} where chosen is {word} (n = {which.sum()})")
    yield (
        f"Length explains {found.r**2:.0%} of how margins differ between {run.scored.kind} (r = {found.r:+.2f}, "
        f"95% interval {found.low:+.2f} to {found.high:+.2f}): the model may have learned to prefer "
        f"{'longer' if found.r > 0 else 'shorter'} responses. Accuracy is {', '.join(accuracies)}."
    )


def resumed(run):
    steps = [str(start["after_step"]) for start in run.record["starts"][1:]]
    if steps:
        yield f"The run was stopped and resumed after step {', '.join(steps)}."
