"""Rows of --task kto: a prompt, one response, and whether it is desirable. A pair makes two of them.

KTO compares a response with the mean gain of responses that belong to other prompts (arXiv 2402.01306, section 4.1).
Each row is packed with one such response, in the place of a pair's rejected one, so that its scores are stored, too.
"""

import dataclasses

import numpy as np

from preferences.forms import word_of
from preferences.rows import shown
from preferences.sources import LeftOut, Malformed

WORDS = {"1": True, "true": True, "0": False, "false": False, "-1": False}  # of a label
SEED = 0  # of the order in which rows lend their responses


def labelled(table, columns):
    """The rows of a file that was read, each with its label: from its column, or two rows of each pair."""
    made = []
    for row in table:
        if row.reason:
            made.append(row)
        elif "label" in columns:
            try:
                row.label = label_of(row.value, columns["label"])
            except LeftOut as left_out:
                row.leave_out(*left_out.args)
            made.append(row)
        else:
            prompt, sides = row.parts
            made += [
                dataclasses.replace(row, parts=(prompt, [side]), label=label)
                for side, label in zip(sides, (True, False))
            ]
    return made


def label_of(value, name):
    """Whether the response of a row is desirable; raises LeftOut."""
    if value.get(name) is None:
        raise LeftOut("no label", f"'{name}' is null")
    label = WORDS.get(word_of(value.get(name)))
    if label is None:
        raise Malformed(f"expected '{name}' to be true or false, found {shown(value.get(name))}")
    return label


def add_mismatched(rows, max_length):
    """Put the response of another prompt in third place of each row's ids (prompt, response, nothing).

    In a random order of the rows, each takes the next response that is of another prompt and fits beside its own
    within `max_length` tokens. Rows that find none are left out.
    """
    order = np.random.default_rng(SEED).permutation(len(rows)).tolist()
    ids = [row.ids for row in rows]
    keys = [np.asarray(prompt, np.uint32).tobytes() for prompt, *_ in ids]
    is_alone = len(set(keys)) < 2
    for place, index in enumerate(order):
        prompt, response, _ = ids[index]
        room = max_length - len(prompt)
        others = [] if is_alone else order[place + 1 :] + order[:place]
        fitting = (ids[other][1] for other in others if keys[other] != keys[index] and len(ids[other][1]) <= room)
        if (found := next(fitting, None)) is None:
            rows[index].leave_out("no other prompt", "whose response fits beside this prompt, for KTO's KL term")
        else:
            rows[index].ids = (prompt, response, found)
