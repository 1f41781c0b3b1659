"""The page of a report: one HTML file that loads nothing, for phone and desk, light and dark. Every text is escaped.

    write(runs, charts, evaluations) -> the page's text

page.css has the styles, colours.py the colours.
"""

import os
import re
from dataclasses import fields
from html import escape
from pathlib import Path

import numpy as np

import config
from reasoning import table as results
from reporting import colours, diagnosis, texts
from scoring import noise
from training.runs import without_home

WORST_PAIRS = 10  # pairs shown of those that the model gets most wrong
MOST_ANSWERS = 8  # items shown of a task
MOST_SKIPPED = 50  # rows of the table of skipped steps
CSS = Path(__file__).with_name("page.css")
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# --- pieces of HTML ---------------------------------------------------------------------------------------


def say(value):
    """A text for the page: escaped; what no file can hold, or no page shows, replaced."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text.replace("\r\n", "\n")))


def table(head, rows, kind=""):
    """A table that scrolls in its box; columns of numbers are on the right."""
    rows = [list(map(shown, row)) for row in rows]
    is_number = [is_numeric(column) for column in zip(*rows)] or [False] * len(head)

    def cells(values, tag, attribute=""):
        classes = [" class=number" if number else "" for number in is_number]
        return "".join(f"<{tag}{attribute}{cls}>{say(value)}</{tag}>" for value, cls in zip(values, classes))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="box {kind}" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{cells(head, 'th', ' scope=col')}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def shown(value):
    """The text of a cell."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_numeric(column):
    return any(column) and all(re.fullmatch(r"[-+]?[\d.]*%?", value) for value in column)


def fold(summary, inner, opened=False):
    """Something to unfold; both are HTML."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{inner}</details>"


def block(title, text, place=""):
    """A text as it is, under a title. A browser drops a newline that a <pre> starts with, so one is added."""
    return f'<div{place}><h4>{say(title)}</h4><pre dir="auto">\n{say(text)}</pre></div>'


def opening(text, length=70):
    """The first words of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= length else words[:length] + " ..."


def soft(words):
    """A paragraph of small print; the words are HTML."""
    return f'<p class="soft">{words}</p>'


def named(run, runs):
    """A sentence's start that says which of several runs it is about."""
    return f"{run.name}: " if len(runs) > 1 else ""


def given_table(given):
    """A table of a file: {"title", "note", "head", "rows"}."""
    note = soft(say(given["note"])) if given["note"] else ""
    return f"<section><h2>{say(given['title'])}</h2>{note}{table(given['head'], given['rows'], 'tight')}</section>"


# --- overview ---------------------------------------------------------------------------------------------


def key(r):
    """A dot in the colour that run r has in the charts."""
    return f'<span class="key" style="background: var(--{colours.SERIES[r].name})"></span>'


def header(runs):
    if len(runs) > 1:
        return f"<header><h1>{len(runs)} runs</h1></header>"
    [run] = runs
    args = run.arguments
    kind = "SFT" if run.sft else f"{run.loss.label} ({args['loss_type']}, beta {args['beta']:g})"
    started = run.record["starts"][0]["time"][:16].replace("T", " ")
    about = f"{kind}, model {args['model_name_or_path']}, started {started}"
    return f"<header><h1>{say(run.name)}</h1>{soft(say(about))}</header>"


def overview(runs, evaluations):
    """What was found, in words, and the headline figures."""
    notes, figures = "", ""
    for r, run in enumerate(runs):
        notes += "".join(f"<li>{say(named(run, runs) + words)}</li>" for words in diagnosis.findings(run))
        for words in diagnosis.not_measured(run, evaluations):
            command = say(diagnosis.evaluate_command(run))
            notes += f"<li>{say(named(run, runs) + words)} Run: <code>{command}</code></li>"
        if len(runs) > 1:
            figures += f"<h3>{key(r)}{say(run.name)}</h3>"
        figures += f'<dl class="tiles">{"".join(map(tile, diagnosis.headlines(run)))}</dl>'
    kind = "notes" if any(map(diagnosis.problems, runs)) else "notes good"
    return f'<section aria-label="Overview"><ul class="{kind}">{notes}</ul>{figures}</section>'


def tile(headline):
    return (
        f'<div class="tile"><dt>{say(headline.what)}</dt><dd><b>{say(headline.figure)}</b>'
        f"<small>{say(headline.note)}</small></dd></div>"
    )


# --- charts -----------------------------------------------------------------------------------------------


def chart_grid(charts):
    """The charts; a note that more than two of them have is written once, above."""
    if not charts:
        return ""
    notes = [note for chart in charts for note in chart.notes]
    common = [note for note in dict.fromkeys(notes) if notes.count(note) > 2]
    above = soft(say(" ".join(common))) if common else ""
    figures = "".join(figure(chart, common) for chart in charts)
    return f'<section><h2>Charts</h2>{above}<div class="charts">{figures}</div></section>'


def figure(chart, common):
    own_notes = [note for note in chart.notes if note not in common]
    words = " ".join(filter(None, [chart.shows, *own_notes]))
    caption = f"<figcaption>{say(words)}</figcaption>" if words else ""
    return f"<figure><h3>{say(chart.title)}</h3>{chart.svg}{caption}</figure>"


