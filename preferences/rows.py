"""Preference rows as people have them, to (prompt, chosen, rejected).

The sources are sources.py's. Forms, each recognised by its columns (FORMS) and named in what data_prep prints:
    strings             {"prompt": "Q", "chosen": "A", "rejected": "B"}
    conversational      prompt: a list of {role, content}; chosen, rejected: one assistant message, or a string
    implicit prompt     no prompt column; chosen and rejected are whole dialogues that share all but the last turn:
                        message lists, "\\n\\nHuman: ...\\n\\nAssistant: ..." strings, or texts with a common beginning
    LLaMA-Factory       conversations of {from, value}; or instruction and input, joined by a newline
    OpenAI              input {"messages"}, preferred_output, non_preferred_output
    A/B                 two responses, and a column that says which is preferred; a row without a preference is left out
Messages may be {from, value}, and their content a list of text parts. A `system` column comes before the prompt.
Rows with a single response, for SFT, are demonstrations.py's.
"""

import itertools
import json
import os
import re

from files import InputError, shorten
from preferences.sources import as_text, kind

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of hh-rlhf's string dialogues
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}

# form -> the columns that tell it, as (prompt, chosen, rejected); the first whose columns are all there is it
FORMS = {
    "OpenAI preference": ("input", "preferred_output", "non_preferred_output"),
    "prompt, chosen, rejected": ("prompt", "chosen", "rejected"),
    "LLaMA-Factory conversations": ("conversations", "chosen", "rejected"),
    "LLaMA-Factory instruction": ("instruction", "chosen", "rejected"),
    **{f"{name}, chosen, rejected": (name, "chosen", "rejected") for name in ("question", "query", "input")},
    "question, response_j over response_k": ("question", "response_j", "response_k"),
    "implicit prompt": (None, "chosen", "rejected"),
}
ASKED = ("prompt", "question", "instruction", "query", "input", "history", "context")  # names of an A/B form's prompt
PROMPTS = {
    *ASKED,
    "user",
    "user_prompt",
    "messages",
    "conversation",
    "conversations",
    "problem",
    "text",
}  # may hold a prompt
PREFERENCE = ("preference", "preferred", "winner", "choice", "better_response_id", "label", "labels")
# two responses, and what a preference column says of the first and of the second (beside the columns' own names)
SIDES = {
    **{
        (f"{name}_{a}", f"{name}_{b}"): (("a", "model_a"), ("b", "model_b"))
        for name in ("response", "answer", "completion", "output")
        for a, b in (("a", "b"), ("A", "B"))
    },
    **{(f"{name}_0", f"{name}_1"): (("0",), ("1",)) for name in ("response", "answer", "completion", "output")},
    **{(f"{name}_1", f"{name}_2"): (("1",), ("2",)) for name in ("response", "answer", "completion", "output")},
    ("human_ref_A", "human_ref_B"): (("1",), ("0",)),  # SHP: labels is 1 where A is preferred
    ("conversation_a", "conversation_b"): (("model_a", "a"), ("model_b", "b")),  # Chatbot Arena: whole dialogues
}
SINGLE = (
    "response",
    "completion",
    "answer",
    "output",
    "messages",
)  # one response a row, whole dialogues: demonstrations.py
TIES = {"", "none", "null", "nan", "tie", "both", "neither", "equal", "same", "0.5", "tie (bothbad)"}


class Malformed(Exception):
    """A row that is not of any known form: "expected ..., found ..."."""

    reason = "malformed"


class Tie(Malformed):
    """A row that prefers neither response."""

    reason = "no preference"


def parse_columns(text, names=("prompt", "chosen", "rejected")):
    """'prompt=question,chosen=a' -> {"prompt": "question", "chosen": "a"}"""
    columns = {}
    for part in text.split(",") if text else ():
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if ours not in names or not theirs:
            raise InputError(f"--columns {text}: expected {','.join(f'{name}=NAME' for name in names)}, found '{part}'")
        columns[ours] = theirs
    return columns


