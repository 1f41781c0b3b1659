"""The report as one picture, to be looked at on a phone: what was found in words, headline figures, four charts.

    poster.make(runs, evaluations) -> PNG of 1080 x 1350

Places are in inches from the lower left corner, and fixed: a layout that is solved differs in its last bits.
"""

import textwrap

from matplotlib.figure import Figure

from reporting import charts, diagnosis, figures

WIDTH, HEIGHT = 7.2, 9.0
LEFT = 0.18  # where texts begin
NOTES = 0.5  # height of the explanation of the lines, at the bottom
TITLE, LINE, HEADLINES, RUN = 0.5, 0.195, 1.1, 0.25  # heights of the parts at the top
CHARTS = ("accuracy", "margin", "rewards", "by_step", "loss", "by_length", "grad_norm", "learning_rate")
LINE_LENGTH = 88  # letters of a line of sentences
NOTE_LENGTH = 25  # letters of a line under a headline figure
MOST_LINES = 7  # of sentences


def make(runs, evaluations):
    figure = Figure(figsize=(WIDTH, HEIGHT))
    top = HEIGHT - 0.2
    name = figures.short(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"
    write(figure, LEFT, top, name, size=17, weight="bold")
    top -= TITLE
    lines = sentences(runs, evaluations)
    write(figure, LEFT, top, "\n".join(lines), size=10)
    top -= 0.15 + LINE * len(lines)
    if len(runs) == 1:
        write_headlines(figure, top, runs[0])
        top -= HEADLINES
    else:
        write_names(figure, top, runs)
        top -= 0.15 + RUN * len(runs)
    notes = draw_charts(figure, top, runs)
    write(figure, LEFT, NOTES - 0.05, "\n".join(notes), size=8.5, colour=figures.SOFT)
    return figures.picture(figure, dpi=150)


def write(figure, x, y, text, size, colour=figures.INK, weight="normal"):
    """Text that goes down from y."""
    style = {"va": "top", "fontsize": size, "color": colour, "weight": weight, "linespacing": 1.35}
    figure.text(x / WIDTH, y / HEIGHT, text, **style)


def sentences(runs, evaluations):
    """Lines of what was found: sentences in full, as many as there is room for."""
    lines = []
    for run in runs:
        name = f"{figures.short(run.name)}: " if len(runs) > 1 else ""
        for sentence in [*diagnosis.findings(run), *diagnosis.not_measured(run, evaluations)]:
            words = (name + sentence).replace(" = ", "\u00a0=\u00a0")  # kept on one line
            wrapped = textwrap.wrap(words, LINE_LENGTH, break_on_hyphens=False)
            if len(lines) + len(wrapped) > MOST_LINES:
                return [*lines, "... (report.html has more)"]
            lines += wrapped
    return lines


def write_headlines(figure, top, run):
    """The first four headline figures in large letters, side by side."""
    for place, headline in enumerate(diagnosis.headlines(run)[:4]):
        x = LEFT + place * 1.76
        note = "\n".join(textwrap.wrap(headline.note, NOTE_LENGTH))
        write(figure, x, top, headline.what, size=10, colour=figures.SOFT)
        write(figure, x, top - 0.2, headline.figure, size=17, weight="bold")
        write(figure, x, top - 0.55, note, size=9, colour=figures.SOFT)


def write_names(figure, top, runs):
    """A line for each run, in the colour that it has in the charts: their legend."""
    for place, run in enumerate(runs):
        words = "; ".join(f"{headline.what} {headline.figure}" for headline in diagnosis.headlines(run)[:3])
        text = f"{figures.short(run.name)}: {words}"
        write(figure, LEFT, top - RUN * place, text, size=10.5, colour=figures.SERIES[place])


def draw_charts(figure, top, runs):
    """Draw the first four of CHARTS that have numbers, two in a row. Returns lines that explain what several have."""
    by_name = {chart.name: chart for chart in charts.every_chart(runs)}
    shown = [by_name[name] for name in CHARTS if by_name[name].draw(figures.add_axes(Figure()), runs)][:4]
    width, height = WIDTH / 2, (top - NOTES) / 2
    notes = []
    for place, chart in enumerate(shown):
        row, column = divmod(place, 2)
        x, y = LEFT + column * width, top - (row + 1) * height
        axes = figures.add_axes(figure)
        axes.set_position([(x + 0.44) / WIDTH, (y + 0.55) / HEIGHT, (width - 1.4) / WIDTH, (height - 1.1) / HEIGHT])
        notes += chart.draw(axes, runs).notes
        write(figure, x, y + height - 0.1, chart.title, size=11.5, weight="bold")
    for legend in figure.legends[:]:
        legend.remove()  # the lines of write_names() are one
    common = [note for note in dict.fromkeys(notes) if notes.count(note) > 1]
    return textwrap.wrap(" ".join(common), 100, break_on_hyphens=False)
