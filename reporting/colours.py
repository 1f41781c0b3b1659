"""The colours of the page and of its charts, each with a light and a dark value. Change a colour here.

Charts are drawn in the light colours. In report.html every colour is a variable of the same name, so that a chart
follows the reader's theme. page.css uses the variables: var(--ink).
"""

from typing import NamedTuple


class Colour(NamedTuple):
    name: str  # of the variable on the page
    light: str
    dark: str


BACKGROUND = Colour("background", light="#f4f5f7", dark="#0d0f12")  # of the page, around its boxes
PAPER = Colour("paper", light="#ffffff", dark="#16191d")  # of boxes and charts
INK = Colour("ink", light="#1d2228", dark="#e6e9ec")  # text
SOFT = Colour("soft", light="#59636e", dark="#a3adb8")  # captions, axes
GRID = Colour("grid", light="#e1e4e8", dark="#30363d")  # grid lines, borders

# Lines and points. They differ without red against green, and text in them has a contrast of 4.5:1 or more on PAPER.
BLUE = Colour("blue", light="#0067a8", dark="#6cb6ff")
ORANGE = Colour("orange", light="#b84a00", dark="#ff9b57")
GREEN = Colour("green", light="#007a5b", dark="#4cd0a3")
PURPLE = Colour("purple", light="#9b3f7d", dark="#e7a1d0")
YELLOW = Colour("yellow", light="#806000", dark="#e3c04b")
GREY = Colour("grey", light="#47525e", dark="#b4becb")

SERIES = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY)  # in this order: of the lines of one run, or of several runs
ALL = (BACKGROUND, PAPER, INK, SOFT, GRID, *SERIES)


def css(theme):
    """The declarations of all variables for `theme`, "light" or "dark"."""
    return "; ".join(f"--{colour.name}: {getattr(colour, theme)}" for colour in ALL)
