"""Messages of a row: {role, content} or {from, value}, one or a list; the content a string or a list of text parts.

A message is read as {"role", "content"}, the role one of the three that a template knows. Its reasoning, if it has any,
stays beside the content under its own name. Other fields are not read: columns.py says what becomes of them.
"""

import json

from files import shorten
from preferences.columns import REASONING, says
from preferences.sources import Malformed, as_text, kind
from preferences.written import ROLES


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def shown(value):
    return shorten(as_text(value), 80)


def conversation(value, column):
    """A string as it is; a message or a list of messages as a list of {"role", "content"}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)) or not value:
        found = f"an empty {kind(value).split()[-1]}" if value in ([], {}) else kind(value)
        raise Malformed(f"expected '{column}' to be a string or a list of messages, found {found}")
    if isinstance(value, dict):
        value = value.get("messages", value)  # OpenAI's input
    messages = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict) and each.keys() >= {"human", "assistant"}:  # ms-swift's turns
            messages += [message(user(each["human"]), column), message(assistant(each["assistant"]), column)]
        else:
            messages.append(message(each, column))
    if not messages:
        raise Malformed(f"expected messages in '{column}', found an empty list")
    return messages


def message(value, column):
    """One message as {"role", "content"}, and its reasoning."""
    fields = value if isinstance(value, dict) else {}
    names = ("from", "value") if "from" in fields else ("role", "content")
    role, content = (joined_parts(fields.get(name)) for name in names)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise Malformed(
            f"expected messages with a string '{names[0]}' and '{names[1]}' in '{column}', found {shown(value)}"
        )
    if role.lower() not in ROLES:
        raise Malformed(f"expected a role of system, user or assistant in '{column}', found {json.dumps(role)}")
    thoughts = {name: fields[name] for name in REASONING if says(fields.get(name))}
    if not all(isinstance(thought, str) for thought in thoughts.values()):
        raise Malformed(f"expected a string '{next(iter(thoughts))}' in '{column}', found {shown(value)}")
    return {"role": ROLES[role.lower()], "content": content, **thoughts}


def joined_parts(content):
    """The text of a content given as a list of text parts; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part.get("text", part.get("value")) for part in parts]  # LLaMA-Factory's have a value
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return content
    return "".join(texts)


def require_assistant(last, name):
    if last["role"] != "assistant":
        raise Malformed(f"expected '{name}' to end in an assistant message, found role '{last['role']}'")


def answer(last):
    """The text of a message, or the message itself where it has reasoning beside the text."""
    return last["content"] if isinstance(last, dict) and len(last) == 2 else last


def settled(said, reasoning):
    """A text, or a message whose reasoning is kept ("auto"), left out ("drop"), or written before the text ("inline").

    Written as Qwen3's and DeepSeek-R1's models do: <think>, the reasoning, </think>, an empty line, the text.
    """
    if isinstance(said, str) or reasoning == "auto" or len(said) == 2:
        return said
    thought = "".join(f"<think>\n{said[name].strip()}\n</think>\n\n" for name in REASONING if name in said)
    return {"role": said["role"], "content": (thought if reasoning == "inline" else "") + said["content"]}


def contents(prompt):
    """The texts of a prompt or of a response, without roles."""
    if isinstance(prompt, str):
        return [prompt]
    messages = [prompt] if isinstance(prompt, dict) else prompt
    return [text for said in messages for name, text in said.items() if name != "role"]