# --- pairs and answers ------------------------------------------------------------------------------------


def wrong_pairs(run):
    """The pairs of the lowest margins, with their texts."""
    if run.scored is None or not len(run.scored.pair):
        return ""
    scored, margin = run.scored, run.scored.margin
    wrong = int((margin <= 0).sum())
    places = np.argsort(margin, kind="stable")[: min(WORST_PAIRS, wrong or WORST_PAIRS)]
    pairs = "".join(pair_of(run, place, is_open=place == places[0]) for place in places)
    title = "Pairs that the model gets most wrong" if wrong else "Pairs of the lowest margins"
    is_one_file = run.packed and len(run.packed.files) == 1
    source = without_home(run.packed.meta["source"]) if is_one_file else "its file"
    about = f"{run.name}: the lowest margins of {len(margin)} {scored.description}; not above 0: {wrong}"
    if scored.unusable:
        about += f"; without a finite score: {scored.unusable}"
    about += f". Margin, line of {source}, prompt."
    return f"<section><h2>{title}</h2>{soft(say(about))}{pairs}</section>"


def pair_of(run, place, is_open):
    """One scored pair, unfolded if is_open."""
    scored = run.scored
    rewards = scored.rewards[place].sum(-1)  # (2,)
    titles = [f"{side}, reward {reward:+.3f}" for side, reward in zip(("chosen", "rejected"), rewards)]
    if scored.tokens is not None:
        titles = [f"{title}, {count} tokens" for title, count in zip(titles, scored.tokens[place])]
    summary = f"<b>{scored.margin[place]:+.3f}</b> &middot; line {scored.line[place]}"
    if run.packed and len(run.packed.files) > 1:
        summary += f" of {say(without_home(run.packed.file_of(int(scored.pair[place]))))}"
    if run.tokenizer:
        text = texts.of_pair(run, int(scored.pair[place]))
        summary += f" &middot; {say(opening(text.prompt))}"
        inner = block("prompt", text.prompt, " class=whole")
        inner += block(titles[0], text.chosen) + block(titles[1], text.rejected)
    else:
        inner = "".join(f"<p>{title}</p>" for title in titles)
    return fold(summary, f'<div class="texts">{inner}</div>', is_open)


def evaluation(found):
    """evaluate.py's table, and items side by side: those that models judge differently first."""
    head = ["task", "model", "n", "accuracy", "95% interval", "unread", "tokens"]
    head += ["first model's lead", "McNemar's exact test"]
    rows = [row for line in found.table for row in result_rows(line)]
    parts = [table(head, rows, "tight")]
    for line in found.table:
        if "sampler" in line:
            parts.append(soft(say(f"{line['task']}, {line['model']}: {results.origin(line)}; {line['sampler']}")))
    for task, items in found.answers.items():
        parts.append(task_answers(task, items))
    where = soft(say(os.path.relpath(found.path.parent)))
    return f"<section><h2>Evaluation</h2>{where}{''.join(parts)}</section>"


def result_rows(line):
    """The cells of a line of results.json's table, then those of pass@k, of levels and the like."""
    rows = [result_row(line)]
    for name, estimate in results.measures_of(line).items():
        interval = "{:.3f} to {:.3f}".format(*map(abs, estimate["ci95"])) if "ci95" in estimate else ""
        rows.append(["", name.strip(), "", f"{estimate['accuracy']:.3f}", interval, "", "", "", ""])
    return rows


def result_row(line):
    cells = [line["task"], line["model"], line["n"], "", "", "", "", "", ""]
    if line["n"]:
        low, high = line.get("ci95", (0, 0))
        cells[3:5] = f"{line['accuracy']:.3f}", f"{abs(low):.3f} to {high:.3f}"
    if "unread" in line:
        cells[5] = f"{line['unread']:.0%}"
    if "tokens" in line:
        cells[6] = f"{line['tokens']:.1f}"
    if test := line.get("first_model_against_it"):
        cells[7:] = f"{test['difference']:+.3f}", f"{test['won']} won, {test['lost']} lost, p = {test['p']:.2g}"
    return cells


def task_answers(task, items):
    """The first items of a task; items: {item: {model: row}}."""
    models = {model for answers in items.values() for model in answers}
    differing = [item for item, answers in items.items() if is_judged_differently(answers)]
    alike = [item for item in items if item not in set(differing)]
    first = (differing + alike)[:MOST_ANSWERS]
    title, about = f"{task}: what the model answered", ""
    if len(models) > 1:
        title = f"{task}: what the models answered"
        order = "; they are first" if differing else ""
        about = soft(
            f"{len(differing)} of {len(items)} items are right in one model and wrong in another{order}. "
            f"{len(first)} are shown."
        )
    return f"<h3>{say(title)}</h3>{about}" + "".join(answer(item, items[item]) for item in first)


def is_judged_differently(answers):
    return len({bool(row["correct"]) for row in answers.values()}) > 1


