"""Prompts of a .jsonl file, and their ids."""

import json
from pathlib import Path

from files import InputError
from models import tokenization


def read_rows(path):
    """{"FILE:LINE": row} of a .jsonl file."""
    rows = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--in {path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows[f"{path}:{number}"] = row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # JSON can escape half a character, which is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON of UTF-8 text ({error}); expected one row a line") from None
    if not rows:
        raise InputError(f"--in {path}: holds no row")
    return rows


def messages_of(prompt, place):
    """The messages of a prompt, a text or messages; InputError names the row's place if it is neither."""
    messages = prompt if isinstance(prompt, list) and prompt else [{"role": "user", "content": prompt}]
    if not all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    ):
        raise InputError(f'{place}: expected a "prompt", a string or a list of {{"role", "content"}} messages')
    return messages


def prompt_ids(tokenizer, row, place, template):
    """The ids of row["prompt"], by the rule of data_prep; an error names the row's place.

    row["opening"], where there is one: text that the response begins with, after the assistant's header.
    """
    prompt = row.get("prompt") if isinstance(row, dict) else None
    messages_of(prompt, place)
    try:
        return tokenization.prompt_ids(tokenizer, prompt, template, row.get("opening", ""))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
