"""Which form a file of rows has, recognised by its columns; rows.py reads the rows.

FORMS has the forms of preferences and of SFT rows under the names that data_prep.py prints. A form that differs from
these in its column names alone needs an entry there and nothing else. A/B forms have two responses and a column that
says which one is preferred; their columns are put together from SIDES, PREFERENCE and ASKED.
"""

import itertools
import json

from files import InputError, shorten
from preferences.sources import kind

COLUMNS = {"preferences": ("prompt", "chosen", "rejected"), "sft": ("prompt", "response")}  # what a row holds, by task

# {task: {form: the columns that hold COLUMNS[task]}}; None: no prompt column, the responses are whole dialogues
FORMS = {
    "preferences": {
        "OpenAI preference": ("input", "preferred_output", "non_preferred_output"),
        "prompt, chosen, rejected": ("prompt", "chosen", "rejected"),
        "LLaMA-Factory conversations": ("conversations", "chosen", "rejected"),
        "LLaMA-Factory instruction": ("instruction", "chosen", "rejected"),
        "question, chosen, rejected": ("question", "chosen", "rejected"),
        "query, chosen, rejected": ("query", "chosen", "rejected"),
        "input, chosen, rejected": ("input", "chosen", "rejected"),
        "question, response_j over response_k": ("question", "response_j", "response_k"),
        "implicit prompt": (None, "chosen", "rejected"),
    },
    "sft": {
        "prompt, response": ("prompt", "response"),
        "prompt, completion": ("prompt", "completion"),  # TRL's
        "question, answer": ("question", "answer"),  # GSM8K's
        "instruction, output": ("instruction", "output"),  # Alpaca's
        "messages": (None, "messages"),
        "conversations": (None, "conversations"),  # ShareGPT's
    },
}
# columns that belong to the prompt where its column is named so: Alpaca's and LLaMA-Factory's
PROMPT_PARTS = {"instruction": ("input", "history")}

ASKED = ("prompt", "question", "instruction", "query", "input", "history", "context")  # prompt columns of A/B forms
PREFERENCE = ("preference", "preferred", "winner", "choice", "better_response_id", "label", "labels")
# two response columns, and what a preference column calls the first and the second (beside the columns' own names)
SIDES = {}
for _name in ("response", "answer", "completion", "output"):
    SIDES[f"{_name}_a", f"{_name}_b"] = SIDES[f"{_name}_A", f"{_name}_B"] = (("a", "model_a"), ("b", "model_b"))
    SIDES[f"{_name}_0", f"{_name}_1"] = (("0",), ("1",))
    SIDES[f"{_name}_1", f"{_name}_2"] = (("1",), ("2",))
SIDES["human_ref_A", "human_ref_B"] = (("1",), ("0",))  # SHP: labels is 1 where A is preferred
SIDES["conversation_a", "conversation_b"] = (("model_a", "a"), ("model_b", "b"))  # Chatbot Arena: whole dialogues

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of hh-rlhf's dialogues, which are strings

# columns that no form may leave unread: they may hold the prompt, a part of it, or a judgement of the response
PROMPTS = {*ASKED, "user", "user_prompt", "messages", "conversation", "conversations", "problem", "text"}
MORE = ("input", "history", "context")
JUDGED = ("label", "score", "rating")
SINGLE = {"response", "completion", "answer", "output", "messages"}  # columns of SFT rows


def parse_columns(text, task):
    """'prompt=question,chosen=a' -> {"prompt": "question", "chosen": "a"}"""
    columns = {}
    for part in text.split(",") if text else ():
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if ours not in COLUMNS[task] or not theirs:
            expected = ",".join(f"{name}=NAME" for name in COLUMNS[task])
            raise InputError(f"--columns {text}: expected {expected}, found '{part}'")
        columns[ours] = theirs
    return columns


def find_columns(task, rows, given, path):
    """(columns, form): the file's column for each of COLUMNS[task], and the name of the form.

    Without "prompt" the responses are whole dialogues. An A/B form has "first", "second" and "preference" in place of
    "chosen" and "rejected". given: the columns that --columns names. Raises InputError where no form fits, and where a
    column that no one would read may matter.
    """
    present = list(dict.fromkeys(name for row in objects(rows) for name in row.value))
    for name in given.values():
        if present and name not in present:
            raise InputError(f"{path}: no column '{name}'; the columns are {listed(present)}")
    candidates = []
    for form, names in FORMS[task].items():
        columns = {ours: theirs for ours, theirs in zip(COLUMNS[task], names) if theirs}
        candidates.append((form, columns | given))
    if task == "preferences" and present and not given:
        candidates += ab_forms(set(present))
    if not (found := choose(candidates, rows, set(present))):
        expected = ",".join(f"{name}=..." for name in COLUMNS[task])
        raise InputError(
            f"{path}: {why_unknown(task, present)}; the columns are {listed(present)}; "
            f"name yours with --columns {expected}, or rewrite the rows so"
        )
    form, columns = found
    if "first" in columns:
        refuse_zero(rows, columns, path)
    elif task == "preferences" and "prompt" not in columns:
        refuse_other_prompt(rows, present, columns, path)
    elif task == "sft" and not given:
        refuse_unread(rows, columns, path)
    return columns, "--columns" if given else form