def verdict(row):
    if row["correct"] is None:
        return "without a readable answer"
    return "right" if row["correct"] else "wrong"


def answer(item, answers):
    """One item, and what each model answered; answers: {model: row}."""
    first = next(iter(answers.values()))
    verdicts = {model: f"{model} {verdict(row)}" for model, row in answers.items()}
    inner = block("prompt", first["prompt"], " class=whole")
    for model, row in answers.items():
        inner += block(verdicts[model], row["response"])
    if first.get("answer") not in (None, ""):
        inner += block("answer", first["answer"], " class=whole")
    summary = f"item {item} \u00b7 {', '.join(verdicts.values())} \u00b7 {opening(str(first['prompt']))}"
    return fold(say(summary), f'<div class="texts">{inner}</div>')


# --- arguments and origin ---------------------------------------------------------------------------------


def configuration(runs):
    """The arguments that differ from the defaults, or between the runs; the others are folded away."""
    names = list(dict.fromkeys(name for run in runs for name in run.arguments if name != "local_rank"))
    columns = {run.name: run.arguments for run in runs}
    title, rest = "What differs between the runs", "The same in all"
    if len(runs) == 1:
        columns = {"value": runs[0].arguments, "default": {"ranks": 1} | default_arguments(runs[0].arguments)}
        title, rest = "What differs from the defaults", "As by default"
    orders = [column["order"] for column in columns.values()]
    different, others = [], []  # rows
    for name in names:
        values = [column.get(name) for column in columns.values()]
        rows = different if differ(name, values, orders) else others
        rows.append([name, *values])
    head = ["argument", *columns]
    first = table(head, different) if different else "<p>Nothing.</p>"
    rest = fold(f"{rest}: {len(others)} arguments", table(head, others))
    return f"<section><h2>Configuration</h2><h3>{title}</h3>{first}{rest}</section>"


def default_arguments(arguments):
    """The defaults beside a run's arguments; T and R are those of its estimator."""
    found = {item.name: item.default for group in config.GROUPS for item in fields(group)}
    estimator = arguments["estimator"]
    if estimator == "auto":
        estimator = noise.automatic_estimator(arguments["order"])
    return found | dict(zip(("diffusion_steps", "trajectories"), noise.default_size(estimator)))


def differ(name, values, orders):
    """Whether one argument's values differ. An `auto` equals what it is filled in with; orders: of the same columns."""
    if name == "estimator":
        pairs = zip(values, orders)
        values = [noise.automatic_estimator(order) if value == "auto" else value for value, order in pairs]
    elif name in ("tokens_per_forward", "diffusion_steps"):  # a number that fits the card, or that was measured
        values = [value for value in values if value != "auto"]
    return len(set(map(str, values))) > 1


def origin(runs):
    """What the runs were made of, and by which code."""
    columns = [origin_of(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        rows.append([name, *(column.get(name) for column in columns)])
    return f"<section><h2>Where it comes from</h2>{table(['', *(run.name for run in runs)], rows)}</section>"


def origin_of(run):
    record, packed = run.record, run.packed
    found = {
        "command": " ".join(record["command"]),
        "git commit": record["git_commit"] or "not in a clone",
        "started": record["starts"][0]["time"],
        **record["versions"],
    }
    for name in ("data", "model", "tokenizer"):
        found[f"{name}, its fingerprint"] = record["inputs"].get(name)
    if packed:
        folder = os.path.normpath(packed.folder)
        found["source"] = without_home(f"{packed.meta.get('source')}: {len(packed)} {packed.task}, in {folder}")
    return found


def skipped_steps(run):
    if not run.skipped:
        return ""
    head = ["step", "pair", "line", "source", "loss"]
    rows = []
    for row in run.skipped[:MOST_SKIPPED]:
        rows.append([without_home(row.get(name)) for name in head])
    first = f", the first {MOST_SKIPPED} here" if len(run.skipped) > MOST_SKIPPED else ""
    about = (
        f"{run.name}: {len(run.skipped)} pair(s) in skipped.jsonl{first}. Where no loss is given, it was not finite."
    )
    return f"<section><h2>Skipped steps</h2>{soft(say(about))}{table(head, rows)}</section>"


# --- the page ---------------------------------------------------------------------------------------------


def style():
    light, dark = colours.css("light"), colours.css("dark")
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{CSS.read_text(encoding='utf-8')}"
    )


def write(runs, charts, evaluations, tables=()):
    """The page's text. charts: of charts.make(runs); tables: of evaluations.read_tables()."""
    title = ", ".join(run.name for run in runs)
    if len(runs) == 1:
        headline = diagnosis.headlines(runs[0])[0]
        title += f": {headline.what} {headline.figure}"
    sections = [
        header(runs),
        *map(given_table, tables),
        overview(runs, evaluations),
        chart_grid(charts),
        *map(wrong_pairs, runs),
        *map(evaluation, evaluations),
        configuration(runs),
        *map(skipped_steps, runs),
        origin(runs),
        "<footer>Made by report.py; this file loads nothing. The charts are beside it as PNG.</footer>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{say(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style()}</style></head>\n<body><main>\n'
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )
