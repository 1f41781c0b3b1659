"""Print evaluate.py's table: a block for each task, at most 120 columns wide unless names are very long.

arithmetic: 200 items
model                      accuracy   95% interval  unread  ended  tokens
a-final                       0.810   0.750-0.859      0%   100%    20.1
  base examples/tiny, adapter runs/a/final; --gen_length 40 --block_length 8 --steps 40
examples-tiny                 0.760   0.696-0.814      0%   100%    20.3
  examples/tiny; --gen_length 40 --block_length 8 --steps 40
  a-final against it: +0.050 (20 won, 10 lost, p = 0.099)
"""

import textwrap

from reasoning import comparison

WIDTH = 120
GAP = "  "


def print_table(table):
    """Print lines that comparison.summary() made, with "base", "adapter" and "sampler", grouped by their task."""
    tasks = {}
    for line in table:
        tasks.setdefault(line["task"], []).append(line)
    for place, (task, lines) in enumerate(tasks.items()):
        if place:
            print()
        print_task(task, lines)


def print_task(task, lines):
    """Print the block of a task. The first line is the first model's."""
    items, first = lines[0]["n"], lines[0]["model"]
    samples = f", {lines[0]['samples']} samples each" if "samples" in lines[0] else ""
    protocol = f" by the protocol {lines[0]['protocol']}" if lines[0].get("protocol") else ""
    print(f"{task}{protocol}: {items} items{samples}")
    if published := lines[0].get("published"):
        print_folded(f"published: {published}")
    if not items:
        return
    measures = [measures_of(line) for line in lines]
    width = max(len(name) for line, each in zip(lines, measures) for name in (line["model"], *each))
    print(f"{'model':{width}}  accuracy   95% interval  unread  ended  tokens")
    for line, each in zip(lines, measures):
        print(cells(line["model"], line, width) + shares(line))
        print_folded(f"{origin(line)}; {line['sampler']}")
        for name, estimate in each.items():
            print(cells(name, estimate, width))
        if test := line.get("first_model_against_it"):
            print_test(first, test, line)
    if len(lines) == 1:
        print_folded(f"to compare models: {comparison.gain_line_of_share(items)}")


def measures_of(line):
    """{name: {"accuracy", "ci95"}} of what stands in lines of its own under a model's."""
    found = {}
    for k, estimate in line.get("pass_at", {}).items():
        if k != "1":  # the model's own line
            found[f"{GAP}pass@{k}"] = {"accuracy": estimate["value"], "ci95": estimate["ci95"]}
    if majority := line.get("majority"):
        found[f"{GAP}majority@{line['samples']}"] = {"accuracy": majority["value"], "ci95": majority["ci95"]}
    names = {
        "f1": "F1",
        "cells": "cells",
        "lm_eval": "by lm_eval's filter",
        "by_protocol": "by the protocol's own reader",
    }
    found |= {GAP + name: {"accuracy": line[key]} for key, name in names.items() if key in line}
    for group, parts in line.get("by", {}).items():
        for value, part in parts.items():
            found[f"{GAP}{group} {value} (n = {part['n']})"] = part
    return found


def cells(name, estimate, width):
    """The name, a figure and its interval where it has one."""
    text = f"{name:{width}}{estimate['accuracy']:10.3f}"
    if "ci95" not in estimate:
        return text
    low, high = estimate["ci95"]
    return text + f"{f'{abs(low):.3f}-{high:.3f}':>15}"  # abs: no -0.000


def shares(line):
    """The shares without a readable answer and with an end of their own, and the mean length."""
    text = f"{line['unread']:8.0%}"
    return text + (f"{line['ended']:7.0%}{line['tokens']:8.1f}" if "ended" in line else "")


def origin(line):
    return f"base {line['base']}, adapter {line['adapter']}" if line["adapter"] else line["base"]


def print_test(first, test, line):
    """McNemar's test of the first model against this line's, and how large a gain these items can show."""
    verdict = f"{test['difference']:+.3f} ({test['won']} won, {test['lost']} lost, p = {test['p']:.2g})"
    if gain := test.get("pass@1"):
        low, high = gain["ci95"]
        print_folded(f"{first} against it, pass@1: {gain['value']:+.3f} (95% interval {low:+.3f} to {high:+.3f})")
        print_folded(f"{first} against it, majority@{line['samples']}: {verdict}")
    else:
        print_folded(f"{first} against it: {verdict}")
    print_folded(comparison.gain_line(line["n"], test["won"] + test["lost"]))


def print_folded(text):
    print(textwrap.fill(text, WIDTH, initial_indent=GAP, subsequent_indent=2 * GAP, break_on_hyphens=False))
