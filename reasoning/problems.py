"""Problems of a user's own .jsonl file: what make_prefs.py samples from and evaluate.py measures on.

{"prompt": "7 and 5?", "answer": 12}          {"question": "...", "answer": "7 + 5 = 12\\n#### 12"}
{"problem": "...", "answer": "\\\\frac{1}{2}"}  {"prompt": [{"role": "user", "content": "..."}], "answer": "(B)"}
"""

from typing import NamedTuple

from files import InputError
from reasoning import answers, prompts

PROMPT = ("prompt", "question", "problem")  # the names that its column may have: ours, GSM8K's, MATH's


class Own(NamedTuple):
    """A problem of a user's file."""

    prompt: str | list  # a text or messages
    text: str  # of its messages
    kind: str  # of answer, a name in answers.KINDS
    answer: str  # gold
    place: str  # FILE:LINE


def read(path):
    """[Own] of a file. Raises InputError for a row without a prompt, or whose answer cannot be verified."""
    found = [own(row, place) for place, row in prompts.read_rows(path).items()]
    if any(each.kind == "expression" for each in found):
        answers.import_math_verify()  # which may not be installed
    return found


def own(row, place):
    fields = row if isinstance(row, dict) else {}
    prompt = next((fields[name] for name in PROMPT if name in fields), None)
    if not prompt or not isinstance(fields.get("answer"), (str, int, float)):
        raise InputError(
            f'{place}: expected a "prompt" (or "question", "problem") and an "answer", such as "8" or a solution that '
            'ends in "#### 8"'
        )
    answer = str(fields["answer"])
    gold = answers.gold(answer)
    if gold is None:
        raise InputError(
            f"{place}: the answer {answer[-40:]!r} is nothing that can be verified; expected a number, an expression, "
            'the letter of an option or a few words, such as "8" or a solution that ends in "#### 8"'
        )
    text = "\n".join(message["content"] for message in prompts.messages_of(prompt, place))
    return Own(prompt, text, gold.kind, gold.text, place)
