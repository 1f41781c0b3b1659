"""SFT rows as people have them, to (prompt, response); the sources are sources.py's.

Forms, each recognised by its columns (FORMS) and named in what data_prep prints:
    prompt, response      {"prompt": "Q", "response": "A"}
    prompt, completion    TRL's; strings, or lists of {role, content}, the completion one assistant message
    question, answer      GSM8K's
    instruction, output   alpaca's: instruction and input, joined by a newline; `history` comes before them
    messages              a dialogue of {role, content} or {from, value}; its last message is the response, the others the prompt
    conversations         the same under ShareGPT's name
A `system` column comes before the prompt.
"""

from files import InputError
from preferences.rows import (
    Malformed,
    choose,
    columns_of,
    conversation,
    listed,
    question,
    ready,
    refuse_or_leave_out,
    require,
)

# form -> the columns that tell it, as (prompt, response); the first whose columns are all there is it
FORMS = {
    "prompt, response": ("prompt", "response"),
    "prompt, completion": ("prompt", "completion"),
    "question, answer": ("question", "answer"),
    "instruction, output": ("instruction", "output"),
    "messages": (None, "messages"),
    "conversations": (None, "conversations"),
}
MORE = ("input", "history", "context")  # names of what belongs to a prompt
JUDGED = ("label", "score", "rating")  # names of what says that a response may be a bad one


def find_columns(rows, given, path):
    """(columns, form): {"prompt", "response": the file's name for it}, no "prompt" where the response is a whole dialogue."""
    there = columns_of(rows, given, path)
    forms = [
        (form, {**{ours: name for ours, name in zip(("prompt", "response"), names) if name}, **given})
        for form, names in FORMS.items()
    ]
    if chosen := choose(forms, rows, there):
        form, columns = chosen
        if not given:
            refuse_more(rows, columns, path)
        return columns, "--columns" if given else form
    why = "no known form of --task sft has these columns"
    if {"chosen", "rejected"} <= set(there):
        why = "these look like preferences, which are packed without --task sft (or add --columns response=chosen)"
    raise InputError(
        f"{path}: {why}; the columns are {listed(there)}; name yours with "
        "--columns prompt=...,response=..., or rewrite the rows so"
    )


def refuse_more(rows, columns, path):
    """A part of the prompt, or a judgement, in a column that the form does not read must not be lost unsaid."""
    for name in JUDGED:
        refuse_or_leave_out(
            rows,
            name,
            path,
            f"a column '{name}' says that some responses are bad ones, and SFT would learn them all; "
            "pair them (make_prefs.py --strategy label), keep the good rows, or say --columns "
            + ",".join(f"{ours}={theirs}" for ours, theirs in columns.items()),
            lambda _: True,
        )
    read = {*columns.values(), *(("input", "history") if columns.get("prompt") == "instruction" else ())}
    for name in MORE:
        if name not in read:
            refuse_or_leave_out(
                rows,
                name,
                path,
                f"a column '{name}' beside {' and '.join(columns.values())} would be left out; "
                "write it into the prompt, or name the columns to read with --columns prompt=...,response=...",
            )


def demonstration(row, columns, chat):
    """(prompt, response) of a row, the prompt a string or messages, the response a string; raises Malformed."""
    require(row, columns)
    name = columns["response"]
    prompt = question(row, columns["prompt"]) if "prompt" in columns else None
    response = conversation(row[name], name)
    if isinstance(response, str):
        if prompt is None:
            raise Malformed(f"expected '{name}' to be a list of messages, found a string")
        return ready(row, prompt, [response], chat)
    *head, last = response
    if last["role"] != "assistant":
        raise Malformed(f"expected '{name}' to end in an assistant message, found role '{last['role']}'")
    if prompt is None and not head:
        raise Malformed(f"expected '{name}' to have messages before the last, found none")
    if prompt is not None and head and head != prompt:
        raise Malformed(
            f"expected one assistant message in '{name}', found {len(response)} messages that do not repeat the prompt"
        )
    return ready(row, head or prompt, [last["content"]], chat)
