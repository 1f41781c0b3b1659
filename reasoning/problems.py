"""Problems of a user's own file: what make_prefs.py samples from and evaluate.py measures on.

    {"prompt": "7 and 5?", "answer": 12}          {"question": "...", "answer": "7 + 5 = 12\\n#### 12"}
    {"problem": "...", "answer": "\\\\frac{1}{2}"}  {"prompt": [{"role": "user", "content": "..."}], "answer": "(B)"}

Columns that belong to the prompt, and those that are not read, are as in data_prep.py (preferences/columns.py).
"""

from typing import NamedTuple

from files import InputError
from preferences import columns, sources
from preferences.prompt import whole_prompt
from preferences.sources import Malformed
from reasoning import answers, prompts

PROMPT = ("prompt", "question", "problem")  # ours, GSM8K's, MATH's
NAMES = {"prompt": PROMPT, "answer": ("answer",)}  # {role: names that its column may have}
WORKED = {"prompt": PROMPT, "answer": ("response", "solution", "answer")}  # where the answer is a worked solution
ROLES = (*NAMES, *columns.PARTS)  # what --columns names
SOLUTION = ("answer", "solution", "rationale", "explanation")  # columns that say what the answer is, too


class Own(NamedTuple):
    """A problem of a user's file."""

    prompt: str | list  # a text or messages
    text: str  # of its messages
    kind: str  # of answer, a name in answers.KINDS
    answer: str  # gold
    solution: str  # what the column of the answer holds
    place: str  # FILE:LINE


def read(path, given=None, ignored=(), names=NAMES):
    """[Own] of a file; prints which columns are part of the prompt, and which are not read.

    given: {role: column} of --columns; ignored: names of --ignore_columns. Raises InputError for a row without a
    prompt, whose answer cannot be verified, or with a text that nothing reads.
    """
    table = sources.read_rows([path])
    if not table:
        raise InputError(f"--in {path}: holds no row")
    columns.leave_out(table, ignored, path)
    found, read_columns, harmless = [], {}, list(ignored)
    for row in table:
        used = columns_of(row.value, names, given or {})
        each, others = own(row, used, given or {}, ignored)
        found.append(each)
        read_columns |= used
        harmless += others
    for line in columns.lines(read_columns, harmless):
        print(f"{path}: {line}", flush=True)
    if any(each.kind == "expression" for each in found):
        answers.import_math_verify()  # which may not be installed
    return found


def columns_of(row, names, given):
    """{role: the row's column} of the prompt, its parts and the answer."""
    fields = row if isinstance(row, dict) else {}
    found = {role: next((name for name in each if name in fields), None) for role, each in names.items()}
    found |= {role: name for role, name in given.items() if role in names}
    found = {role: name for role, name in found.items() if name in fields}
    return found | columns.prompt_parts(fields, found, given)


def own(row, names, given, ignored):
    """(Own, [harmless column that is not read]) of a Row; names: {role: column}."""
    fields = row.value if isinstance(row.value, dict) else {}
    prompt, answer = (fields.get(names.get(role)) for role in NAMES)
    if not prompt or not isinstance(answer, (str, int, float)):
        raise InputError(
            f'{row.place}: expected a "prompt" (or "question", "problem") and an "answer", such as "8" or a solution '
            'that ends in "#### 8"; name yours with --columns prompt=...,answer=...'
        )
    gold = answers.gold(str(answer))
    if gold is None:
        raise InputError(
            f"{row.place}: the answer {str(answer)[-40:]!r} is nothing that can be verified; expected a number, an "
            'expression, the letter of an option or a few words, such as "8" or a solution that ends in "#### 8"'
        )
    prompts.messages_of(prompt, row.place)
    try:
        prompt = whole_prompt(fields, names, prompt, chat=True)
    except Malformed as malformed:
        raise InputError(f"{row.place}: {malformed.args[1]}") from None
    solution = [name for name in SOLUTION if name in fields and name not in names.values()]
    others = {name: value for name, value in fields.items() if name not in solution}
    unread, harmless = columns.not_read(others, names, [prompt])
    if unread := {name: what for name, what in unread.items() if name not in ignored}:
        raise InputError(f"{row.place}: {columns.way_out(unread, given)}")
    text = "\n".join(message["content"] for message in prompts.messages_of(prompt, row.place))
    return Own(prompt, text, *gold, str(answer), row.place), [*harmless, *solution]
