"""The charts of a report, by matplotlib: one Figure each, as inline SVG whose colours the page sets, and as PNG.

    charts.make(runs) -> [Chart(name, title, shows, marks, alt, svg, png)]

A figure is 360 units wide, a phone's column, so that its letters are as large there as they are here. Training is drawn light,
held-out pairs strong with markers; one run has a colour for each series, several have a colour each.
"""

import io
import re
import warnings
from html import escape
from typing import NamedTuple

import matplotlib
import matplotlib.lines
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from reporting.history import correlation
from scoring import noise

matplotlib.rcParams.update(
    {  # text stays text; ids and dates do not change from one making to the next
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
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

# name in the page's style sheet -> (light, dark). Told apart without red and green, and 4.5:1 or more on the paper.
COLOURS = {
    "paper": ("#ffffff", "#16191d"),
    "ink": ("#1d2228", "#e6e9ec"),
    "soft": ("#59636e", "#a3adb8"),
    "grid": ("#e1e4e8", "#30363d"),
    "c0": ("#0067a8", "#6cb6ff"),
    "c1": ("#b84a00", "#ff9b57"),
    "c2": ("#007a5b", "#4cd0a3"),
    "c3": ("#9b3f7d", "#e7a1d0"),
    "c4": ("#806000", "#e3c04b"),
    "c5": ("#47525e", "#b4becb"),
}
INK, SOFT, GRID = (COLOURS[name][0] for name in ("ink", "soft", "grid"))
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("c")]
MARKERS, DASHES = "osD^vP", ("-", (0, (4, 2)))
MOST = 600  # steps that are drawn one by one; more are drawn as BINS means
BINS = 300
POINTS = 1500  # pairs of a scatter plot
DPI = 200  # of the PNGs: 1000 pixels wide


class Chart(NamedTuple):
    name: str
    title: str
    shows: str  # a sentence on what is drawn, or nothing
    marks: list  # sentences on its lines and marks
    alt: str
    svg: str
    png: bytes


# --- lines by step ----------------------------------------------------------------------------------------


def thin(steps, values):
    """(steps, means, lowest, highest, steps a bin): BINS bins of equally many steps if there are more than MOST."""
    if len(steps) <= MOST:
        return steps, values, values, values, 1
    size = -(-len(steps) // BINS)
    starts = np.arange(0, len(steps), size)
    count = np.diff(np.append(starts, len(steps)))
    mean = lambda each: np.add.reduceat(each, starts) / count  # noqa: E731
    return mean(steps), mean(values), np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), size


def smooth(values):
    """Running mean over a fifteenth of the values, over fewer at the ends."""
    half = max(1, len(values) // 30)
    total = np.concatenate(([0], values.cumsum()))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def lines(axes, runs, series, unit, noisy=True, **marks):
    """Draw columns of the log by step. series: [(column, word)]. Returns (words for the caption, words for the alt text), or None
    if no run has any."""
    said, alt, ends = {}, [], []
    for r, run in enumerate(runs):
        for s, (column, word) in enumerate(series):
            colour, dash = SERIES[r if len(runs) > 1 else s], DASHES[s if len(series) > 1 else 0]
            train, held = run.column(column), run.column(f"eval_{column}")
            strong = held if len(held[0]) else train
            if not len(strong[0]):
                continue
            if len(train[0]):
                draw_train(axes, *train, colour, dash, len(held[0]) > 0, noisy, said)
            if len(held[0]):
                axes.plot(
                    *held,
                    color=colour,
                    dashes=(None, None) if dash == "-" else dash[1],
                    lw=1.8,
                    marker=MARKERS[r],
                    ms=5,
                    zorder=4,
                )
                said["light: training; strong, with markers: held-out pairs"] = None
            if len(held[0]) and marks.get("interval"):
                bars = [(step, *run.intervals[step]) for step in held[0] if step in run.intervals]
                if bars:
                    axes.vlines(*zip(*bars), color=colour, lw=1.2, alpha=0.7, zorder=3)
                    said["upright bars: 95% interval"] = None
            ends.append((word, float(strong[1][-1]), colour))
            alt.append(
                f"{run.name + ', ' if len(runs) > 1 else ''}{word}{' (held-out)' if len(held[0]) else ''}: {strong[1][0]:.3g} at step "
                f"{strong[0][0]}, {strong[1][-1]:.3g} at step {strong[0][-1]}"
            )
    if not ends:
        return None
    finish(axes, runs, series, ends, unit, said, marks)
    return list(said), alt


def draw_train(axes, steps, values, colour, dash, light, noisy, said):
    x, mean, low, high, size = thin(steps, values)
    weight = 0.45 if light else 0.95
    if size > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        said[f"{len(steps)} steps, drawn as means of {size} with their range"] = None
        axes.plot(x, mean, color=colour, alpha=weight, lw=1.3, ls=dash)
    elif noisy and len(x) >= 30:
        axes.plot(x, mean, color=colour, alpha=0.25, lw=0.8)
        axes.plot(x, smooth(mean), color=colour, alpha=weight, lw=1.5, ls=dash)
        said["faint: every step; line: running mean of a fifteenth of them"] = None
    else:
        axes.plot(x, mean, color=colour, alpha=weight, lw=1.5, ls=dash, marker="." if len(x) < 3 else None)


def finish(axes, runs, series, ends, unit, said, marks):
    """Axes, reference lines, skipped steps, labels."""
    axes.set_title(unit, loc="left", fontsize=11, color=SOFT)
    axes.set_xlabel("optimizer step")
    if (at := marks.get("at")) is not None:
        level, words = at
        low, high = axes.get_ylim()
        axes.axhline(level, color=SOFT, lw=1, ls=(0, (1, 2)), zorder=1)
        axes.set_ylim(min(low, level - 0.04 * (high - low)), max(high, level + 0.04 * (high - low)))
        said[f"dotted: {words}"] = None
    if marks.get("zero"):
        axes.set_ylim(0, max(1.08 * axes.get_ylim()[1], 1e-9))
    if marks.get("share"):
        axes.set_ylim(-0.03, 1.03)
    bad = sorted({int(step) for run in runs for step in run.log["step"][run.log.get("skipped", np.zeros(0)) > 0]})
    if marks.get("skips") and bad:
        axes.plot(bad, np.full(len(bad), 0.03), "x", color=INK, ms=5, transform=axes.get_xaxis_transform(), zorder=5)
        said["crosses: skipped steps"] = None
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    if len(runs) > 1:
        legend(axes, runs)
        if len(drawn := list(dict.fromkeys(word for word, _, _ in ends))) > 1:
            said[f"whole lines: {drawn[0]}; dashed: {drawn[1]}"] = None
    elif len(series) > 1:
        label_ends(axes, ends)


def label_ends(axes, ends):
    """A word right of each line's end, in its colour, apart from one another."""
    low, high = axes.get_ylim()
    places, last = [(value - low) / (high - low) for _, value, _ in ends], -np.inf
    for index in np.argsort(places):
        last = max(places[index], last + 0.085)
        word, _, colour = ends[index]
        axes.annotate(
            word,
            (1, last),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )


def short(name):
    """A run's name where there is little room: its end tells runs apart."""
    return name if len(name) < 30 else "..." + name[-27:]


def legend(axes, runs):
    handles = [
        matplotlib.lines.Line2D([], [], color=SERIES[r], marker=MARKERS[r], ms=5, lw=1.8) for r in range(len(runs))
    ]
    names = [" " + short(run.name) for run in runs]  # "_name" alone would be left out
    axes.figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=1 if max(map(len, names)) > 16 else 2,
        handlelength=1.4,
        borderaxespad=0.2,
        labelspacing=0.25,
        labelcolor=INK,
    )


# --- pairs ------------------------------------------------------------------------------------------------


def step_rewards(run):
    """Rewards by denoising step (n, 2, T), or None: the levels of plain elbo are random, and belong to no step."""
    args = run.arguments
    if run.scored is None or args["estimator"] == "elbo" or not len(run.scored.pair):
        return None
    steps = noise.step_of_state(args["estimator"], args["diffusion_steps"], args["trajectories"])  # (S,)
    if len(steps) != run.scored.rewards.shape[-1]:
        return None
    return np.stack([run.scored.rewards[..., steps == step].sum(-1) for step in range(args["diffusion_steps"])], -1)


def by_step(axes, runs):
    """Mean reward margin of each denoising step, with its 95% interval."""
    said, alt, ends, drawn = {}, [], [], []
    for r, run in enumerate(runs):
        rewards = step_rewards(run)
        if rewards is None:
            continue
        drawn.append(run)
        x = np.arange(rewards.shape[-1]) + 0.08 * (r - (len(runs) - 1) / 2)
        margin = rewards[:, 0] - rewards[:, 1]  # (n, T)
        half = 1.96 * margin.std(0) / np.sqrt(len(margin))
        parts = (
            [("chosen", rewards[:, 0], SERIES[0], "-"), ("rejected", rewards[:, 1], SERIES[1], DASHES[1])]
            if len(runs) == 1
            else []
        )
        for word, each, colour, dash in parts:
            axes.plot(x, each.mean(0), color=colour, alpha=0.75, lw=1.5, ls=dash, marker=".")
            ends.append((word, each.mean(0)[-1], colour))
        colour = SERIES[r] if len(runs) > 1 else INK
        axes.plot(x, margin.mean(0), color=colour, lw=1.8, marker=MARKERS[r], ms=5)
        axes.vlines(x, margin.mean(0) - half, margin.mean(0) + half, color=colour, lw=1.2, alpha=0.7)
        ends.append(("margin", margin.mean(0)[-1], colour))
        alt.append(f"{run.name}: " + ", ".join(f"step {t} {value:+.3g}" for t, value in enumerate(margin.mean(0))))
    if not drawn:
        return None
    axes.axhline(0, color=SOFT, lw=1, ls=(0, (1, 2)), zorder=1)
    axes.set_title("reward", loc="left", fontsize=11, color=SOFT)
    levels = any(run.arguments["estimator"] == "elbo_stratified" for run in drawn)
    axes.set_xlabel("level (0: few tokens hidden)" if levels else "denoising step (0: all tokens hidden)")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(10, integer=True))
    of = dict.fromkeys(f"{len(run.scored.pair)} {pairs_of(run)}" for run in drawn)
    said[f"mean over {', '.join(of)}; upright bars: 95% interval"] = None
    label_ends(axes, ends) if len(runs) == 1 else legend(axes, runs)
    return list(said), alt


