"""One row of a file to its prompt and responses; forms.py says which columns hold them.

    preference(row, columns, chat)      -> (prompt, [chosen, rejected])
    demonstration(row, columns, chat)   -> (prompt, [response])

A prompt is a string or a list of messages, a response a string. chat: the tokenizer has a chat template. In a column:
    strings             as they are
    messages            {role, content} or {from, value}, one or a list; the content a string or a list of text parts
    whole dialogues     messages of which the last is the response; "\\n\\nHuman: ...\\n\\nAssistant: ..." strings;
                        texts with a common beginning, which is the prompt
    instruction         Alpaca's and LLaMA-Factory's: `input` is joined by a newline, `history` comes before it
A `system` column comes before the prompt.
"""

import json
import os
import re

from files import shorten
from preferences.forms import ASSISTANT, HUMAN, PROMPT_PARTS, SIDES, listed, word_of
from preferences.sources import LeftOut, Malformed, as_text, kind

TIES = {"", "none", "null", "nan", "tie", "both", "neither", "equal", "same", "0.5", "tie (bothbad)"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"system": "system", "developer": "system"}


def preference(row, columns, chat):
    """(prompt, [chosen, rejected]) of a row; raises LeftOut."""
    require(row, columns)
    names = resolve(row, columns) if "first" in columns else (columns["chosen"], columns["rejected"])
    prompt = question(row, columns["prompt"]) if "prompt" in columns else None
    sides = [conversation(row[name], name) for name in names]
    if not all(isinstance(side, str) for side in sides):
        prompt, sides = split_messages(prompt, *sides)
    elif prompt is None:
        prompt, sides = split_text(*sides)
    return finished(row, prompt, sides, chat)


def demonstration(row, columns, chat):
    """(prompt, [response]) of an SFT row; raises LeftOut."""
    require(row, columns)
    name = columns["response"]
    prompt = question(row, columns["prompt"]) if "prompt" in columns else None
    response = conversation(row[name], name)
    if isinstance(response, str):
        if prompt is None:
            raise Malformed(f"expected '{name}' to be a list of messages, found a string")
        return finished(row, prompt, [response], chat)
    *head, last = response
    require_assistant(last, name)
    if prompt is None and not head:
        raise Malformed(f"expected '{name}' to have messages before the last, found none")
    if prompt is not None and head and head != prompt:
        raise Malformed(
            f"expected one assistant message in '{name}', found {len(response)} messages that do not repeat the prompt"
        )
    return finished(row, head or prompt, [last["content"]], chat)


# --- columns ---


def require(row, columns):
    """Refuse a row that lacks one of `columns`."""
    if not isinstance(row, dict):
        raise Malformed(f"expected a JSON object, found {kind(row)}")
    for name in columns.values():
        if name not in row:
            raise Malformed(f"expected a column '{name}', found {listed(row) or 'an empty object'}")


def resolve(row, columns):
    """(chosen, rejected): the columns of an A/B row; raises LeftOut where neither is preferred."""
    first, second, preference = columns["first"], columns["second"], row[columns["preference"]]
    word = word_of(preference)
    if word in TIES:
        raise LeftOut("no preference", f"'{columns['preference']}' is {shown(preference)}")
    is_first, is_second = (word in {name.lower(), *words} for name, words in zip((first, second), SIDES[first, second]))
    if is_first == is_second:
        raise Malformed(f"expected '{columns['preference']}' to name {first} or {second}, found {shown(preference)}")
    return (first, second) if is_first else (second, first)


def question(row, name):
    """The prompt in column `name`, a string or messages, with the other columns that belong to it."""
    prompt = conversation(row[name], name)
    if name not in PROMPT_PARTS or not isinstance(prompt, str):
        return prompt
    if more := text_or_nothing(row, "input"):
        prompt = f"{prompt}\n{more}"
    if not (history := row.get("history")):
        return prompt
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Malformed(f"expected 'history' to be a list of [question, answer], found {shown(history)}")
    messages = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return conversation([*messages, {"role": "user", "content": prompt}], "history")