def listed(names):
    """Names on one line, whatever is in them."""
    return shorten(", ".join(name if name.isprintable() else json.dumps(name) for name in names), 300)


def columns_of(rows, given, path):
    """The names of all columns of the file; those that --columns gave must be among them."""
    there = list(dict.fromkeys(name for row in rows if isinstance(row.value, dict) for name in row.value))
    for name in given.values():
        if there and name not in there:
            raise InputError(f"{path}: no column '{name}'; the columns are {listed(there)}")
    return there


def choose(forms, rows, there):
    """(form, columns) of the first of `forms` whose columns half of the rows have, so that a stray row does not decide for all,
    else of the first whose columns are all there; None if there is none."""
    tables, there = (
        [row.value.keys() for row in rows if isinstance(row.value, dict)],
        set(there),
    )  # a set: they may be many
    found = [(form, columns) for form, columns in forms if set(columns.values()) <= there or not there]
    usual = (each for each in found if 2 * sum(set(each[1].values()) <= names for names in tables) >= len(tables))
    return next(usual, found[0] if found else None)


def find_columns(rows, given, path):
    """(columns, form): {"prompt", "chosen", "rejected": the file's name for it}, no "prompt" where it is implicit.

    An A/B form has {"prompt", "first", "second", "preference"} instead. Refuses columns of no known form.
    """
    there = columns_of(rows, given, path)
    forms = [
        (form, {**{ours: name for ours, name in zip(("prompt", "chosen", "rejected"), names) if name}, **given})
        for form, names in FORMS.items()
    ]
    if there and not given:
        forms += ab_forms(there)
    if chosen := choose(forms, rows, there):
        form, columns = chosen
        if "first" in columns:
            refuse_zero(rows, columns, path)
        elif "prompt" not in columns:
            refuse_other_prompt(rows, there, columns, path)
        return columns, "--columns" if given else form
    sides = next((pair for pair in SIDES if set(pair) <= set(there)), None)
    asked = next((name for name in ASKED if name in there), None)
    why = "no known form has these columns"
    if {"completion", "label"} <= set(there):
        why = "these are single judged responses, and DPO needs pairs (make_prefs.py --strategy label makes them)"
    elif not sides and not {"chosen", "rejected"} & set(there) and set(SINGLE) & set(there):
        why = "these look like single responses, which --task sft packs"
    elif sides and asked:
        why = f"two responses, and no column that says which is preferred ({', '.join(PREFERENCE)})"
    raise InputError(
        f"{path}: {why}; the columns are {listed(there)}; name yours with "
        "--columns prompt=...,chosen=...,rejected=..., or rewrite the rows so"
    )


def ab_forms(there):
    """(form, columns) of every A/B form that these columns may be."""
    there = set(there)
    for (first, second), said in itertools.product(SIDES, PREFERENCE):
        columns = {"first": first, "second": second, "preference": said}
        for asked in ("",) if first == "conversation_a" else ASKED:
            form = f"A/B ({first}, {second}, preferred by {said})", ({"prompt": asked} if asked else {}) | columns
            if set(form[1].values()) <= there:
                yield form


def refuse_zero(rows, columns, path):
    """1 and 2 name the responses; where there is a 0, 1 may be the first as well as the second."""
    first, second, said = columns["first"], columns["second"], columns["preference"]
    words = {word_of(row.value.get(said)) for row in rows if isinstance(row.value, dict)}
    if SIDES[first, second] == (("1",), ("2",)) and "0" in words:
        raise InputError(
            f"{path}: '{said}' is 0 in some rows, which names neither {first} nor {second}; rewrite it as 1 or 2"
        )


