"""The page of a report: one HTML file that loads nothing, for a phone and a desk, light and dark. Every text is escaped.

write(runs, charts, evaluations) -> the page's text
"""

import os
import re
from dataclasses import fields
from html import escape

import numpy as np

import config
from reporting import charts, diagnosis, history
from training import runs as folders

WRONG = 10  # pairs shown of those that the model gets most wrong
ANSWERED = 8  # items shown of a task
ROWS = 50  # rows of a table of skipped steps

STYLE = """
:root { color-scheme: light dark; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%%; text-size-adjust: 100%% }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1320px; margin: 0 auto; padding: 20px 14px 48px }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 40px 0 10px; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 20px 0 6px; overflow-wrap: anywhere }
p { margin: 6px 0; max-width: 75ch; overflow-wrap: anywhere }
.soft, figcaption, dt, dd small { color: var(--soft) }
figure, .tile, .notes, .box, details { background: var(--paper); border: 1px solid var(--grid); border-radius: 10px }
.tiles { display: grid; gap: 10px; margin: 10px 0 0; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 160px), 1fr)) }
.tile { padding: 10px 12px; margin: 0 }
.tile dt { font-size: .85rem } .tile dd { margin: 0 } .tile b { font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums }
.tile small { display: block; font-size: .8rem; line-height: 1.35 }
.notes { margin: 12px 0 0; padding: 10px 12px 10px 30px; border-left: 4px solid var(--c1) }
.notes li { margin: 4px 0; max-width: 85ch; overflow-wrap: anywhere }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 380px), 1fr)) }
figure { margin: 0; padding: 10px 0 } figure h3 { margin: 0 12px 4px }
figure svg { display: block; width: 100%%; height: auto; font-family: inherit } figure svg * { stroke-linejoin: round }
figcaption { font-size: .85rem; line-height: 1.4; margin: 6px 12px 0 }
.box { overflow-x: auto; width: fit-content; max-width: 100%%; margin: 8px 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid) }
tbody tr:last-child > * { border-bottom: 0 } thead th { color: var(--soft); font-weight: 500 }
td { max-width: 60ch; overflow-wrap: break-word } .tight td { white-space: nowrap } td.number, th.number { text-align: right; white-space: nowrap }
details { margin: 8px 0; padding: 0 12px } summary { cursor: pointer; padding: 10px 0; overflow-wrap: anywhere }
summary b { font-variant-numeric: tabular-nums } details[open] { padding-bottom: 12px }
.texts { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 300px), 1fr)) }
.texts > * { min-width: 0 } .whole { grid-column: 1 / -1 }
h4 { font-size: .85rem; font-weight: 600; margin: 0 0 4px; color: var(--soft); overflow-wrap: anywhere }
pre { margin: 0; padding: 8px 10px; background: var(--back); border-radius: 6px; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%%; margin-right: .45em }
footer { margin-top: 40px; font-size: .85rem; color: var(--soft) }
"""


def say(value):
    """A text for the page: escaped; what no file can hold, or no page shows, replaced."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text.replace("\r\n", "\n")))


def table(head, rows, kind=""):
    """A table that scrolls in its box; columns of numbers to the right."""
    rows = [["" if value is None else str(value) for value in row] for row in rows]
    number = [
        any(column) and all(re.fullmatch(r"[-+]?[\d.]*%?", value) for value in column) for column in zip(*rows)
    ] or [False] * len(head)
    cells = lambda row: "".join(
        f"<td{' class=number' if right else ''}>{say(value)}</td>" for value, right in zip(row, number)
    )  # noqa: E731
    return (
        f'<div class="box {kind}" tabindex="0" role="region" aria-label="table"><table><thead><tr>'
        + "".join(
            f"<th scope=col{' class=number' if right else ''}>{say(name)}</th>" for name, right in zip(head, number)
        )
        + f"</tr></thead><tbody>{''.join(f'<tr>{cells(row)}</tr>' for row in rows)}</tbody></table></div>"
    )


def fold(summary, inner, opened=False):
    """Something to unfold; both are HTML."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{inner}</details>"


def block(title, text, place=""):
    """A text as it is, under a title; a browser leaves out a line's end that a <pre> begins with, so one more is there."""
    return f'<div{place}><h4>{say(title)}</h4><pre dir="auto">\n{say(text)}</pre></div>'


def opening(text, length=70):
    words = " ".join(text.split())
    return words if len(words) <= length else words[:length] + " ..."


# --- sections ---------------------------------------------------------------------------------------------


def key(r):
    """The mark of the colour that run r has in the charts."""
    return f'<span class="key" style="background: var(--c{r})"></span>'


def header(runs):
    if len(runs) > 1:
        return f"<header><h1>{len(runs)} runs</h1></header>"
    run = runs[0]
    kind = "SFT" if run.sft else f"DPO ({run.arguments['loss_type']}, beta {run.arguments['beta']:g})"
    about = [
        kind,
        f"model {run.arguments['model_name_or_path']}",
        f"begun {run.record['starts'][0]['time'][:16].replace('T', ' ')}",
    ]
    return f'<header><h1>{say(run.name)}</h1><p class="soft">{say(", ".join(about))}</p></header>'


