"""Charts of the pairs as last scored: reward margin by denoising step, and by response length.

n pairs, S states of a response, T denoising steps.
"""

from typing import Callable, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from reporting import figures
from reporting.figures import Drawn, LineEnd
from reporting.scored_pairs import correlation
from scoring import noise

MOST_POINTS = 1500  # of a scatter plot


class PairChart(NamedTuple):
    """A chart of scored pairs, as charts.py lists them. draw(axes, runs) returns a Drawn, or None where nothing is."""

    name: str
    title: str
    shows: str  # a sentence on what is drawn
    draw: Callable


# --- margin by denoising step -----------------------------------------------------------------------------


def step_rewards(run):
    """Rewards by denoising step (n, 2, T), or None: the levels of plain elbo are random, and belong to no step."""
    args = run.arguments
    if run.scored is None or args["estimator"] == "elbo" or not len(run.scored.pair):
        return None
    step_of_state = noise.step_of_state(args["estimator"], args["diffusion_steps"], args["trajectories"])  # (S,)
    rewards = run.scored.rewards  # (n, 2, S)
    if len(step_of_state) != rewards.shape[-1]:
        return None
    by_step = [rewards[..., step_of_state == step].sum(-1) for step in range(args["diffusion_steps"])]
    return np.stack(by_step, axis=-1)


def draw_by_step(axes, runs):
    """Mean reward margin of each denoising step with its 95% interval; of one run its two rewards, too."""
    rewards_of = {r: step_rewards(run) for r, run in enumerate(runs)}
    rewards_of = {r: rewards for r, rewards in rewards_of.items() if rewards is not None}
    if not rewards_of:
        return None
    drawn_runs, ends, values = [runs[r] for r in rewards_of], [], []
    for r, rewards in rewards_of.items():
        if len(runs) == 1:
            ends += draw_both_rewards(axes, rewards)
        margin = rewards[:, 0] - rewards[:, 1]  # (n, T)
        mean = margin.mean(0)
        half = 1.96 * margin.std(0) / np.sqrt(len(margin))
        colour = figures.SERIES[r] if len(runs) > 1 else figures.INK
        x = np.arange(len(mean)) + 0.08 * (r - (len(runs) - 1) / 2)  # runs stand side by side
        axes.plot(x, mean, color=colour, lw=1.8, marker=figures.MARKERS[r], ms=5)
        axes.vlines(x, mean - half, mean + half, color=colour, lw=1.2, alpha=0.7)
        ends.append(LineEnd("margin", mean[-1], colour))
        values.append(f"{runs[r].name}: " + ", ".join(f"step {t} {value:+.3g}" for t, value in enumerate(mean)))
    finish_by_step(axes, runs, drawn_runs, ends)
    pairs = dict.fromkeys(f"{len(run.scored.pair)} {run.scored.description}" for run in drawn_runs)
    return Drawn([f"Mean over {', '.join(pairs)}.", "Vertical bars: 95% interval."], values)


def draw_both_rewards(axes, rewards):
    """Mean rewards of chosen and rejected by step; rewards (n, 2, T). Returns their LineEnds."""
    ends = []
    for side, word, style in ((0, "chosen", figures.SOLID), (1, "rejected", figures.DASHED)):
        mean = rewards[:, side].mean(0)
        axes.plot(mean, color=figures.SERIES[side], alpha=0.75, lw=1.5, ls=style, marker=".")
        ends.append(LineEnd(word, mean[-1], figures.SERIES[side]))
    return ends


def finish_by_step(axes, runs, drawn_runs, ends):
    figures.dotted_level(axes, 0)
    has_levels = any(run.arguments["estimator"] == "elbo_stratified" for run in drawn_runs)
    x_name = "level (0: few tokens hidden)" if has_levels else "denoising step (0: all tokens hidden)"
    figures.name_axes(axes, x_name, drawn_runs[0].reward_axis)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    if len(runs) == 1:
        figures.label_ends(axes, ends)
    else:
        figures.legend(axes, runs)


# --- margin by response length ----------------------------------------------------------------------------


def draw_by_length(axes, runs):
    """Each pair's margin against the tokens by which chosen is longer, with a straight line through them."""
    notes, values = [], []
    for r, run in enumerate(runs):
        if run.scored is None or run.scored.tokens is None or not len(run.scored.pair):
            continue
        longer, margin = run.scored.longer, run.scored.margin
        draw_points(axes, longer, margin, r)
        name = f"{run.name}: " if len(runs) > 1 else ""
        words = name + correlation_in_words(longer, margin)
        count = f"{len(longer)} {run.scored.description}"
        if len(longer) > MOST_POINTS:
            count += f", {MOST_POINTS} of them drawn"
        notes.append(f"{count}; {words}.")
        values.append(words)
    if not notes:
        return None
    figures.dotted_level(axes, 0)
    axes.axvline(0, color=figures.SOFT, lw=1, ls=figures.DOTTED, zorder=1)
    figures.name_axes(axes, "tokens of chosen - tokens of rejected", runs[0].margin_axis)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(runs) > 1:
        figures.legend(axes, runs)
    return Drawn(notes, values)


def draw_points(axes, longer, margin, r):
    """The points of run r, at most MOST_POINTS of them, and the least-squares line of all; longer, margin (n,)."""
    shown = np.arange(len(longer))
    if len(longer) > MOST_POINTS:
        shown = np.random.default_rng(0).choice(len(longer), MOST_POINTS, replace=False)
    colour = figures.SERIES[r]
    axes.plot(longer[shown], margin[shown], figures.MARKERS[r], color=colour, alpha=0.45, ms=4.5, mew=0)
    if correlation(longer, margin):
        slope, start = np.polyfit(longer, margin, 1)
        ends = np.array([longer.min(), longer.max()])
        axes.plot(ends, start + slope * ends, color=colour, lw=1.6)


def correlation_in_words(longer, margin):
    found = correlation(longer, margin)
    if not found:
        return "too few different pairs for a correlation"
    return f"correlation {found.r:+.2f} (95% interval {found.low:+.2f} to {found.high:+.2f})"


BY_STEP = PairChart(
    "by_step", "Margin by denoising step", "Which steps of the unmasking learn the preference.", draw_by_step
)
BY_LENGTH = PairChart(
    "by_length",
    "Margin by response length",
    "A preference for longer or shorter responses shows as a slope.",
    draw_by_length,
)
