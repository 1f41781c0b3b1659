"""What all charts share: the look of a figure and its axes, labels and legend; a figure as inline SVG and as PNG.

A figure is 360 units wide, a phone's column, so that its letters are as large there as they are here.
"""

import io
import re
import warnings
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reporting import colours

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "report",  # ids are the same each time
        "text.parse_math": False,
        "font.size": 11,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
        "axes.axisbelow": True,
    }
)

INK, SOFT, GRID, PAPER = colours.INK.light, colours.SOFT.light, colours.GRID.light, colours.PAPER.light
SERIES = [colour.light for colour in colours.SERIES]
MARKERS = "osD^vP"  # of the runs
SOLID, DASHED, DOTTED = "-", (0, (4, 2)), (0, (1, 2))
DPI = 200  # of the PNGs: 1000 pixels wide
NAME_LENGTH = 30


class Drawn(NamedTuple):
    """What belongs beside a chart that was drawn."""

    notes: list  # sentences that explain its lines and marks
    values: list  # its figures in words, for the alt text


class LineEnd(NamedTuple):
    """A word to be written where a line ends."""

    word: str
    value: float
    colour: str


# --- figures and axes -------------------------------------------------------------------------------------


def new_figure(runs):
    height = 3.1 if len(runs) == 1 else 3.1 + 0.22 * len(runs)  # the legend has a line for each run
    figure = Figure(figsize=(5, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    return figure


def add_axes(figure):
    axes = figure.add_subplot()
    axes.tick_params(colors=SOFT)
    axes.xaxis.label.set_color(SOFT)
    axes.grid(color=GRID)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(SOFT)
    return axes


def name_axes(axes, x, y):
    """x and y: what an axis shows, with its unit. y stands above its axis, where it can be read without tilting."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=11, color=SOFT)


def dotted_level(axes, level):
    axes.axhline(level, color=SOFT, lw=1, ls=DOTTED, zorder=1)


def label_ends(axes, ends):
    """Write each LineEnd's word at its line's right end, moved up where two would overlap."""
    low, high = axes.get_ylim()
    line_height = 0.085  # of the axes
    last = -np.inf
    for end in sorted(ends, key=lambda end: end.value):
        last = max((end.value - low) / (high - low), last + line_height)
        axes.annotate(
            end.word,
            (1, last),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=end.colour,
        )


def short(name):
    """A run's name where there is little room: the end of it, by which runs differ."""
    return name if len(name) < NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]


def legend(axes, runs):
    """Names of the runs above the chart, each with its colour and marker."""
    names = [" " + short(run.name) for run in runs]  # matplotlib leaves out a name that begins with "_"
    axes.figure.legend(
        [Line2D([], [], color=SERIES[r], marker=MARKERS[r], ms=5, lw=1.8) for r in range(len(runs))],
        names,
        loc="outside upper left",
        ncols=1 if max(map(len, names)) > 16 else 2,
        handlelength=1.4,
        borderaxespad=0.2,
        labelspacing=0.25,
        labelcolor=INK,
    )


# --- files ------------------------------------------------------------------------------------------------


def svg(figure, name, alt):
    """The figure as an element of a page: the page's colours and font, ids that begin with `name`, no fixed size."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with io.StringIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that our font lacks: the page's has them
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'style="[^"]*"', themed, text)
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", text)
    size = re.search(r'viewBox="[^"]*"', text)[0]
    root = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: root, text, count=1)


def themed(style):
    """A matched style attribute with the page's variables for colours, and without a font family."""
    variables = {colour.light: f"var(--{colour.name})" for colour in colours.ALL}
    words = re.sub(r"#[0-9a-f]{6}", lambda colour: variables.get(colour[0], colour[0]), style[0])
    return re.sub(r"font-family:[^;\"]*;?|(?<=font: )([\d.]+px) [^;\"]*", r"\1", words)


def png(figure, title, runs):
    """The figure as a picture that can stand alone, with its title and the run's name."""
    if len(runs) == 1:
        heading = f"{title} \u00b7 {short(runs[0].name)}"
        figure.suptitle(heading, x=0.02, ha="left", color=INK, fontsize=12, weight="bold")
    else:  # the legend is where the heading would be
        [axes] = figure.axes
        heading = ", ".join(filter(None, [title, axes.get_title(loc="left")]))
        axes.set_title(heading, loc="left", color=INK, fontsize=11, weight="bold")
    return picture(figure, DPI)


def picture(figure, dpi):
    """The figure as the bytes of a PNG."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that our font lacks
        figure.savefig(file, format="png", dpi=dpi, facecolor=PAPER, metadata={"Software": None})
        return file.getvalue()
