"""One row of a file to its prompt and responses; forms.py says which columns hold them.

    preference(row, columns, chat, reasoning)      -> (prompt, [chosen, rejected])
    demonstration(row, columns, chat, reasoning)   -> (prompt, [response])

A prompt is a string or a list of messages, a response a string, or a message that has reasoning. chat: the tokenizer
has a chat template. In a column:
    strings             as they are
    messages            {role, content} or {from, value}, one or a list; the content a string or a list of text parts
    whole dialogues     messages of which the last is the response; "\\n\\nHuman: ...\\n\\nAssistant: ..." strings
    lists of strings    the turns of an A/B row: questions in the prompt, answers in each response (Chatbot Arena)
    reasoning           kept beside the content for the chat template ("auto"), or left out or written before it
prompt.py has the columns that come before the prompt.
"""

import itertools
import json
import math
import os
import re

from preferences.columns import PARTS, listed
from preferences.forms import ASSISTANT, HUMAN, SIDES, STRENGTH, number_or_nan, word_of
from preferences.messages import answer, assistant, contents, conversation, require_assistant, settled, shown, user
from preferences.prompt import whole_prompt
from preferences.sources import LeftOut, Malformed, kind
from preferences.written import ROLES

# preferences for neither, as letters alone: "tie (bothbad)" is "tiebothbad"
TIES = {"", *"none null nan tie tied draw both neither equal same 05 bothbad bothgood tiebothbad bothequal".split()}
TIES |= {"equallygood", "equallybad", "nopreference", "notsure"}


def preference(row, columns, chat, reasoning="auto"):
    """(prompt, [chosen, rejected]) of a row; raises LeftOut."""
    require(row, columns)
    if "first" in columns:
        names, row = resolve(row, columns), with_turns(row, columns)
    else:
        names = columns["chosen"], columns["rejected"]
    prompt = conversation(row[columns["prompt"]], columns["prompt"]) if "prompt" in columns else None
    sides = [conversation(row[name], name) for name in names]
    if columns.get("prompt") in PARTS and not is_repeated(prompt, sides):  # context beside whole dialogues, for example
        prompt, part = None, columns["prompt"]
        columns = {role: name for role, name in columns.items() if role != "prompt"} | {part: part}
    are_dialogues = all(isinstance(side, list) for side in sides)
    if "first" in columns and are_dialogues and sides[0][:-1] != sides[1][:-1]:
        raise LeftOut("dialogues differ", "before the last message")  # of two models that both answered each question
    if not all(isinstance(side, str) for side in sides):
        prompt, sides = split_messages(prompt, *sides)
    elif prompt is None or all(side.startswith(HUMAN) for side in sides):
        asked, (prompt, sides) = prompt, split_text(*sides)
        if asked is not None and not is_said_in(prompt, asked):
            name = columns["prompt"]
            raise Malformed(
                f"expected '{name}' to be a part of the dialogues in {names[0]} and {names[1]}, found another text; if "
                f"they hold the whole prompt: --ignore_columns {name}"
            )
    return finished(row, columns, prompt, sides, chat, reasoning)


def demonstration(row, columns, chat, reasoning="auto"):
    """(prompt, [response]) of an SFT row; raises LeftOut."""
    require(row, columns)
    name = columns["response"]
    prompt = conversation(row[columns["prompt"]], columns["prompt"]) if "prompt" in columns else None
    response = conversation(row[name], name)
    if isinstance(response, str):
        if prompt is None:
            raise Malformed(f"expected '{name}' to be a list of messages, found a string")
        return finished(row, columns, prompt, [response], chat, reasoning)
    *head, last = response
    require_assistant(last, name)
    if prompt is None and not head:
        raise Malformed(f"expected '{name}' to have messages before the last, found none")
    if prompt is not None and head and head != prompt:
        raise Malformed(
            f"expected one assistant message in '{name}', found {len(response)} messages that do not repeat the prompt"
        )
    return finished(row, columns, head or prompt, [answer(last)], chat, reasoning)


# --- columns ---


def require(row, columns):
    """Refuse a row that lacks one of `columns`."""
    if not isinstance(row, dict):
        raise Malformed(f"expected a JSON object, found {kind(row)}")
    for name in (columns[role] for role in columns if role not in PARTS):
        if name not in row:
            raise Malformed(f"expected a column '{name}', found {listed(row) or 'an empty object'}")


def resolve(row, columns):
    """(chosen, rejected): the columns of an A/B row; raises LeftOut where neither is preferred."""
    first, second = columns["first"], columns["second"]
    name = columns.get("preference") or columns["first_wins"]
    preference, word = row[name], word_of(row[name])
    # 1. Below 0 the first is better, above 0 the second; NaN where the preference does not say
    if "first_wins" in columns:
        strength = number_or_nan(row[columns["second_wins"]]) - number_or_nan(preference)
    elif name in STRENGTH:
        strength = number_or_nan(preference)
    else:
        sides = zip((first, second), SIDES[first, second])
        is_first, is_second = (word in {side.lower(), *words} for side, words in sides)
        strength = is_second - is_first if is_first != is_second else math.nan
    # 2. What to do with it
    if strength == 0 or math.isnan(strength) and re.sub(r"\W|_", "", word) in TIES:
        raise LeftOut("no preference", f"'{name}' is {shown(preference)}")
    if not math.isfinite(strength):
        raise Malformed(f"expected '{name}' to name {first} or {second}, found {shown(preference)}")
    return (first, second) if strength < 0 else (second, first)


def with_turns(row, columns):
    """An A/B row whose turns are lists of strings, questions in the prompt and answers in each response, as dialogues.

    Chatbot Arena's three columns of winners come with such lists written as JSON.
    """
    names = [columns[name] for name in ("prompt", "first", "second") if name in columns]
    turns = [row[name] for name in names]
    if "first_wins" in columns:
        turns = [strings_of(value) for value in turns]
        if any(isinstance(each, list) and None in each for each in turns):
            raise LeftOut("empty response", "null in a list of turns")
    if not all(isinstance(each, list) and each and all(isinstance(text, str) for text in each) for each in turns):
        return row
    asked, *answered = turns
    if {len(each) for each in answered} != {len(asked)}:
        raise Malformed(f"expected as many answers as questions in '{names[0]}', found {shown(turns)}")
    if len(asked) == 1:
        return row | dict(zip(names, (text for [text] in turns)))
    sides = [list(itertools.chain(*zip(map(user, asked), map(assistant, each)))) for each in answered]
    return row | dict(zip(names, (sides[0][:-1], *sides)))


def strings_of(value):
    """The list that a text of JSON holds, else the value."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value


# --- dialogues that are messages ---


def split_messages(prompt, chosen, rejected):
    """Responses given as messages: the last of each is the response, the others, the same in both, are the prompt."""
    sides = [[assistant(side)] if isinstance(side, str) else side for side in (chosen, rejected)]
    dialogues = [side for side in sides if len(side) > 1]
    if len(dialogues) == 1:  # the other one is an answer to the same: ms-swift's
        sides = [side if len(side) > 1 else [*dialogues[0][:-1], *side] for side in sides]
    for side, name in zip(sides, ("chosen", "rejected")):
        require_assistant(side[-1], name)
    head = sides[0][:-1]
    if head != sides[1][:-1]:
        raise Malformed("expected chosen and rejected to share all messages but the last, found other messages")
    if prompt is None and not head:
        raise Malformed("expected a prompt column or leading messages that chosen and rejected share, found neither")
    if prompt is not None and head:  # whole dialogues beside a prompt, as in ultrafeedback_binarized: they must agree
        if not repeats(prompt, head, sides):
            raise Malformed(
                f"expected one assistant message in 'chosen', found {len(sides[0])} messages that do not "
                "repeat the prompt"
            )
    return head or prompt, [answer(side[-1]) for side in sides]


def is_repeated(prompt, sides):
    """Whether responses that are whole dialogues repeat the prompt. True of other responses."""
    if all(isinstance(side, str) for side in sides):
        return not all(side.startswith(HUMAN) for side in sides) or is_said_in(os.path.commonprefix(sides), prompt)
    dialogues = [side for side in sides if isinstance(side, list) and len(side) > 1]
    return not dialogues or repeats(prompt, dialogues[0][:-1], sides)


def is_said_in(text, prompt):
    """Whether all texts of a prompt are in a text."""
    return all(each.strip() in text for each in contents(prompt))


def repeats(prompt, head, dialogues):
    """Whether a prompt says nothing but what is in the dialogues: their beginning, a question, or one of them."""
    asked = [said["content"].strip() for said in head if said["role"] == "user"]
    if isinstance(prompt, str):
        return prompt.strip() in asked
    return prompt in [head, [said for said in head if said["role"] != "system"], *dialogues]


def finished(row, columns, prompt, responses, chat, reasoning):
    """(prompt, responses) as they are encoded: hh-rlhf's turns as messages, the whole prompt, all of it text."""
    if chat and isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        prompt, responses = dialogue(prompt), [response.strip() for response in responses]
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Malformed("expected a prompt whose last message is the user's, found the assistant's")
    prompt = whole_prompt(row, columns, prompt, chat)
    responses = [answer(settled(said, reasoning)) for said in responses]
    if isinstance(prompt, list):
        prompt = [settled(said, reasoning) for said in prompt]
    try:
        "".join(text for said in (prompt, *responses) for text in contents(said)).encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"expected text, found a lone surrogate (\\u{ord(error.object[error.start]):04x})") from None
    return prompt, responses


# --- dialogues that are strings ---


def split_text(chosen, rejected):
    """(prompt, [chosen, rejected]) of hh-rlhf's dialogues: their common beginning, and the last answer of each."""
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    rest = [chosen[end:], rejected[end:]]
    if not shared.startswith(HUMAN) or ASSISTANT not in shared:
        raise Malformed("expected a prompt column, or dialogues that share all but the last assistant turn")
    if any(turn in side for turn in (HUMAN, ASSISTANT) for side in rest):
        raise Malformed("expected dialogues that share all but the last assistant turn, found more that differs")
    return chosen[:end], rest


def dialogue(prompt):
    """An hh-rlhf prompt as messages, without the last "Assistant:", which the template writes."""
    words = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = zip(words[1::2], words[2::2])
    return [{"role": ROLES[who.lower()], "content": text.strip()} for who, text in turns][:-1]
