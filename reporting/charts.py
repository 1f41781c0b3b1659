"""The list of a report's charts, and their making.

    charts.make(runs) -> [Chart(name, title, shows, notes, alt, svg, png)]

To add a chart of log.jsonl, add a StepChart to every_chart(). step_charts.py and pair_charts.py draw; figures.py has
what all charts share; colours.py has the colours.
"""

import math
from typing import NamedTuple

from reporting import figures
from reporting.pair_charts import BY_LENGTH, BY_STEP
from reporting.step_charts import Level, StepChart


class Chart(NamedTuple):
    """A chart that was made."""

    name: str
    title: str
    shows: str  # a sentence on what is drawn, or nothing
    notes: list  # sentences on its lines and marks
    alt: str
    svg: str
    png: bytes


def every_chart(runs):
    """[StepChart or PairChart] in the page's order."""
    nouns = " or ".join(dict.fromkeys(run.noun for run in runs))
    clips = {run.arguments["max_grad_norm"] for run in runs} - {0}
    clipped = Level(clips.pop(), "clipped here") if len(clips) == 1 else None
    reward_axis, margin_axis = runs[0].reward_axis, runs[0].margin_axis
    rewards_show, zero = "Beta times the score of a response.", None
    if all(run.sft or run.loss.has_reference for run in runs):
        rewards_show = "How much more likely than under the reference a response has become."
        zero = Level(0, "the reference")
    return [
        loss_chart(runs),
        StepChart(
            "accuracy",
            "Accuracy",
            y_axis=f"accuracy (share of {nouns})",
            columns={"rewards/accuracies": "accuracy"},
            shows="Share of pairs whose margin is above 0. Of KTO's rows: whose reward is above beta * KL if "
            "desirable, and not if undesirable.",
            level=Level(0.5, "chance"),
            intervals=True,
            is_share=True,
        ),
        StepChart(
            "margin",
            "Margin",
            y_axis=margin_axis,
            columns={"rewards/margins": "margin"},
            shows="Reward of chosen minus reward of rejected.",
            level=Level(0, "no preference"),
        ),
        StepChart(
            "rewards",
            "Rewards, chosen and rejected",
            y_axis=reward_axis,
            columns={"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
            shows=rewards_show,
            level=zero,
        ),
        StepChart(
            "logps",
            "Log-likelihoods, chosen and rejected",
            y_axis="log-likelihood of a response (nats)",
            columns={"logps/chosen": "chosen", "logps/rejected": "rejected"},
            shows="Score of all tokens of a response.",
        ),
        StepChart(
            "kl",
            "KL",
            y_axis="KL (nats)",
            columns={"kl": "KL"},
            shows="What KTO compares rewards with, times beta: mean log-ratio of policy and reference over responses "
            "of other prompts, at least 0.",
            from_zero=True,
        ),
        BY_STEP,
        BY_LENGTH,
        StepChart(
            "learning_rate",
            "Learning rate",
            y_axis="learning rate",
            columns={"learning_rate": "rate"},
            smoothed=False,
            from_zero=True,
        ),
        StepChart(
            "grad_norm",
            "Gradient norm",
            y_axis="L2 norm of the gradient",
            columns={"grad_norm": "norm"},
            shows="Before clipping.",
            level=clipped,
            from_zero=True,
            skips=True,
        ),
        StepChart(
            "speed", "Speed", y_axis=f"{nouns} per second", columns={"pairs_per_second": "pairs"}, from_zero=True
        ),
        StepChart(
            "memory",
            "Peak memory",
            y_axis="peak memory (GiB)",
            columns={"host_peak_gib": "host", "gpu_peak_gib": "GPU"},
            smoothed=False,
            from_zero=True,
        ),
    ]


def loss_chart(runs):
    """Its unit depends on the loss; only DPO's own begins at ln 2."""
    y_axis, level = "loss", None
    if all(run.sft for run in runs):
        y_axis = "loss (nats per token)"
    elif all(run.plain_dpo for run in runs):
        y_axis, level = "loss (nats)", Level(math.log(2), "ln 2, no preference learned")
    return StepChart("loss", "Loss", y_axis, columns={"loss": "loss"}, level=level, skips=True)


def make(runs):
    """The Charts that the runs have numbers for."""
    made = []
    for chart in every_chart(runs):
        figure = figures.new_figure(runs)
        drawn = chart.draw(figures.add_axes(figure), runs)
        if drawn:
            alt = f"{chart.title}. {'; '.join(drawn.values)}."
            svg = figures.svg(figure, chart.name, alt)
            png = figures.png(figure, chart.title, runs)  # after the SVG: it adds a title to the figure
            made.append(Chart(chart.name, chart.title, chart.shows, drawn.notes, alt, svg, png))
    return made