def pairs_of(run):
    return f"{'held-out' if run.scored.held else 'training'} pairs (step {run.scored.step})"


def by_length(axes, runs):
    """Each pair's margin against the tokens by which chosen is longer."""
    said, alt, drawn = {}, [], False
    for r, run in enumerate(runs):
        if run.scored is None or run.scored.tokens is None or not len(run.scored.pair):
            continue
        drawn, x, y = True, run.scored.longer, run.scored.margin
        shown = (
            np.arange(len(x)) if len(x) <= POINTS else np.random.default_rng(0).choice(len(x), POINTS, replace=False)
        )
        axes.plot(x[shown], y[shown], MARKERS[r], color=SERIES[r], alpha=0.45, ms=4.5, mew=0)
        found = correlation(x, y)
        words = f"{run.name}: " if len(runs) > 1 else ""
        if found:
            slope, start = np.polyfit(x, y, 1)
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, start + slope * ends, color=SERIES[r], lw=1.6)
            words += f"correlation {found[0]:+.2f} (95% interval {found[1]:+.2f} to {found[2]:+.2f})"
        else:
            words += "too few different pairs for a correlation"
        said[f"{len(x)} {pairs_of(run)}" + (f", {POINTS} of them drawn" if len(x) > POINTS else "") + f"; {words}"] = (
            None
        )
        alt.append(words)
    if not drawn:
        return None
    axes.axhline(0, color=SOFT, lw=1, ls=(0, (1, 2)), zorder=1)
    axes.axvline(0, color=SOFT, lw=1, ls=(0, (1, 2)), zorder=1)
    axes.set_title("reward margin", loc="left", fontsize=11, color=SOFT)
    axes.set_xlabel("tokens of chosen - tokens of rejected")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(runs) > 1:
        legend(axes, runs)
    return list(said), alt


