"""Judged responses of a file: of a judge, of a reward model, of people, or evaluate.py's with their verdicts.

    {"prompt": "Q", "response": "good", "score": 9}                         one response a row
    {"prompt": "Q", "responses": ["good", "bad"], "scores": [9, 2]}         several
    {"instruction": "Q", "completions": [{"response": "good", "overall_score": 7}, ...]}      UltraFeedback's form
    {"messages": [..., {"role": "assistant", "content": "good"}], "label": true}              whole dialogues, KTO's

NAMES has the names that the columns may have. Columns that belong to the prompt, and those that are not read, are as in
data_prep.py (preferences/columns.py).
"""

import json
import math
from typing import NamedTuple

from files import InputError
from preferences import columns, sources
from preferences.messages import conversation, require_assistant, settled
from preferences.prompt import whole_prompt
from preferences.rows import repeats
from preferences.sources import Malformed

NAMES = {
    "prompt": ("prompt", "question", "instruction", "query", "input"),
    "response": ("response", "responses", "completion", "completions", "output", "generation", "generations")
    + ("messages", "conversations", "conversation"),
    "score": (
        "score",
        "scores",
        "rating",
        "ratings",
        "reward",
        "rewards",
        "overall_score",
        "label",
        "kto_tag",
        "correct",
    ),
}
INSIDE = (*NAMES["response"], *NAMES["score"])  # of an object that is one of several responses
# what responses were judged by, and what UltraFeedback's were asked for and told
ABOUT = {"answer", "answers", "gold", "extracted", "critique", "custom_system_prompt"}


class Judged(NamedTuple):
    groups: dict  # prompt as JSON -> {response: its mean score}
    responses: int  # that have a score
    left_out: int  # cut off, null, empty or without a score
    lines: list  # to print: which columns belong to the prompt and which are not read


def read(path, given=None, ignored=(), reasoning="auto"):
    """The Judged of a file. Raises InputError for a row of another form, or whose score is no finite number.

    given: {role: column} of --columns; ignored: columns that are not read; reasoning: "drop" or "inline".
    """
    given, scores_of, names_of_all, harmless = given or {}, {}, {}, dict.fromkeys(ignored)
    responses, left_out, score_columns = 0, 0, {}  # {prompt as JSON: the column of its scores}
    table = sources.read_rows([path])
    if not table:
        raise InputError(f"--in {path}: holds no row")
    columns.leave_out(table, ignored, path)
    for row in table:
        names = columns_of(row.value, given)
        prompt, pairs, others = read_row(row, names, given, reasoning)
        names_of_all |= names
        harmless |= dict.fromkeys(others)
        cut_off = row.value.get("ended") is False  # evaluate.py's: the response has no end of its own
        for text, score in pairs:
            if cut_off or score is None or not columns.says(text):
                left_out += 1
                continue
            responses += 1
            column = names.get("score", "")
            before = score_columns.setdefault(json.dumps(prompt), column)
            if column.rstrip("s") != before.rstrip("s"):
                raise InputError(
                    f"{row.place}: the score is in '{column}', and in '{before}' before: two scales cannot be "
                    "compared; keep the rows of one, or write their scores into one column"
                )
            group = scores_of.setdefault(json.dumps(prompt), {})  # {response: [score]}
            group.setdefault(text, []).append(number(score, row.place))
    groups = {prompt: mean_scores(group) for prompt, group in scores_of.items()}
    return Judged(groups, responses, left_out, columns.lines(names_of_all, harmless))


def mean_scores(group):
    """{response: [score]} -> {response: mean score}: a response may be judged twice."""
    return {text: sum(scores) / len(scores) for text, scores in group.items()}


def read_row(row, names, given, reasoning):
    """(prompt, [(response, score)], the names of the columns that are not read) of a Row; raises InputError."""
    try:
        if row.reason:
            raise Malformed(row.detail)
        prompt, pairs = parse(row.value, names, reasoning)
    except Malformed as malformed:
        raise InputError(f"{row.place}: {malformed.args[1]}") from None
    read_fields = {*INSIDE, *(columns.REASONING if reasoning != "auto" else ())}
    found, others = columns.not_read(row.value, names, [prompt, [text for text, _ in pairs]], read_fields)
    if found := {name: what for name, what in found.items() if not ABOUT & {name, *columns.words_of(name)}}:
        raise InputError(f"{row.place}: {columns.way_out(found, given)}")
    return prompt, pairs, others


def columns_of(row, given):
    """{role: the row's column} of prompt, response, score and what belongs to the prompt."""
    fields = row if isinstance(row, dict) else {}
    found = {role: next((name for name in names if name in fields), None) for role, names in NAMES.items()}
    found |= {role: name for role, name in given.items() if role in NAMES}
    found = {role: name for role, name in found.items() if name in fields}
    return found | columns.prompt_parts(fields, found, given)


def parse(row, names, reasoning):
    """(prompt, [(response, score)]) of a row, a response None where it is null; raises Malformed."""
    texts, scores = several(row, names)
    prompt, said = None, []
    if row.get(names.get("prompt")):
        prompt = conversation(row[names["prompt"]], names["prompt"])
    for text in texts:
        head, response = split(text, names["response"], reasoning)
        if head and prompt and not repeats(prompt, head, []):
            name = names["response"]
            raise Malformed(f"expected one message in '{name}' that answers the prompt, found others before it")
        prompt = head or prompt
        said.append(response)
    if not prompt:
        raise Malformed(expected(row))
    return whole_prompt(row, names, prompt, chat=True), list(zip(said, scores))


def several(row, names):
    """([response], [score]) of a row; raises Malformed."""
    fields = row if isinstance(row, dict) else {}
    texts, scores = (fields.get(names.get(role)) for role in ("response", "score"))
    are_texts = isinstance(texts, list) and all(isinstance(text, (str, type(None))) for text in texts)
    if "response" not in names or not ("score" in names or isinstance(texts, list)):
        raise Malformed(expected(fields))
    if isinstance(texts, list) and texts and all(isinstance(each, dict) and not is_message(each) for each in texts):
        scores = [first_of(each, NAMES["score"]) for each in texts]
        texts = [first_of(each, NAMES["response"]) for each in texts]
    elif scores is None and are_texts:
        scores = [None] * len(texts)
    elif "score" in names and not isinstance(scores, list) and not are_texts:
        texts, scores = [texts], [scores]
    is_of_one_length = isinstance(texts, list) and isinstance(scores, list) and len(texts) == len(scores)
    if not is_of_one_length or not all(isinstance(text, (str, list, dict, type(None))) for text in texts):
        raise Malformed(expected(fields))
    return texts, scores


def expected(fields):
    return (
        'expected a "prompt" with a "response" and a number "score", or with lists "responses" and "scores" of one '
        f"length, found {columns.listed(fields) or 'no object'}; name yours with --columns prompt=...,response=...,"
        "score=..."
    )


def is_message(fields):
    return "role" in fields or "from" in fields


def split(response, name, reasoning):
    """(the messages before a response, its text); a text has none before it, and null is no text."""
    if response is None or isinstance(response, str):
        return [], response
    *head, last = conversation(response, name)
    require_assistant(last, name)
    return head, settled(last, reasoning)["content"]


def first_of(row, names):
    """The value of the first of `names` that `row` has, else None."""
    return next((row[name] for name in names if name in row), None)


def number(score, place):
    """A finite number or truth value, also as a judge writes it: "9", "8.5"."""
    try:
        value = float(score) if isinstance(score, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place}: expected a score that is a finite number, found {json.dumps(score)[:80]}")
    return value
