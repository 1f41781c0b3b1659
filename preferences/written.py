"""Messages in columns of texts, written as JSON or as Python writes lists: read where half of the column is so."""

import ast
import json
import re
from dataclasses import dataclass

ROLES = dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bard", "bing", "model"), "assistant")
ROLES |= dict.fromkeys(("system", "developer"), "system")
# of turns that rows.py refuses
TOOLS = {"tool", "tools", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"}
NAMED = re.compile(r"""["'](role|from)["']\s*:""")
BEGINNING = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value|messages)["']\s*:\s*["'\[]""")  # of messages


@dataclass
class Unlike:
    """A text that the others of its column do not allow to be read."""

    text: str
    found: str

    def __str__(self):
        return self.text


def read_messages(tables):
    """Read the messages that are written in columns of texts, in place. tables: the rows that are objects.

    Half of a column's texts decide for all: a text of the other kind becomes an Unlike, which no form allows.
    """
    for name in dict.fromkeys(name for table in tables for name in table):
        texts = [table for table in tables if isinstance(table.get(name), str) and table[name].strip()]
        written = [(table, value) for table in texts if (value := written_in(table[name])) is not None]
        if not written:
            continue
        is_column_of_messages = 2 * len(written) >= len(texts)
        if is_column_of_messages:
            for table in texts:
                table[name] = Unlike(table[name], "a text that is no JSON of messages, as others are")
        for table, value in written:
            if is_column_of_messages and value:
                table[name] = value
            elif value:
                table[name] = Unlike(table[name], "messages written as JSON, where others are texts")


def written_in(text):
    """The messages that a text writes, [] where it begins like messages and cannot be read, None where it has none."""
    if text.lstrip()[0] not in "[{" or not NAMED.search(text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if is_messages(value) else None
    return [] if BEGINNING.match(text) else None


def is_messages(value):
    """Whether a value is a message or a list of messages, at least one of a known role and with a content."""
    if isinstance(value, dict):
        value = value.get("messages", [value])
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return False
    roles = [str(each.get("role", each.get("from", ""))).lower() for each in value]
    complete = any(each.keys() >= pair for each in value for pair in ({"role", "content"}, {"from", "value"}))
    return complete and all(roles) and any(role in ROLES or role in TOOLS for role in roles)
