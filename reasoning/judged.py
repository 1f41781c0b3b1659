"""Judged responses of a .jsonl file: of a judge, of a reward model, of people, or evaluate.py's with their verdicts.

    {"prompt": "Q", "response": "good", "score": 9}                         one response a line
    {"prompt": "Q", "responses": ["good", "bad"], "scores": [9, 2]}         several
    {"instruction": "Q", "completions": [{"response": "good", "overall_score": 7}, ...]}      UltraFeedback's form

PROMPT, RESPONSE and SCORE are the names that the columns may have.
"""

import json
import math
from typing import NamedTuple

from files import InputError
from reasoning import prompts

PROMPT = ("prompt", "question", "instruction")
RESPONSE = ("response", "responses", "completion", "completions", "output", "generation", "generations")
SCORE = ("score", "scores", "rating", "ratings", "reward", "rewards", "overall_score", "label", "correct")
MISSING = object()  # no such column; None is a value: no judge has scored the response


class Judged(NamedTuple):
    groups: dict  # prompt as JSON -> {response: its mean score}
    responses: int  # that have a score
    left_out: int  # cut off, empty or without a score


def read(path):
    """The Judged of a file. Raises InputError for a line of another form, or whose score is no finite number."""
    scores_of = {}  # prompt as JSON -> {response: [score]}
    responses = left_out = 0
    for place, row in prompts.read_rows(path).items():
        prompt, pairs = parse(row, place)
        cut_off = row.get("ended") is False  # evaluate.py's: the response has no end of its own
        for text, score in pairs:
            if cut_off or score is None or not text.strip():
                left_out += 1
                continue
            responses += 1
            group = scores_of.setdefault(json.dumps(prompt), {})
            group.setdefault(text, []).append(number(score, place))
    groups = {prompt: mean_scores(group) for prompt, group in scores_of.items()}
    return Judged(groups, responses, left_out)


def mean_scores(group):
    """{response: [score]} -> {response: mean score}: a response may be judged twice."""
    return {text: sum(scores) / len(scores) for text, scores in group.items()}


def parse(row, place):
    """(prompt, [(response, score)]) of a line; place: FILE:LINE, for messages."""
    fields = row if isinstance(row, dict) else {}
    prompt, texts, scores = (first_of(fields, names) for names in (PROMPT, RESPONSE, SCORE))
    if isinstance(texts, list) and texts and all(isinstance(text, dict) for text in texts):
        scores = [first_of(each, SCORE, None) for each in texts]
        texts = [first_of(each, RESPONSE, None) for each in texts]
    if not isinstance(texts, list):
        texts, scores = [texts], [scores]
    has_texts = all(isinstance(text, str) for text in texts)
    has_scores = isinstance(scores, list) and len(scores) == len(texts) and MISSING not in scores
    if prompt is MISSING or not prompt or not has_texts or not has_scores:
        raise InputError(
            f'{place}: expected a "prompt" with a "response" and a number "score", or with lists "responses" and '
            f'"scores" of one length, found {", ".join(fields) or "no object"}'
        )
    return prompt, list(zip(texts, scores))


def first_of(row, names, otherwise=MISSING):
    """The value of the first of `names` that `row` has."""
    return next((row[name] for name in names if name in row), otherwise)


def number(score, place):
    """A finite number or truth value, also as a judge writes it: "9", "8.5"."""
    try:
        value = float(score) if isinstance(score, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place}: expected a score that is a finite number, found {json.dumps(score)[:80]}")
    return value