def refuse_other_prompt(rows, there, columns, path):
    """No column of a known name holds the prompt: then chosen and rejected must, and no other column may look like it."""
    sides = [row.value.get(columns["chosen"]) for row in rows if isinstance(row.value, dict)]
    whole = all(
        side.startswith(HUMAN) if isinstance(side, str) else isinstance(side, list) and len(side) > 1
        for side in sides
        if side and isinstance(side, (str, list))
    )
    for name in there if not whole else ():
        if name.lower() in PROMPTS:
            refuse_or_leave_out(
                rows,
                name,
                path,
                f"a column '{name}' beside {columns['chosen']} and {columns['rejected']}, which are no whole "
                f"dialogues; if it holds the prompt: --columns prompt={name}; if not, leave it out of the file",
            )


def refuse_or_leave_out(rows, name, path, sentence, says=bool):
    """What half of the rows say in a column that is not read is the file's mistake, what fewer say is theirs."""
    tables = [row for row in rows if isinstance(row.value, dict)]
    saying = [row for row in tables if name in row.value and says(row.value[name])]
    if saying and 2 * len(saying) >= len(tables):
        raise InputError(f"{path}: {sentence}")
    for row in saying:
        row.reason, row.detail = "malformed", sentence


def word_of(said):
    """A preference as a word: 1.0 -> "1", True -> "1", "A" -> "a"."""
    if isinstance(said, (list, dict)):
        return kind(said)
    return str(int(said) if isinstance(said, (bool, float)) and float(said).is_integer() else said).strip().lower()


def resolve(row, columns):
    """(chosen, rejected): the columns of an A/B row; raises Tie where neither is preferred."""
    first, second, said = columns["first"], columns["second"], row[columns["preference"]]
    word = word_of(said)
    if word in TIES:
        raise Tie(f"'{columns['preference']}' is {shown(said)}")
    names = [{name.lower(), *words} for name, words in zip((first, second), SIDES[first, second])]
    if (word in names[0]) == (word in names[1]):
        raise Malformed(f"expected '{columns['preference']}' to name {first} or {second}, found {shown(said)}")
    return (first, second) if word in names[0] else (second, first)


def shown(value):
    return shorten(as_text(value), 80)


def question(row, name):
    """The prompt of a row's column `name`: a string or messages; LLaMA-Factory's input and history are part of it."""
    prompt = conversation(row[name], name)
    if name == "instruction" and isinstance(prompt, str):
        if more := text_or_nothing(row, "input"):
            prompt = f"{prompt}\n{more}"
        if history := row.get("history"):
            if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
                raise Malformed(f"expected 'history' to be a list of [question, answer], found {shown(history)}")
            turns = [
                {"role": role, "content": text} for turn in history for role, text in zip(("user", "assistant"), turn)
            ]
            prompt = conversation([*turns, {"role": "user", "content": prompt}], "history")
    return prompt


def text_or_nothing(row, name):
    """The text of a column that a row may lack; anything else in it would be lost, or written as Python writes it."""
    if not isinstance(text := row.get(name), (str, type(None))):
        raise Malformed(f"expected '{name}' to be a string, found {kind(text)}")
    return text


def with_system(prompt, system):
    """`prompt` with the text of a system column before it, unless it has a system message already."""
    if not system or not system.strip():
        return prompt
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return prompt if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def require(row, columns):
    """Refuse a row that lacks one of `columns`."""
    if not isinstance(row, dict):
        raise Malformed(f"expected a JSON object, found {kind(row)}")
    for name in columns.values():
        if name not in row:
            raise Malformed(f"expected a column '{name}', found {listed(row) or 'an empty object'}")


def preference(row, columns, chat):
    """(prompt, chosen, rejected) of a row, the prompt a string or messages, the others strings; raises Malformed."""
    require(row, columns)
    sides = resolve(row, columns) if "first" in columns else (columns["chosen"], columns["rejected"])
    prompt = question(row, columns["prompt"]) if "prompt" in columns else None
    chosen, rejected = (conversation(row[side], side) for side in sides)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        prompt, chosen, rejected = split_messages(prompt, chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = split_text(chosen, rejected)
    return ready(row, prompt, (chosen, rejected), chat)


def ready(row, prompt, responses, chat):
    """(prompt, *responses) as they are encoded: hh-rlhf's turns as messages, a system column before them, all of it text."""
    if chat and isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        prompt, responses = dialogue(prompt), [response.strip() for response in responses]
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Malformed("expected a prompt whose last message is the user's, found the assistant's")
    prompt = with_system(prompt, text_or_nothing(row, "system"))
    try:
        "".join([prompt] if isinstance(prompt, str) else [said["content"] for said in prompt]).encode()
        "".join(responses).encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"expected text, found a lone surrogate (\\u{ord(error.object[error.start]):04x})") from None
    return prompt, *responses


