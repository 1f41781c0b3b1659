"""The report as one picture, to be shown on a phone: headline figures, four charts, what is worth a sentence.

poster.make(runs) -> PNG of 1080 x 1350
"""

import textwrap

from matplotlib.figure import Figure

from reporting import charts, diagnosis

CHARTS = (
    "accuracy",
    "margin",
    "rewards",
    "by_step",
    "loss",
    "by_length",
    "grad_norm",
    "learning_rate",
)  # the first four that have numbers
WIDE = 86  # letters of a line
SENTENCES = 6  # lines of sentences


def make(runs):
    figure = Figure(figsize=(7.2, 9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    shown = [
        plan
        for name in CHARTS
        for plan in charts.plans(runs)
        if plan[0] == name and plan[-1](charts.add_axes(Figure()), runs)
    ][:4]
    said = findings(runs)
    top, *middle, bottom = figure.subfigures(
        4, 1, height_ratios=[1.5 + 0.25 * max(0, len(runs) - 1), 3.3, 3.3, 0.35 + 0.19 * len(said)]
    )
    heading(top, runs)
    for row, part in enumerate(middle):
        for (_, title, _, draw), each in zip(shown[2 * row : 2 * row + 2], part.subfigures(1, 2)):
            draw(charts.add_axes(each), runs)
            for legend in each.legends[:]:
                legend.remove()  # the heading's colours are one
            each.suptitle(title, x=0.04, ha="left", color=charts.INK, fontsize=11.5, weight="bold")
    bottom.text(0.025, 0.95, "\n".join(said), va="top", fontsize=10, color=charts.SOFT, linespacing=1.35)
    return charts.picture(figure, dpi=150)


def heading(part, runs):
    """One run: its figures in large letters. Several: a line each."""
    part.text(
        0.025,
        0.86,
        charts.short(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        va="top",
        fontsize=17,
        weight="bold",
        color=charts.INK,
    )
    if len(runs) == 1:
        tiles = diagnosis.headlines(runs[0])[:4]
        for place, (what, figure, of) in enumerate(tiles):
            x = 0.025 + place * 0.245
            part.text(x, 0.5, what, va="top", fontsize=10, color=charts.SOFT)
            part.text(x, 0.36, figure, va="top", fontsize=17, weight="bold", color=charts.INK)
            of = textwrap.shorten(of.removeprefix("95% interval "), 28, placeholder=" ...")
            part.text(x, 0.1, of, va="top", fontsize=9, color=charts.SOFT)
        return
    for place, run in enumerate(runs):
        words = "; ".join(f"{what} {figure}" for what, figure, _ in diagnosis.headlines(run)[:3])
        part.text(
            0.025,
            0.5 - place * 0.55 / len(runs),
            f"{charts.short(run.name)}: {words}",
            va="top",
            fontsize=10.5,
            color=charts.SERIES[place],
        )


def findings(runs):
    """Lines of what is worth a sentence, whole sentences as far as they have room."""
    found = []
    for run in runs:
        for words in diagnosis.findings(run):
            words = words.replace(" = ", "\u00a0=\u00a0")  # not to be parted
            lines = textwrap.wrap(("" if len(runs) == 1 else f"{charts.short(run.name)}: ") + words, WIDE)
            if len(found) + len(lines) > SENTENCES:
                return found + ["... (report.html has more)"]
            found += lines
    return found