def overview(runs):
    """Headline figures and findings."""
    body = ""
    for r, run in enumerate(runs):
        tiles = "".join(
            f'<div class="tile"><dt>{say(what)}</dt><dd><b>{say(figure)}</b><small>{say(of)}</small></dd></div>'
            for what, figure, of in diagnosis.headlines(run)
        )
        body += (f"<h3>{key(r)}{say(run.name)}</h3>" if len(runs) > 1 else "") + f'<dl class="tiles">{tiles}</dl>'
    notes = [(run.name + ": " if len(runs) > 1 else "") + words for run in runs for words in diagnosis.findings(run)]
    listed = f'<ul class="notes">{"".join(f"<li>{say(words)}</li>" for words in notes)}</ul>' if notes else ""
    return f'<section aria-label="Overview">{body}{listed}</section>'


def chart_grid(made):
    """The charts; what is to be said of several of them stands once, above."""
    every = [words for chart in made for words in chart.marks]
    common = [words for words in dict.fromkeys(every) if every.count(words) > 2]
    figures = ""
    for chart in made:
        words = " ".join(filter(None, [chart.shows, *(each for each in chart.marks if each not in common)]))
        figures += (
            f"<figure><h3>{say(chart.title)}</h3>{chart.svg}"
            + (f"<figcaption>{say(words)}</figcaption>" if words else "")
            + "</figure>"
        )
    above = f'<p class="soft">{say(" ".join(common))}</p>' if common else ""
    return f'<section><h2>Charts</h2>{above}<div class="charts">{figures}</div></section>' if made else ""


def wrong_pairs(run):
    """The pairs of the lowest margins, with their texts."""
    if run.scored is None or not len(run.scored.pair):
        return ""
    scored, margin = run.scored, run.scored.margin
    below, parts = int((margin <= 0).sum()), []
    for rank, place in enumerate(np.argsort(margin, kind="stable")[: min(WRONG, below or WRONG)]):
        pair = int(scored.pair[place])
        texts = history.texts(run, pair) if run.tokenizer else None
        chosen, rejected = scored.rewards[place].sum(-1)
        tokens = [f", {count} tokens" for count in scored.tokens[place]] if scored.tokens is not None else ["", ""]
        summary = f"<b>{margin[place]:+.3f}</b> &middot; line {scored.line[place]}" + (
            f" &middot; {say(opening(texts[0]))}" if texts else ""
        )
        titles = [f"chosen, reward {chosen:+.3f}{tokens[0]}", f"rejected, reward {rejected:+.3f}{tokens[1]}"]
        inner = (
            block("prompt", texts[0], " class=whole") + "".join(map(block, titles, texts[1:]))
            if texts
            else "".join(f"<p>{title}</p>" for title in titles)
        )
        parts.append(fold(summary, f'<div class="texts">{inner}</div>', rank == 0))
    source = folders.without_home(run.packed.meta.get("source", "the source")) if run.packed else "the source"
    title = "Pairs that the model gets most wrong" if below else "Pairs of the lowest margins"
    return (
        f'<section><h2>{title}</h2><p class="soft">{say(run.name)}: the lowest margins of '
        f"{len(margin)} {say(charts.pairs_of(run))}; not above 0: {below}"
        + (f"; without a finite score: {scored.unusable}" if scored.unusable else "")
        + f". Margin, line of {say(source)}, prompt.</p>{''.join(parts)}</section>"
    )


def evaluation(each):
    """evaluate.py's table, and items side by side: those that models judge differently first."""
    rows = []
    for line in each.table:
        low, high = line.get("ci95", (0, 0))
        test = line.get("first_model_against_it")
        rows.append(
            [
                line["task"],
                line["model"],
                line["n"],
                f"{line['accuracy']:.3f}" if line["n"] else "",
                f"{abs(low):.3f} to {high:.3f}" if line["n"] else "",
                f"{line['tokens']:.1f}" if "tokens" in line else "",
                f"{test['difference']:+.3f}" if test else "",
                f"{test['won']} won, {test['lost']} lost, p = {test['p']:.2g}" if test else "",
            ]
        )
    parts = [
        table(
            ["task", "model", "n", "accuracy", "95% interval", "tokens", "first model's lead", "McNemar's exact test"],
            rows,
            "tight",
        )
    ]
    for task, items in each.answers.items():
        differ = [
            item for item, answers in items.items() if len({bool(row["correct"]) for row in answers.values()}) > 1
        ]
        models = {model for answers in items.values() for model in answers}
        shown = (differ + [item for item in items if item not in set(differ)])[:ANSWERED]
        parts.append(
            f"<h3>{say(task)}: what {'the models' if len(models) > 1 else 'the model'} answered</h3>"
            + (
                f'<p class="soft">{len(differ)} of {len(items)} items are right in one model and wrong in another'
                f"{'; they stand first' if differ else ''}. {len(shown)} are shown.</p>"
                if len(models) > 1
                else ""
            )
            + "".join(answer(item, items[item]) for item in shown)
        )
    return f'<section><h2>Evaluation</h2><p class="soft">{say(os.path.relpath(each.path.parent))}</p>{"".join(parts)}</section>'