def objects(rows):
    """The rows that are JSON objects."""
    return [row for row in rows if isinstance(row.value, dict)]


def listed(names):
    """Names on one line, whatever is in them."""
    return shorten(", ".join(name if name.isprintable() else json.dumps(name) for name in names), 300)


def ab_forms(present):
    """Yields (form, columns) of every A/B form that these columns may be."""
    for (first, second), preference in itertools.product(SIDES, PREFERENCE):
        form = f"A/B ({first}, {second}, preferred by {preference})"
        columns = {"first": first, "second": second, "preference": preference}
        prompts = [{}] if first == "conversation_a" else [{"prompt": name} for name in ASKED]
        for prompt in prompts:
            if present.issuperset([*prompt.values(), *columns.values()]):
                yield form, prompt | columns


def choose(candidates, rows, present):
    """The first (form, columns) whose columns half of the rows have, so that a stray row does not decide for all;
    else the first whose columns all occur in the file; None if there is none."""
    possible = [each for each in candidates if not present or present.issuperset(each[1].values())]
    tables = [row.value.keys() for row in objects(rows)]
    for form, columns in possible:
        needed = set(columns.values())
        if 2 * sum(needed <= names for names in tables) >= len(tables):
            return form, columns
    return possible[0] if possible else None


def why_unknown(task, present):
    """What is wrong with columns of no known form."""
    present = set(present)
    if task == "sft":
        if present >= {"chosen", "rejected"}:
            return "these look like preferences, which are packed without --task sft (or add --columns response=chosen)"
        return "no known form of --task sft has these columns"
    two_responses = any(present.issuperset(pair) for pair in SIDES)
    if present >= {"completion", "label"}:
        return "these are single judged responses, and DPO needs pairs (make_prefs.py --strategy label makes them)"
    if not two_responses and not present & {"chosen", "rejected"} and present & SINGLE:
        return "these look like single responses, which --task sft packs"
    if two_responses and present.intersection(ASKED):
        return f"two responses, and no column that says which is preferred ({', '.join(PREFERENCE)})"
    return "no known form has these columns"


def refuse_zero(rows, columns, path):
    """Refuse 0 beside 1 and 2, which name the two responses: where there is a 0, 1 may be either of them."""
    first, second, preference = columns["first"], columns["second"], columns["preference"]
    words = {word_of(row.value.get(preference)) for row in objects(rows)}
    if SIDES[first, second] == (("1",), ("2",)) and "0" in words:
        raise InputError(
            f"{path}: '{preference}' is 0 in some rows, which names neither {first} nor {second}; rewrite it as 1 or 2"
        )


def word_of(preference):
    """A preference as a word: 1.0 -> "1", True -> "1", "A" -> "a"."""
    if isinstance(preference, (list, dict)):
        return kind(preference)
    if isinstance(preference, (bool, float)) and float(preference).is_integer():
        preference = int(preference)
    return str(preference).strip().lower()


def refuse_other_prompt(rows, present, columns, path):
    """Refuse responses that are not whole dialogues, without a prompt, beside a column that may hold the prompt."""
    sides = [row.value.get(columns["chosen"]) for row in objects(rows)]
    if all(is_dialogue(side) for side in sides if side and isinstance(side, (str, list))):
        return
    for name in present:
        if name.lower() in PROMPTS:
            sentence = (
                f"a column '{name}' beside {columns['chosen']} and {columns['rejected']}, which are not whole "
                f"dialogues; if it holds the prompt: --columns prompt={name}; if not, leave it out of the file"
            )
            refuse_or_leave_out(rows, name, path, sentence)


def is_dialogue(side):
    """Whether a response holds the turns before it, too."""
    return side.startswith(HUMAN) if isinstance(side, str) else len(side) > 1


def refuse_unread(rows, columns, path):
    """Refuse SFT rows with another column that judges the response, or may be a part of the prompt."""
    named = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
    for name in JUDGED:
        sentence = (
            f"a column '{name}' says that some responses are bad ones, and SFT would learn them all; pair them "
            f"(make_prefs.py --strategy label), keep the good rows, or say --columns {named}"
        )
        refuse_or_leave_out(rows, name, path, sentence, even_empty=True)
    read = {*columns.values(), *PROMPT_PARTS.get(columns.get("prompt"), ())}
    for name in MORE:
        if name not in read:
            sentence = (
                f"a column '{name}' beside {' and '.join(columns.values())} would be left out; write it into the "
                "prompt, or name the columns to read with --columns prompt=...,response=..."
            )
            refuse_or_leave_out(rows, name, path, sentence)


def refuse_or_leave_out(rows, name, path, sentence, even_empty=False):
    """Refuse the file if half of its rows fill the unread column `name`. If fewer do, they are malformed."""
    tables = objects(rows)
    filled = [row for row in tables if name in row.value and (even_empty or row.value[name])]
    if filled and 2 * len(filled) >= len(tables):
        raise InputError(f"{path}: {sentence}")
    for row in filled:
        row.leave_out("malformed", sentence)