def conversation(value, column):
    """A string as it is; a message or a list of messages as a list of {"role", "content"}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)) or not value:
        found = f"an empty {kind(value).split()[-1]}" if value in ([], {}) else kind(value)
        raise Malformed(f"expected '{column}' to be a string or a list of messages, found {found}")
    messages = []
    value = value.get("messages", value) if isinstance(value, dict) else value  # OpenAI's input
    for message in value if isinstance(value, list) else [value]:
        names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        said = [parts_text(message.get(name)) for name in names] if isinstance(message, dict) else []
        if not said or not all(isinstance(text, str) for text in said):
            raise Malformed(
                f"expected messages with a string '{names[0]}' and '{names[1]}' in '{column}', found {shown(message)}"
            )
        if said[0] not in ROLES:
            raise Malformed(f"expected a role of system, user or assistant in '{column}', found {json.dumps(said[0])}")
        messages.append({"role": ROLES[said[0]], "content": said[1]})
    if not messages:
        raise Malformed(f"expected messages in '{column}', found an empty list")
    return messages


def parts_text(content):
    """The text of a content given as a list of text parts; anything else as it is."""
    if (
        isinstance(content, list)
        and content
        and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    ):
        return "".join(part["text"] for part in content)
    return content


def split_messages(prompt, chosen, rejected):
    """Responses given as messages: the last of each is the response, those before it (the same in both) the prompt."""
    chosen, rejected = (
        [{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in (chosen, rejected)
    )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise Malformed(f"expected '{name}' to end in an assistant message, found role '{side[-1]['role']}'")
    head = chosen[:-1]
    if head != rejected[:-1]:
        raise Malformed("expected chosen and rejected to share all messages but the last, found other messages")
    if prompt is None and not head:
        raise Malformed("expected a prompt column or leading messages that chosen and rejected share, found neither")
    if prompt is not None and head:  # whole dialogues beside a prompt, as in ultrafeedback_binarized: they must agree
        asked = [said["content"].strip() for said in head if said["role"] == "user"]
        if prompt != head and not (isinstance(prompt, str) and prompt.strip() in asked):
            raise Malformed(
                f"expected one assistant message in 'chosen', found {len(chosen)} messages that do not "
                "repeat the prompt"
            )
    return head or prompt, chosen[-1]["content"], rejected[-1]["content"]


def split_text(chosen, rejected):
    """Whole dialogues as strings: (common beginning, rest of chosen, rest of rejected)."""
    shared = os.path.commonprefix([chosen, rejected])
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        end = shared.rfind(ASSISTANT) + len(ASSISTANT)
        rest = (chosen[end:], rejected[end:])
        if ASSISTANT not in shared or any(turn in side for turn in (HUMAN, ASSISTANT) for side in rest):
            raise Malformed("expected dialogues that share all but the last assistant turn, found more that differs")
        return chosen[:end], *rest
    end = len(shared)
    if not all(side[end : end + 1].isspace() for side in (chosen, rejected)):  # in a word: back to the space before it
        while end and not shared[end - 1].isspace():
            end -= 1
    end = len(shared[:end].rstrip())
    return chosen[:end], chosen[end:], rejected[end:]


def dialogue(prompt):
    """An hh-rlhf prompt as messages, the last "Assistant:" left out: the template writes it."""
    words = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = zip(words[1::2], words[2::2])
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in turns][:-1]
