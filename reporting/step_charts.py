"""Charts of log.jsonl's columns by optimizer step. Training is drawn light, held-out pairs dark with markers.

One run has a colour for each column, several runs have a colour each.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
from matplotlib.ticker import MaxNLocator

from reporting import figures
from reporting.figures import Drawn, LineEnd
from reporting.history import History

MOST_STEPS = 600  # more steps than these are drawn as BINS means
BINS = 300
SMOOTHED_STEPS = 30  # from so many steps on there is a running mean


class Level(NamedTuple):
    """A dotted horizontal line."""

    value: float
    meaning: str


class Bins(NamedTuple):
    """Values of equally many neighbouring steps put together; arrays are (bins,)."""

    step: np.ndarray
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    size: int  # steps of a bin


class Line(NamedTuple):
    """One column of one run: training's values and those of the held-out pairs, each as (steps, values)."""

    run: History
    word: str
    training: tuple
    held_out: tuple
    colour: str
    style: object  # of matplotlib's lines
    marker: str

    @property
    def is_held_out(self):
        return len(self.held_out[0]) > 0

    @property
    def main(self):
        """(steps, values) of the held-out pairs, or of training where there are none."""
        return self.held_out if self.is_held_out else self.training


@dataclass(frozen=True)
class StepChart:
    """A chart of columns of the log by optimizer step, as charts.py lists them."""

    name: str
    title: str
    y_axis: str  # what the y axis shows, with its unit
    columns: dict  # {column of log.jsonl: the word for it}
    shows: str = ""  # a sentence on what is drawn
    level: Optional[Level] = None
    smoothed: bool = True  # whether training has a running mean
    intervals: bool = False  # whether held-out values have 95% intervals
    from_zero: bool = False  # whether the y axis begins at 0
    is_share: bool = False  # whether the y axis is 0 to 1
    skips: bool = False  # whether skipped steps are marked

    def draw(self, axes, runs):
        """Draw the columns that the runs have; returns a Drawn, or None where no run has any."""
        lines = self.lines(runs)
        if not lines:
            return None
        notes = []
        for line in lines:
            notes += draw_training(axes, line, self.smoothed)
            notes += draw_held_out(axes, line)
            if self.intervals:
                notes += draw_intervals(axes, line)
        notes += self.finish_axes(axes, runs, lines)
        return Drawn(list(dict.fromkeys(notes)), [in_words(line, len(runs) > 1) for line in lines])

    def lines(self, runs):
        """A Line for each column that a run has."""
        found = []
        for r, run in enumerate(runs):
            for c, (column, word) in enumerate(self.columns.items()):
                colour = figures.SERIES[r if len(runs) > 1 else c]
                style = figures.DASHED if c else figures.SOLID
                values = run.column(column), run.column(f"eval_{column}")
                line = Line(run, word, *values, colour, style, figures.MARKERS[r])
                if len(line.main[0]):
                    found.append(line)
        return found

    def finish_axes(self, axes, runs, lines):
        """Names, limits, the level, skipped steps, labels. Returns notes."""
        notes = []
        figures.name_axes(axes, "optimizer step", self.y_axis)
        if self.level:
            notes += draw_level(axes, self.level)
        if self.from_zero:
            axes.set_ylim(0, max(1.08 * axes.get_ylim()[1], 1e-9))
        if self.is_share:
            axes.set_ylim(-0.03, 1.03)
        if self.skips:
            notes += draw_skips(axes, runs)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        words = list(dict.fromkeys(line.word for line in lines))
        if len(runs) > 1:
            figures.legend(axes, runs)
            notes += [f"Solid lines: {words[0]}; dashed: {words[1]}."] if len(words) > 1 else []
        elif len(words) > 1:
            figures.label_ends(axes, [LineEnd(line.word, float(line.main[1][-1]), line.colour) for line in lines])
        return notes


# --- the parts of a chart, each of which returns its notes ------------------------------------------------


def draw_training(axes, line, smoothed):
    steps, values = line.training
    if not len(steps):
        return []
    opacity = 0.45 if line.is_held_out else 0.95
    style = {"color": line.colour, "alpha": opacity, "ls": line.style}
    bins = put_together(steps, values)
    if bins.size > 1:
        axes.fill_between(bins.step, bins.lowest, bins.highest, color=line.colour, alpha=0.15, lw=0)
        axes.plot(bins.step, bins.mean, lw=1.3, **style)
        return [f"{len(steps)} training steps, drawn as means of {bins.size} with their range."]
    if smoothed and len(steps) >= SMOOTHED_STEPS:
        window = smoothing_window(len(steps))
        axes.plot(steps, values, color=line.colour, alpha=0.25, lw=0.8)
        axes.plot(steps, running_mean(values, window), lw=1.5, **style)
        return [f"Thin line: each training step. Thick line: running mean over {window} steps."]
    axes.plot(steps, values, lw=1.5, marker="." if len(steps) < 3 else None, **style)
    return ["Light line: training."] if line.is_held_out else []


def draw_held_out(axes, line):
    if not line.is_held_out:
        return []
    axes.plot(*line.held_out, color=line.colour, ls=line.style, lw=1.8, marker=line.marker, ms=5, zorder=4)
    return ["Dark line with markers: held-out pairs."]


def draw_intervals(axes, line):
    intervals = line.run.intervals
    bars = [(step, *intervals[step]) for step in line.held_out[0] if step in intervals]
    if not bars:
        return []
    axes.vlines(*zip(*bars), color=line.colour, lw=1.2, alpha=0.7, zorder=3)
    return ["Vertical bars: 95% interval."]


def draw_level(axes, level):
    low, high = axes.get_ylim()
    room = 0.04 * (high - low)
    figures.dotted_level(axes, level.value)
    axes.set_ylim(min(low, level.value - room), max(high, level.value + room))
    return [f"Dotted: {level.meaning}."]


def draw_skips(axes, runs):
    skipped = sorted({step for run in runs for step in run.skipped_steps})
    if not skipped:
        return []
    height = np.full(len(skipped), 0.03)  # of the axes
    axes.plot(skipped, height, "x", color=figures.INK, ms=5, transform=axes.get_xaxis_transform(), zorder=5)
    return ["Crosses: skipped steps."]


def in_words(line, is_named):
    """A Line for the alt text."""
    steps, values = line.main
    name = f"{line.run.name}, " if is_named else ""
    kind = " (held-out)" if line.is_held_out else ""
    first, last = (f"{values[end]:.3g} at step {steps[end]}" for end in (0, -1))
    return f"{name}{line.word}{kind}: {first}, {last}"


# --- numbers ----------------------------------------------------------------------------------------------


def put_together(steps, values):
    """Bins of one step each, or BINS of equally many if there are more than MOST_STEPS; steps, values (n,)."""
    if len(steps) <= MOST_STEPS:
        return Bins(steps, values, values, values, 1)
    size = -(-len(steps) // BINS)
    starts = np.arange(0, len(steps), size)
    count = np.diff(np.append(starts, len(steps)))
    mean_step, mean = (np.add.reduceat(each, starts) / count for each in (steps, values))
    return Bins(mean_step, mean, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), size)


def smoothing_window(count):
    """Steps of a running mean: about a fifteenth of all, an odd number."""
    return 2 * max(1, count // 30) + 1


def running_mean(values, window):
    """Means of (n,) values over `window` neighbours, over fewer at the ends."""
    places, half = np.arange(len(values)), window // 2
    total = np.concatenate(([0], values.cumsum()))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
