"""Rows that hold more than one pair: several rejected responses of one chosen, or one list of ranked responses.

    {"prompt": "Q", "chosen": "5", "rejected": ["6", "7"]}                     5 over 6, 5 over 7
    {"prompt": "Q", "answers": [{"answer": "5", "rank": 1}, ...]}              the best over each other; Nectar's form

Each pair becomes a Row of its own with the number of the row that it came from.
"""

import dataclasses
import json
import math

from preferences.forms import TEXTS, is_ranked, number_or_nan
from preferences.sources import LeftOut, Malformed, kind


def one_pair_each(table, columns):
    """(rows of one pair each, their columns) of the rows and columns of a file of preferences."""
    if "first" in columns:
        return table, columns
    if "rejected" in columns:
        read_lists([row.value for row in table if isinstance(row.value, dict)], columns)
    made = []
    for row in table:
        if row.reason or not isinstance(row.value, dict):
            made.append(row)
            continue
        try:
            values = ranked_pairs(row.value, columns) if "ranked" in columns else rejected_pairs(row.value, columns)
            made += [dataclasses.replace(row, value=value) for value in values]
        except LeftOut as left_out:
            row.leave_out(*left_out.args)
            made.append(row)
    if "ranked" in columns:
        columns = {name: columns[name] for name in columns if name != "ranked"}
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    return made, columns


def read_lists(tables, columns):
    """Read lists of rejected texts that are written as JSON, in place, where half of the rows have one.

    Where the chosen one is JSON, too, both are answers of that kind, and stay texts.
    """
    chosen, rejected = columns["chosen"], columns["rejected"]
    plain = [table for table in tables if not str(table.get(chosen)).lstrip().startswith(("[", "{"))]
    written = [(table, texts) for table in plain if (texts := list_in(table.get(rejected)))]
    if 2 * len(written) >= len(tables):
        for table, texts in written:
            table[rejected] = texts


def list_in(value):
    """The list of texts that a text writes as JSON, or []."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return []
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return []
    return found if all(isinstance(each, str) for each in found) else []


def rejected_pairs(row, columns):
    """The values of the pairs of a row with a list of rejected responses, or the row's own."""
    chosen, rejected = columns["chosen"], columns["rejected"]
    if are_several(row.get(chosen)):
        if len(row[chosen]) > 1:
            raise Malformed(f"expected one response in '{chosen}', found a list of {len(row[chosen])}")
        row = row | {chosen: row[chosen][0]}
    return [row | {rejected: each} for each in row[rejected]] if are_several(row.get(rejected)) else [row]


def are_several(responses):
    """Whether a value is a list of responses: of texts, of dialogues, or of messages of the assistant alone."""
    if not isinstance(responses, list) or not responses:
        return False
    if all(isinstance(each, str) for each in responses) or all(isinstance(each, list) for each in responses):
        return True
    roles = [each.get("role", each.get("from")) for each in responses if isinstance(each, dict)]
    return len(roles) == len(responses) > 1 and None not in roles and len(set(map(str, roles))) == 1


def ranked_pairs(row, columns):
    """The values of the pairs of a row of ranked responses: the best with each of a worse rank."""
    name = columns["ranked"]
    answers = row.get(name)
    if not is_ranked(answers) or not all(isinstance(each, dict) for each in answers):
        raise Malformed(f"expected '{name}' to be a list of responses with ranks, found {kind(answers)}")
    pairs = [(number_or_nan(each.get("rank")), response_in(each)) for each in answers]
    if any(math.isnan(rank) or response is None for rank, response in pairs):
        raise Malformed(f"expected a text and a number 'rank' in each of '{name}', found one without")
    best = min(rank for rank, _ in pairs)
    first = next(response for rank, response in pairs if rank == best)
    worse = [response for rank, response in pairs if rank > best]
    if not worse:
        raise LeftOut("no preference", f"all ranks in '{name}' are equal")
    return [row | {"chosen": first, "rejected": response} for response in worse]


def response_in(answer):
    return next((answer[name] for name in TEXTS if name in answer), None)