# --- which charts, and their making -----------------------------------------------------------------------


def by_log(*series, unit, **marks):
    return lambda axes, runs: lines(axes, runs, series, unit, **marks)


def plans(runs):
    """[(name, title, what it shows, draw)] in the page's order."""
    plain = all(
        run.arguments["loss_type"] == "sigmoid"
        and not run.arguments["label_smoothing"]
        and not run.arguments["sft_weight"]
        for run in runs
    )
    clips = {run.arguments["max_grad_norm"] for run in runs} - {0}
    at = {"at": (float(np.log(2)), "ln 2, no preference learnt")} if plain else {}
    clip = {"at": (clips.pop(), "clipped here")} if len(clips) == 1 else {}
    nats = "nats a token" if all(run.sft for run in runs) else "nats" if plain else "loss"
    speed = "rows/s" if all(run.sft for run in runs) else "pairs/s"
    two = lambda name: ((f"{name}/chosen", "chosen"), (f"{name}/rejected", "rejected"))  # noqa: E731
    return [
        ("loss", "Loss", "", by_log(("loss", "loss"), unit=nats, skips=True, **at)),
        (
            "accuracy",
            "Accuracy",
            "Share of pairs whose margin is above 0.",
            by_log(
                ("rewards/accuracies", "accuracy"), unit="share of pairs", interval=True, share=True, at=(0.5, "chance")
            ),
        ),
        (
            "margin",
            "Margin",
            "Reward of chosen less reward of rejected.",
            by_log(("rewards/margins", "margin"), unit="reward", at=(0, "no preference")),
        ),
        (
            "rewards",
            "Rewards, chosen and rejected",
            "beta times the log-likelihood gained on the reference.",
            by_log(*two("rewards"), unit="reward", at=(0, "the reference")),
        ),
        (
            "logps",
            "Log-likelihoods, chosen and rejected",
            "Score of a whole response.",
            by_log(*two("logps"), unit="nats a response"),
        ),
        ("by_step", "Margin by denoising step", "Which steps of the unmasking learn the preference.", by_step),
        (
            "by_length",
            "Margin by response length",
            "A preference for longer or shorter responses shows as a slope.",
            by_length,
        ),
        ("learning_rate", "Learning rate", "", by_log(("learning_rate", "rate"), unit="", noisy=False, zero=True)),
        (
            "grad_norm",
            "Gradient norm",
            "Before clipping.",
            by_log(("grad_norm", "norm"), unit="L2 norm", skips=True, zero=True, **clip),
        ),
        ("speed", "Speed", "", by_log(("pairs_per_second", "pairs"), unit=speed, zero=True)),
        (
            "memory",
            "Peak memory",
            "",
            by_log(("host_peak_gib", "host"), ("gpu_peak_gib", "GPU"), unit="GiB", noisy=False, zero=True),
        ),
    ]


