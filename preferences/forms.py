"""Which form a file of rows has, recognised by its columns; rows.py reads the rows.

A form of preferences is a column of ASKED, or none, with two columns of ANSWERS; an A/B form has two responses of SIDES
and what says which one is preferred; a ranked form has one list of responses with ranks. A form that differs from these
in its column names alone needs an entry there and nothing else. The names of the columns are the name of the form,
which data_prep.py prints.
"""

import itertools
import math
import re

from files import InputError
from preferences.columns import PARTS, listed, prompt_parts, refuse_judged
from preferences.sources import as_text, kind

# what a row holds, by task
COLUMNS = {
    "preferences": ("prompt", "chosen", "rejected"),
    "sft": ("prompt", "response"),
    "kto": ("prompt", "response", "label"),
}

# names of the prompt's column, the first that a file has
ASKED = ("prompt", "question", "instruction", "query", "input", "conversations", "conversation", "messages")
ASKED += ("history", "context")
# two columns of responses, the better first. None of ASKED may be there: the responses are whole dialogues
ANSWERS = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),  # OpenAI's
    ("chosen_messages", "rejected_messages"),  # LLaMA-Factory's v1
    ("chosen_response", "rejected_response"),  # Argilla's, axolotl's
    ("response", "rejected_response"),  # ms-swift's
    ("messages", "rejected_response"),  # ms-swift's: messages end in the better response
    ("messages", "rejected_messages"),
    ("conversation", "rejected_response"),
    ("conversations", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),  # XTuner's
    ("response_j", "response_k"),  # stack-exchange-paired
)
# columns of SFT rows. None: no prompt column, the response is the last of the messages
DEMONSTRATIONS = (
    *itertools.product(("prompt", "question", "instruction", "query"), ("response", "completion", "answer", "output")),
    ("input", "output"),
    (None, "messages"),
    (None, "conversations"),  # ShareGPT's
    (None, "conversation"),
)
LABELS = ("label", "kto_tag")  # whether a response is desirable: TRL's and LLaMA-Factory's names
PREFERENCE = ("preference", "preferred", "winner", "choice", "better_response_id", "label", "labels")
STRENGTH = ("preference_strength", "overall_preference")  # HelpSteer's: below 0 the first is better, above 0 the second
WINNERS = ("winner_model_a", "winner_model_b")  # Chatbot Arena's: 1 in the column of the winner, 0 in both for a tie
# two response columns, and what a preference column calls the first and the second (beside the columns' own names)
SIDES = {}
for _name in ("response", "answer", "completion", "output"):
    SIDES[f"{_name}_a", f"{_name}_b"] = SIDES[f"{_name}_A", f"{_name}_B"] = (("a", "model_a"), ("b", "model_b"))
    SIDES[f"{_name}_0", f"{_name}_1"] = SIDES[f"{_name}0", f"{_name}1"] = (("0",), ("1",))
    SIDES[f"{_name}_1", f"{_name}_2"] = SIDES[f"{_name}1", f"{_name}2"] = (("1",), ("2",))
SIDES["human_ref_A", "human_ref_B"] = (("1",), ("0",))  # SHP: labels is 1 where A is preferred
SIDES["conversation_a", "conversation_b"] = (("model_a", "a"), ("model_b", "b"))  # Chatbot Arena: whole dialogues
RANKED = (
    "answers",
    "responses",
    "completions",
    "candidates",
)  # lists of {TEXTS: text, "rank": 1 for the best}; Nectar's
TEXTS = ("answer", "response", "completion", "text", "content")

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of hh-rlhf's dialogues, which are strings

WORSE = re.compile("reject|worse|dispreferred|disliked|bad", re.I)  # names of columns of rejected responses
SINGLE = {"response", "completion", "answer", "output", "messages"}  # columns of SFT rows


def roles(task):
    """What --columns may name, by task."""
    return (*COLUMNS[task], *PARTS)


def find_columns(task, rows, given, path):
    """(columns, form): the file's column for each of COLUMNS[task] and of columns.PARTS, and the name of the form.

    Without "prompt" the responses are whole dialogues. In place of "chosen" and "rejected", an A/B form has "first",
    "second" and "preference" (or "first_wins" and "second_wins"), and a ranked form has "ranked".

    given: the columns that --columns names. Raises InputError where no form fits.
    """
    present = list(dict.fromkeys(name for row in objects(rows) for name in row.value))
    for name in given.values():
        if present and name not in present:
            raise InputError(f"{path}: no column '{name}'; the columns are {listed(present)}")
    ours = {role: name for role, name in given.items() if role not in PARTS}
    candidates = [(form, columns | ours) for form, columns in forms_of(task)]
    if task == "kto":  # of a pair, both responses
        candidates += [(form, columns | ours) for form, columns in forms_of("preferences")]
    if task != "sft" and not {"chosen", "rejected"} & ours.keys():
        candidates += [(form, columns | ours) for form, columns in judged_forms(rows, ours)]
    if not (found := choose(candidates, rows, set(present))):
        expected = ",".join(f"{name}=..." for name in COLUMNS[task])
        raise InputError(
            f"{path}: {why_unknown(task, present)}; the columns are {listed(present)}; "
            f"name yours with --columns {expected}, or rewrite the rows so"
        )
    form, columns = found
    if columns.get("preference") in PREFERENCE:
        refuse_other_numbers(rows, columns, path)
    elif "chosen" in columns and "prompt" not in columns:
        refuse_other_prompt(rows, present, columns, path)
    elif task == "sft" and not ours:
        refuse_judged(rows, columns, path)
    return columns | prompt_parts(present, columns, given), "--columns" if ours else form