def answer(item, answers):
    first = next(iter(answers.values()))
    verdicts = ", ".join(f"{model} {'right' if row['correct'] else 'wrong'}" for model, row in answers.items())
    said = "".join(
        block(f"{model}: {'right' if row['correct'] else 'wrong'}", row["response"]) for model, row in answers.items()
    )
    gold = block("answer", first["answer"], " class=whole") if first.get("answer") not in (None, "") else ""
    return fold(
        f"item {say(item)} &middot; {say(verdicts)} &middot; {say(opening(str(first['prompt'])))}",
        f'<div class="texts">{block("prompt", first["prompt"], " class=whole")}{said}{gold}</div>',
    )


def configuration(runs):
    """What differs from the defaults, or between the runs; the rest folded away."""
    defaults = {item.name: item.default for group in config.GROUPS for item in fields(group)}
    names = [name for name in dict.fromkeys(name for run in runs for name in run.arguments) if name != "local_rank"]
    values = {name: [run.arguments.get(name) for run in runs] for name in names}
    if len(runs) > 1:
        head = ["argument", *(run.name for run in runs)]
        first = [name for name in names if len({str(value) for value in values[name]}) > 1]
        lead, rest, row = (
            "What differs between the runs",
            "The same in all",
            lambda name: [name, *map(shown, values[name])],
        )  # noqa: E731
    else:
        head = ["argument", "value", "default"]
        first = [name for name in names if str(values[name][0]) != str(defaults.get(name, 1))]
        lead, rest = "What differs from the defaults", "As by default"
        row = lambda name: [name, shown(values[name][0]), shown(defaults.get(name, 1))]  # noqa: E731  ranks: 1
    others = [name for name in names if name not in first]
    return (
        f"<section><h2>Configuration</h2><h3>{lead}</h3>"
        + (table(head, map(row, first)) if first else "<p>Nothing.</p>")
        + fold(f"{rest}: {len(others)} arguments", table(head, map(row, others)))
        + "</section>"
    )


def shown(value):
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def origin(runs):
    """What the runs were made of, and by which code."""
    columns = []
    for run in runs:
        record, packed = run.record, run.packed
        columns.append(
            {
                "command": " ".join(record["command"]),
                "git commit": record["git_commit"] or "not in a clone",
                "begun": record["starts"][0]["time"],
                **record["versions"],
                **{f"{name}, its fingerprint": record["inputs"].get(name) for name in ("data", "model", "tokenizer")},
            }
        )
        if packed:
            columns[-1]["source"] = folders.without_home(
                f"{packed.meta.get('source')}: {len(packed)} {packed.task}, in {os.path.normpath(packed.folder)}"
            )
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(shown(column.get(name)) for column in columns)] for name in names]
    return f"<section><h2>Where it comes from</h2>{table(['', *(run.name for run in runs)], rows)}</section>"


def skipped_steps(run):
    rows = [
        [folders.without_home(row.get(name)) for name in ("step", "pair", "line", "source", "loss")]
        for row in run.skipped
    ]
    return (
        f'<section><h2>Skipped steps</h2><p class="soft">{say(run.name)}: {len(rows)} pair(s) in skipped.jsonl'
        f"{f', the first {ROWS} here' if len(rows) > ROWS else ''}; a loss that is none was not finite.</p>"
        f"{table(['step', 'pair', 'line', 'source', 'loss'], rows[:ROWS])}</section>"
        if rows
        else ""
    )


def write(runs, made, evaluations):
    """The page."""
    palettes = [
        "; ".join([f"--{name}: {each[theme]}" for name, each in charts.COLOURS.items()] + [f"--back: {back}"])
        for theme, back in enumerate(("#f4f5f7", "#0d0f12"))
    ]
    sections = [
        header(runs),
        overview(runs),
        chart_grid(made),
        *map(wrong_pairs, runs),
        *map(evaluation, evaluations),
        configuration(runs),
        *map(skipped_steps, runs),
        origin(runs),
    ]
    title = ", ".join(run.name for run in runs)
    if len(runs) == 1:
        title += ": " + " ".join(diagnosis.headlines(runs[0])[0][:2])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{say(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">\n"""
        f'<link rel="icon" href="data:,">\n<style>{STYLE % tuple(palettes)}</style></head>\n<body><main>\n'
        + "\n".join(filter(None, sections))
        + "\n<footer>Made by report.py; this file loads nothing. The charts lie beside it as PNG.</footer>\n"
        "</main></body></html>\n"
    )