def text_or_nothing(row, name):
    """The text of a column that a row may lack. Anything else in it would be lost, or written as Python writes it."""
    if not isinstance(text := row.get(name), (str, type(None))):
        raise Malformed(f"expected '{name}' to be a string, found {kind(text)}")
    return text


def shown(value):
    return shorten(as_text(value), 80)


# --- messages ---


def conversation(value, column):
    """A string as it is; a message or a list of messages as a list of {"role", "content"}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)) or not value:
        found = f"an empty {kind(value).split()[-1]}" if value in ([], {}) else kind(value)
        raise Malformed(f"expected '{column}' to be a string or a list of messages, found {found}")
    if isinstance(value, dict):
        value = value.get("messages", value)  # OpenAI's input
    messages = [message(each, column) for each in (value if isinstance(value, list) else [value])]
    if not messages:
        raise Malformed(f"expected messages in '{column}', found an empty list")
    return messages


def message(value, column):
    """One message as {"role", "content"}, the role one of the three that a template knows."""
    fields = value if isinstance(value, dict) else {}
    names = ("from", "value") if "from" in fields else ("role", "content")
    role, content = (joined_parts(fields.get(name)) for name in names)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise Malformed(
            f"expected messages with a string '{names[0]}' and '{names[1]}' in '{column}', found {shown(value)}"
        )
    if role not in ROLES:
        raise Malformed(f"expected a role of system, user or assistant in '{column}', found {json.dumps(role)}")
    return {"role": ROLES[role], "content": content}


def joined_parts(content):
    """The text of a content given as a list of text parts; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return content
    return "".join(texts)


def require_assistant(last, name):
    if last["role"] != "assistant":
        raise Malformed(f"expected '{name}' to end in an assistant message, found role '{last['role']}'")


def split_messages(prompt, chosen, rejected):
    """Responses given as messages: the last of each is the response, the others, the same in both, are the prompt."""
    chosen, rejected = (
        [{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in (chosen, rejected)
    )
    require_assistant(chosen[-1], "chosen")
    require_assistant(rejected[-1], "rejected")
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
    return head or prompt, [chosen[-1]["content"], rejected[-1]["content"]]


def finished(row, prompt, responses, chat):
    """(prompt, responses) as they are encoded: hh-rlhf's turns as messages, the system column first, all of it text."""
    if chat and isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        prompt, responses = dialogue(prompt), [response.strip() for response in responses]
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Malformed("expected a prompt whose last message is the user's, found the assistant's")
    prompt = with_system(prompt, text_or_nothing(row, "system"))
    try:
        "".join([*contents(prompt), *responses]).encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"expected text, found a lone surrogate (\\u{ord(error.object[error.start]):04x})") from None
    return prompt, responses


def contents(prompt):
    """The texts of a prompt, without its roles."""
    return [prompt] if isinstance(prompt, str) else [said["content"] for said in prompt]


def with_system(prompt, system):
    """`prompt` with the text of a system column before it, unless it has a system message already."""
    if not system or not system.strip():
        return prompt
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return prompt if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


# --- dialogues that are strings ---


def split_text(chosen, rejected):
    """(prompt, [chosen, rejected]) of whole dialogues as strings: their common beginning, and the rest of each."""
    shared = os.path.commonprefix([chosen, rejected])
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        end = shared.rfind(ASSISTANT) + len(ASSISTANT)
        rest = [chosen[end:], rejected[end:]]
        if ASSISTANT not in shared or any(turn in side for turn in (HUMAN, ASSISTANT) for side in rest):
            raise Malformed("expected dialogues that share all but the last assistant turn, found more that differs")
        return chosen[:end], rest
    end = len(shared)
    if not all(side[end : end + 1].isspace() for side in (chosen, rejected)):  # in a word: back to the space before it
        while end and not shared[end - 1].isspace():
            end -= 1
    end = len(shared[:end].rstrip())
    return chosen[:end], [chosen[end:], rejected[end:]]


def dialogue(prompt):
    """An hh-rlhf prompt as messages, without the last "Assistant:", which the template writes."""
    words = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = zip(words[1::2], words[2::2])
    return [{"role": ROLES[who.lower()], "content": text.strip()} for who, text in turns][:-1]