def make(runs):
    """The Charts that the runs have numbers for."""
    made = []
    for name, title, shows, draw in plans(runs):
        figure = Figure(figsize=(5, 3.1 if len(runs) == 1 else 3.1 + 0.22 * len(runs)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08)
        found = draw(add_axes(figure), runs)
        if found:
            said, alt = found
            alt, marks = f"{title}. {'; '.join(alt)}.", [f"{words[0].upper()}{words[1:]}." for words in said]
            made.append(Chart(name, title, shows, marks, alt, svg(figure, name, alt), png(figure, title, runs)))
    return made


def add_axes(figure):
    axes = figure.add_subplot()
    axes.tick_params(colors=SOFT)
    axes.xaxis.label.set_color(SOFT)
    axes.grid(color=GRID)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(SOFT)
    return axes


def svg(figure, name, alt):
    """The figure as an element of a page: colours by the page's variables, ids of its own, no size of its own."""
    with io.StringIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that our font lacks: the page's has them
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        text = file.getvalue()
    text = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    names = {light: f"var(--{key})" for key, (light, _) in COLOURS.items()}

    def styled(match):
        words = re.sub(r"#[0-9a-f]{6}", lambda found: names.get(found[0], found[0]), match[0])
        return re.sub(r"font-family:[^;\"]*;?|(?<=font: )([\d.]+px) [^;\"]*", r"\1", words)

    text = re.sub(r'style="[^"]*"', styled, text)
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", text)
    size = re.search(r'viewBox="[^"]*"', text)[0]
    root = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: root, text, count=1)


def png(figure, title, runs):
    """The figure as a picture that can stand alone: title, run."""
    if len(runs) == 1:
        figure.suptitle(
            f"{title} \u00b7 {short(runs[0].name)}", x=0.02, ha="left", color=INK, fontsize=12, weight="bold"
        )
    else:  # the legend stands where that would
        [axes] = figure.axes
        axes.set_title(
            ", ".join(filter(None, [title, axes.get_title(loc="left")])),
            loc="left",
            color=INK,
            fontsize=11,
            weight="bold",
        )
    return picture(figure)


def picture(figure, dpi=DPI):
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that our font lacks
        figure.savefig(file, format="png", dpi=dpi, facecolor=COLOURS["paper"][0], metadata={"Software": None})
        return file.getvalue()
