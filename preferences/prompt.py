"""The columns that belong to a prompt beside its own column: system, history, context and input.

{"system_prompt": "S", "prompt": "Q"}           chat: a system message, then Q     plain: "S\\n\\nQ"
{"context": "C", "question": "Q"}               "C\\n\\nQ"
{"history": [["A", "B"]], "query": "Q"}         the user's A, the assistant's B, then Q; needs a chat template
{"instruction": "I", "input": "X"}              "I\\nX", as Alpaca has it
"""

import json

from preferences.columns import PARTS, says
from preferences.messages import assistant, contents, conversation, shown, user
from preferences.sources import Malformed, kind


def whole_prompt(row, columns, prompt, chat):
    """`prompt`, a string or messages, with the columns of PARTS that `columns` names; raises Malformed.

    Texts that it does not repeat come before its own with an empty line between, turns before its messages. chat: there
    is a template.
    """
    names = {part: columns[part] for part in PARTS if part in columns and is_filled(row.get(columns[part]))}
    parts = {part: said_before(row[name], name, part) for part, name in names.items()}
    system = parts.pop("system", "")
    if "input" in parts and columns.get("prompt") == "instruction":
        prompt = with_text(prompt, "\n", after=parts.pop("input"))
    turns = []
    for part in reversed(parts.values()):
        if isinstance(part, str) and part.strip() not in [text.strip() for text in contents(prompt)]:
            prompt = with_text(prompt, "\n\n", before=part)
        elif isinstance(part, list):
            turns = [*part, *turns]
    return with_system(after_turns(turns, prompt), system, chat)


def is_filled(value):
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def said_before(value, name, part):
    """What a filled column of `part` says: a text, or the messages of earlier turns."""
    if part in ("system", "input") and not isinstance(value, str):
        raise Malformed(f"expected '{name}' to be a string, found {kind(value)}")
    if part == "history":
        value = turns_of(value, name)
    if part == "context" and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return "\n\n".join(value)
    return conversation(value, name) if value else []


def turns_of(history, name):
    """A history of [question, answer], or of these as JSON, as messages; another one as it is."""
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = json.loads(history)
        except (ValueError, RecursionError):
            return history
    if not isinstance(history, list) or any(isinstance(turn, dict) for turn in history):
        return history
    if not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history):
        raise Malformed(f"expected '{name}' to be a list of [question, answer], found {shown(history)}")
    return [said for asked, answered in history for said in (user(asked), assistant(answered))]


def with_text(prompt, between, before="", after=""):
    """`prompt` with a text before its own or after it, in its first or last message of the user's."""
    if isinstance(prompt, str):
        return between.join(text for text in (before, prompt, after) if text.strip())
    users = [place for place, said in enumerate(prompt) if said["role"] == "user"] or [0]
    place = users[0] if before else users[-1]
    changed = prompt[place] | {"content": with_text(prompt[place]["content"], between, before, after)}
    return [*prompt[:place], changed, *prompt[place + 1 :]]


def after_turns(turns, prompt):
    """`prompt` after earlier turns, which it may hold itself: all of them, or the last as its first question."""
    if not turns:
        return prompt
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    if messages[: len(turns)] == turns:
        return messages
    return [*(turns[:-1] if turns[-1] == messages[0] else turns), *messages]


def with_system(prompt, system, chat):
    """`prompt` with the text of a system column before it; raises Malformed beside another system message."""
    if not says(system):
        return prompt
    if isinstance(prompt, str):
        return [{"role": "system", "content": system}, user(prompt)] if chat else f"{system}\n\n{prompt}"
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"].strip() != system.strip():
        raise Malformed(f"expected one system text, found another in the messages than in its column, {shown(system)}")
    return prompt