def objects(rows):
    """The rows that are JSON objects."""
    return [row for row in rows if isinstance(row.value, dict)]


def forms_of(task):
    """Yields (form, columns) of the forms that their columns alone tell."""
    several = DEMONSTRATIONS
    if task == "kto":
        several = [(*names, label) for names in DEMONSTRATIONS for label in LABELS]
    if task == "preferences":
        several = [(prompt, *pair) for pair in ANSWERS for prompt in (*ASKED, None) if prompt not in pair]
        several = [names for names in several if not (names[0] and names[1] == "messages")]  # they hold the prompt
    for names in several:
        columns = {ours: theirs for ours, theirs in zip(COLUMNS[task], names) if theirs}
        yield ", ".join(columns.values()), columns


def judged_forms(rows, given):
    """Yields (form, columns) of the A/B forms and ranked forms that the rows may have."""
    present = {name for row in objects(rows) for name in row.value}
    prompts = [{}] if "prompt" in given else [{"prompt": name} for name in ASKED if name in present]
    for first, second in SIDES:
        sides = {"first": first, "second": second}
        if not present.issuperset(sides.values()):
            continue
        which = [{"preference": name} for name in (*PREFERENCE, *STRENGTH) if name in present]
        if present.issuperset(WINNERS):
            which.append(dict(zip(("first_wins", "second_wins"), WINNERS)))
        for preference, prompt in itertools.product(which, [{}] if first == "conversation_a" else prompts):
            yield f"A/B ({first}, {second}, preferred by {', '.join(preference.values())})", prompt | sides | preference
    for name, prompt in itertools.product(RANKED, prompts):
        if 2 * sum(is_ranked(row.value.get(name)) for row in objects(rows)) >= len(objects(rows)) > 0:
            yield f"ranked ({name})", prompt | {"ranked": name}


def is_ranked(answers):
    """Whether a value is a list of responses with ranks."""
    return isinstance(answers, list) and any(isinstance(each, dict) and "rank" in each for each in answers)


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
    if task == "kto" and not two_responses and present & SINGLE:
        return f"no known column says whether a response is desirable ({', '.join(LABELS)})"
    if present >= {"completion", "label"}:
        return (
            "these are single judged responses, and DPO needs pairs (make_prefs.py --strategy label pairs them; "
            "--task kto packs them for --loss_type kto)"
        )
    if not two_responses and present & SINGLE and not any(WORSE.search(name) for name in present):
        return "these look like single responses, which --task sft packs"
    if two_responses and present.intersection((*PREFERENCE, *STRENGTH)):
        return "two responses and a preference, and no known column holds the prompt (--columns prompt=NAME says which)"
    if two_responses and present.intersection(ASKED):
        return f"two responses, and no column that says which is preferred ({', '.join((*PREFERENCE, *STRENGTH))})"
    if present.intersection(RANKED) and present.intersection(ASKED):
        return "several responses without ranks (if they have scores, make_prefs.py --strategy label pairs them)"
    return "no known form has these columns"


def refuse_other_numbers(rows, columns, path):
    """Refuse numbers beside the two that name the responses: 1 may be either of them then, or a strength."""
    first, second, preference = columns["first"], columns["second"], columns["preference"]
    names = sorted(word for words in SIDES[first, second] for word in words if word.isdigit())
    words = {word_of(row.value.get(preference)) for row in objects(rows)} - {"0.5", *names}
    others = sorted(word for word in words if math.isfinite(number_or_nan(word)))
    if names and others:
        raise InputError(
            f"{path}: '{preference}' is {others[0]} in some rows, which names neither {first} nor {second}; write "
            f"{' or '.join(names)}, or if numbers below 0 prefer {first}, call the column {STRENGTH[0]}"
        )


def word_of(preference):
    """A preference as a word: 1.0 -> "1", True -> "1", "A" -> "a"."""
    if isinstance(preference, (list, dict)):
        return kind(preference)
    if isinstance(preference, (bool, float)) and float(preference).is_integer():
        preference = int(preference)
    return str(preference).strip().lower()


def number_or_nan(value):
    """A preference as a number; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def refuse_other_prompt(rows, present, columns, path):
    """Refuse rows without a prompt that are not whole dialogues: how two responses begin alike is no prompt."""
    tables, sides = objects(rows), (columns["chosen"], columns["rejected"])
    bare = [row for row in tables if not holds_prompt(*(row.value.get(name) for name in sides))]
    if not bare or 2 * len(bare) < len(tables):
        return
    length = {name: sum(len(as_text(row.value.get(name))) for row in tables) for name in present if name not in sides}
    longest = max(length, key=length.get, default="")
    way = f"if '{longest}' does: --columns prompt={longest}" if length else "write it into a column 'prompt'"
    raise InputError(
        f"{path}: {' and '.join(sides)} are not whole dialogues, and no known column holds the prompt; {way}"
    )


def holds_prompt(chosen, rejected):
    """Whether two responses hold the turns before them, or are of no type that could."""
    sides = [side.get("messages", [side]) if isinstance(side, dict) else side for side in (chosen, rejected)]
    if not all(side and isinstance(side, (str, list)) for side in sides):
        return True  # rows.py names what is wrong
    if all(isinstance(side, str) for side in sides):
        return all(side.startswith(HUMAN) for side in sides)
    return any(isinstance(side, list) and len(side) > 1 for side in sides)
