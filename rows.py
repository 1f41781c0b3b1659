"""Preference rows as people have them: a .jsonl or .json file, in TRL's forms and their kin, to (prompt, chosen, rejected).

Forms:
    1. strings          {"prompt": "Q", "chosen": "A", "rejected": "B"}
    2. conversational   prompt: a list of {role, content}; chosen, rejected: one assistant message, or a string
    3. implicit prompt  no prompt column; chosen and rejected are whole dialogues that share all but the last turn:
                        message lists, "\\n\\nHuman: ...\\n\\nAssistant: ..." strings, or texts with a common beginning
ShareGPT's {from, value} messages and its `conversations` column are read too.
"""
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonlines

from packed import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of hh-rlhf's string dialogues
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list",
         dict: "an object"}


class Malformed(Exception):
    """A row that is not of any known form: "expected ..., found ..."."""


@dataclass
class Row:
    number: int          # line in a .jsonl, place in a .json list, from 1
    value: object        # the parsed JSON, or the raw text if it is not JSON
    reason: str = ""     # why it is left out
    detail: str = ""
    parts: tuple = ()    # prompt (a string or messages), chosen, rejected
    ids: tuple = ()      # the same as arrays of ids, uint32


def shorten(text, most):
    return text if len(text) <= most else text[:most] + "..."


def read_rows(path):
    """Every row of the file as a Row, those that are not JSON marked malformed; blank lines are no rows."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected preferences as .jsonl or .json")
    if path.endswith(".json"):
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); call a file of one object a line .jsonl") from None
        if not isinstance(values, list):
            raise InputError(f"{path}: expected a list of rows, found {KINDS[type(values)]}")
        return [Row(number, value) for number, value in enumerate(values, 1)]
    if not path.endswith(".jsonl"):
        raise InputError(f"{path}: expected a file that ends in .jsonl (one object a line) or .json (a list)")
    rows = []
    with open(path, "rb") as file, jsonlines.Reader(file, loads=json.loads) as reader:
        for number in range(1, sys.maxsize):
            try:
                rows.append(Row(number, reader.read(allow_none=True)))
            except EOFError:
                return rows
            except RecursionError:
                rows.append(Row(number, "", "malformed", "expected a JSON object, found one nested too deep"))
            except jsonlines.InvalidLineError as error:
                text = error.line if isinstance(error.line, str) else error.line.decode("utf-8", "replace")
                if text.strip():
                    found = shorten(str(error.__cause__), 120)
                    rows.append(Row(number, text, "malformed", f"expected a JSON object, found invalid JSON ({found})"))


def parse_columns(text):
    """'prompt=question,chosen=a' -> {"prompt": "question", "chosen": "a"}"""
    columns = {}
    for part in text.split(",") if text else ():
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if ours not in ("prompt", "chosen", "rejected") or not theirs:
            raise InputError(f"--columns {text}: expected prompt=NAME,chosen=NAME,rejected=NAME, found '{part}'")
        columns[ours] = theirs
    return columns


def find_columns(rows, given, path):
    """{"prompt", "chosen", "rejected": the file's name for it}; no "prompt" where it is implicit."""
    there = list(dict.fromkeys(name for row in rows if isinstance(row.value, dict) for name in row.value))
    prompt = [name for name in ("prompt", "conversations") if name in there][:1]
    columns = {**{"prompt": name for name in prompt}, "chosen": "chosen", "rejected": "rejected", **given}
    for name in columns.values():
        if there and name not in there:
            raise InputError(f"{path}: no column '{name}'; the columns are {shorten(', '.join(there), 300)}; "
                             "name yours with --columns prompt=...,chosen=...,rejected=...")
    return columns


def preference(row, columns, chat):
    """(prompt, chosen, rejected) of a row, the prompt a string or messages, the others strings; raises Malformed."""
    if not isinstance(row, dict):
        raise Malformed(f"expected a JSON object, found {KINDS[type(row)]}")
    for name in columns.values():
        if name not in row:
            raise Malformed(f"expected a column '{name}', found {shorten(', '.join(row), 200) or 'an empty object'}")
    prompt = conversation(row[columns["prompt"]], columns["prompt"]) if "prompt" in columns else None
    chosen, rejected = (conversation(row[columns[side]], columns[side]) for side in ("chosen", "rejected"))
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        prompt, chosen, rejected = split_messages(prompt, chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = split_text(chosen, rejected)
    if chat and isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        prompt, chosen, rejected = dialogue(prompt), chosen.strip(), rejected.strip()
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Malformed("expected a prompt whose last message is the user's, found the assistant's")
    try:
        "".join([prompt] if isinstance(prompt, str) else [said["content"] for said in prompt]).encode()
        (chosen + rejected).encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"expected text, found a lone surrogate (\\u{ord(error.object[error.start]):04x})") from None
    return prompt, chosen, rejected


def conversation(value, column):
    """A string as it is; a message or a list of messages as a list of {"role", "content"}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, dict)) or not value:
        found = f"an empty {KINDS[type(value)].split()[-1]}" if value in ([], {}) else KINDS[type(value)]
        raise Malformed(f"expected '{column}' to be a string or a list of messages, found {found}")
    messages = []
    for message in value if isinstance(value, list) else [value]:
        names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        said = [message.get(name) for name in names] if isinstance(message, dict) else []
        if not said or not all(isinstance(text, str) for text in said):
            raise Malformed(f"expected messages with a string '{names[0]}' and '{names[1]}' in '{column}', "
                            f"found {shorten(json.dumps(message), 80)}")
        if said[0] not in ROLES:
            raise Malformed(f"expected a role of system, user or assistant in '{column}', found {json.dumps(said[0])}")
        messages.append({"role": ROLES[said[0]], "content": said[1]})
    return messages


def split_messages(prompt, chosen, rejected):
    """Responses given as messages: the last of each is the response, those before it (the same in both) the prompt."""
    chosen, rejected = ([{"role": "assistant", "content": side}] if isinstance(side, str) else side
                        for side in (chosen, rejected))
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
            raise Malformed(f"expected one assistant message in 'chosen', found {len(chosen)} messages that do not "
                            "repeat the prompt")
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
    if not all(side[end:end + 1].isspace() for side in (chosen, rejected)):  # in a word: back to the space before it
        while end and not shared[end - 1].isspace():
            end -= 1
    end = len(shared[:end].rstrip())
    return chosen[:end], chosen[end:], rejected[end:]


def dialogue(prompt):
    """An hh-rlhf prompt as messages, the last "Assistant:" left out: the template writes it."""
    words = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = zip(words[1::2], words[2::2])
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in turns][:-1]
