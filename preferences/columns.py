"""Which columns of a row are read beside the prompt and the responses, and what becomes of those that are not.

One rule for preferences, SFT and make_prefs.py --strategy label: a column, or a field of a message, that holds text,
messages, images or tools is read, or is known to be harmless (ids, scores, sources, models, times), or says nothing
that is not read elsewhere in its row. Otherwise it stops the job, which names it and the ways out.
"""

import json
import re
import shlex
from collections import Counter

from files import InputError, shorten
from preferences.written import Unlike

# {part: names of the column}: what belongs to a prompt beside its own column, in the order in which it comes before it
PARTS = {
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "context": ("context",),
    "input": ("input",),
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of messages that hold what was thought before

# What the words of a name say of a column. `score_chosen` and `prompt_id` are named by their last word, sides aside.
SIDE = {"a", "b", "j", "k", "chosen", "rejected"}
LABELS = set(
    """
    id ids idx index uid uuid guid hash sha256 md5 ip url urls uri link links path paths file filename source sources
    origin dataset datasets license licence language languages lang locale country split datasplit subset category
    categories topic topics subject domain domains type kind tag tags difficulty level quality group cluster name model
    models generator judge worker author timestamp timestamps tstamp time date created updated at utc version score
    scores rating
    ratings reward rewards rank ranks winner label labels safety severity toxicity status state principle
    """.split()
)
JUDGEMENTS = {"score", "scores", "rating", "ratings", "preference", "preferences", "annotation", "annotations"}
JUDGEMENTS |= {"moderation", "meta", "metadata"}
IMAGES = {"image", "images", "img", "picture", "pictures", "photo", "photos", "pixel", "frames"}
IMAGES |= {"video", "videos", "audio", "audios"}
TOOLS = {"tool", "tools", "function", "functions"}
CHOICES = {"choices", "options"}  # those of a question
JUDGED = ("label", "kto_tag", "score", "rating", "reward", "correct", "desirable")
REJECTED = re.compile("reject|non_preferred", re.I)  # columns that SFT leaves out: it trains on the chosen ones
NUMBER = re.compile(r"[-+]?[\d.,]+%?|\d{4}-\d\d-\d\d([T ][\d:.,+-]+Z?)?")  # texts that are numbers or times
NOTHING = {"", "[]", "{}", "null", "none", "nan"}  # texts that say nothing
ROLE_WORDS = {"user", "assistant", "system", "human", "gpt", "text"}
# the fields of an object that are read, by the first of them that it has
FIELDS = (("messages",), ("human", "assistant"), ("from", "value"), ("role", "content"), ("type", "text", "value"))
INSIDE = {"prompt", "question", "instruction", "query", "messages", "conversation", "conversations", *PARTS}
INSIDE |= {"passage", "passages", "document", "documents", "article"}
INSIDE |= {*PARTS["system"], *IMAGES, *TOOLS, "tool_calls", "function_call"}  # no metadata
ASKING = INSIDE | {"instructions", "user"}  # words of a name: its text may be part of the prompt

HELD = {"text": "text", "object": "an object that holds text", "messages": "messages", "reasoning": "reasoning"}
HELD |= {"field": "a field of messages"}
HELD |= {"tools": "tools or their calls", "images": "images, video or audio"}


def parse_columns(text, roles):
    """'prompt=question,chosen=a' -> {"prompt": "question", "chosen": "a"}; roles: what a column may hold."""
    columns = {}
    for part in text.split(",") if text else ():
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if ours not in roles or not theirs:
            expected = ",".join(f"{name}=NAME" for name in roles)
            raise InputError(f"--columns {text}: expected {expected}, found '{part}'")
        columns[ours] = theirs
    return columns


def parse_names(text):
    """--ignore_columns: 'id,notes' -> ["id", "notes"]"""
    return sorted({name.strip() for name in (text or "").split(",")} - {""})


def listed(names):
    """Names on one line, whatever is in them."""
    return shorten(", ".join(name if name.isprintable() else json.dumps(name) for name in names), 300)


def prompt_parts(present, columns, given):
    """{part: column} of the columns `present` that come before the prompt; given: those that --columns names."""
    found = {}
    for part, names in PARTS.items():
        free = [name for name in names if name in present and name not in columns.values()]
        if part in given:
            found[part] = given[part]
        elif free:
            found[part] = free[0]
    return found


def leave_out(table, names, path):
    """Take columns and fields of messages out of the rows of a file; raises InputError for a name that there is not."""
    values, missing = [row.value for row in table if isinstance(row.value, dict)], set(names)
    present = list(dict.fromkeys(name for value in values for name in value))
    for value in values if names else ():
        inside = [(each, known) for column in value.values() for each, known in objects(column)]
        for each, known in [(value, ()), *inside]:
            for name in (name for name in names if name in each and name not in known):
                missing.discard(name)
                del each[name]
    if values and missing:
        raise InputError(f"{path}: no column '{min(missing)}'; the columns are {listed(present)}")


def lines(columns, not_read):
    """Lines to print: the columns that come before the prompt, and those that are not read."""
    before = [columns[part] for part in PARTS if part in columns]
    names = dict.fromkeys(not_read)
    both = (("part of the prompt", before), ("not read", names))
    return [f"{title}: {listed(each)}" for title, each in both if each]


# --- what a value holds ---


def leaves(value):
    """Yields (key, value) of everything in a JSON value that is no list and no object; key: of the nearest object."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, (list, tuple)):
            waiting += [(key, each) for each in value]
        else:
            yield key, value


def says(text):
    """Whether a value is a text that is more than white space."""
    return isinstance(text, str) and bool(text.strip())


def texts_in(value):
    """[(key, text)] of the texts in a value that say something."""
    found = [(key, str(leaf)) for key, leaf in leaves(value) if isinstance(leaf, (str, Unlike))]
    return [(key, text) for key, text in found if text.strip().lower() not in NOTHING]


def is_text(value):
    """Whether a value is a text or a list of texts."""
    return all(isinstance(each, str) for each in (value if isinstance(value, list) else [value]))


def holds_messages(value):
    """Whether a value is a message or a list of them, or, as a text of JSON, would be."""
    value = written_value(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and any(first.keys() >= set(names[:2]) for names in FIELDS[1:4])


def written_value(value):
    """The object or the list of objects that a text writes as JSON; another value as it is."""
    if not isinstance(value, str) or value.lstrip()[:2] not in ("[{", '{"'):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def words_of(name):
    """chosen-modelName_1 -> ["chosen", "model", "name"]"""
    return re.findall(r"[a-z]+(?:256|5)?", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def is_label(text):
    """Whether a text is a name or a category and no sentence: one short line without a full stop."""
    text = text.strip()
    return "\n" not in text and (" " not in text or len(text) <= 100 and text[-1] not in ".?!:")


def is_harmless(name, value, texts):
    """Whether the name of a column says that its texts are no part of a prompt or of a response."""
    words = words_of(name)
    nouns = [word for word in words if word not in SIDE]
    if JUDGEMENTS & set(words) and not (is_text(value) and ASKING & set(words)):
        return not any(str(key).lower() in INSIDE for key, _ in texts_in(written_value(value)))
    if holds_messages(value):
        return False
    if words == ["task"]:
        return all(" " not in text for _, text in texts)
    return bool(nouns) and nouns[-1] in LABELS and all(is_label(text) for _, text in texts)


def held(name, value):
    """What an unread column or field holds, a key of HELD; None if it is harmless."""
    words, texts = set(words_of(name)), texts_in(value)
    filled = [leaf for _, leaf in leaves(value) if leaf is not None]
    if any(isinstance(leaf, bytes) and leaf for leaf in filled):
        return "images"
    if words & IMAGES and (texts or filled and isinstance(value, (list, dict))):
        return "images"
    is_choice = bool(words & CHOICES and (texts or filled and isinstance(value, list)))
    if not is_choice and all(NUMBER.fullmatch(text.strip()) for _, text in texts):
        return None
    if words & TOOLS:
        return "tools"
    if is_harmless(name, value, texts):
        return None
    return "messages" if holds_messages(value) else "text" if is_text(value) else "object"


def says_nothing_new(name, value, columns, parts):
    """Whether all texts of a column are read elsewhere in its row, or `text` is the whole row, written out.

    columns: the values of those that are read. parts: what was read.
    """
    texts = [text.strip() for _, text in texts_in(value)]
    columns = [value for value in columns if value is not None]
    strings = [text for text in columns if isinstance(text, str)]
    if name == "text" and len(strings) == len(columns):
        return all(text.strip() in texts[0] for text in strings)
    read = {text.strip() for _, text in texts_in([parts, strings])}
    return all(text in read or text in ROLE_WORDS for text in texts)


# --- the rule ---


def objects(value):
    """Yields (object, names of its fields that are read) of the messages in a value and of the objects they are in."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            known = next((names for names in FIELDS if names[0] in value), ())
            waiting += [value[name] for name in known if name in value]
            yield value, known


def not_read(row, columns, parts, read_fields=()):
    """({name: what it holds}, [name]): the unread columns and fields of a row that stop the job, and the harmless ones.

    columns: {role: column that is read}. parts: what was read of the row. read_fields: those of messages, and of the
    objects of a list of responses, that are read beside FIELDS.
    """
    values = {name: row.get(name) for name in columns.values()}
    found, harmless = {}, []
    for each, known in objects(list(values.values())):
        for name in (name for name in each if name not in known and name not in read_fields):
            if what := held(name, each[name]):
                found[name] = "reasoning" if name in REASONING else what if what in ("images", "tools") else "field"
            elif says_anything(each[name]):
                harmless.append(name)
    for name in (name for name in row if name not in values):
        what = held(name, row[name])
        if what in ("text", "messages", "object") and says_nothing_new(name, row[name], list(values.values()), parts):
            what = None
        if what and not ("response" in columns and REJECTED.search(name)):
            found[name] = what
        elif says_anything(row[name]):
            harmless.append(name)
    return found, harmless


def says_anything(value):
    return any(leaf is not None for _, leaf in leaves(value))


def way_out(found, given):
    """The sentence on unread columns {name: what it holds}; given: the columns that --columns names."""
    names = listed([f"{name} ({HELD[what]})" for name, what in found.items()])
    ways = []
    if part := next((name for name, what in found.items() if what in ("text", "messages")), None):
        ours = "history" if found[part] == "messages" else "context"
        ours = "system" if "system" in part.lower() else ours
        named = ",".join(f"{role}={name}" for role, name in {**given, ours: part}.items())
        ways.append(f"--columns {shlex.quote(named)} makes '{part}' a part of the prompt")
    if "reasoning" in found.values():
        ways.append("--reasoning inline writes it before the answer as <think>, --reasoning drop leaves it out")
    ways.append(f"--ignore_columns {shlex.quote(','.join(found))} goes on without")
    return f"nothing reads {names}, which would be lost; {', or '.join(ways)}"


def refuse_unread(table, columns, given, read_fields, path):
    """The names of the columns and fields that are not read and harmless. Refuses the others.

    table: Rows, each with its parts. Columns that half of the rows fill stop the job; rows that fill others are
    malformed. columns: {role: column that is read}. given: those that --columns names. read_fields: see not_read().
    """
    usable = [row for row in table if not row.reason]
    count, stray, harmless = Counter(), [], {}
    for row in usable:
        found, others = not_read(row.value, columns, row.parts, read_fields)
        harmless |= dict.fromkeys(others)
        if found:
            count.update(found.items())
            stray.append((row, found))
    if most := {name: what for (name, what), rows in count.items() if 2 * rows >= len(usable)}:
        raise InputError(f"{path}: {way_out(most, given)}")
    for row, found in stray:
        row.leave_out("malformed", way_out(found, given))
    return list(harmless)


def refuse_judged(rows, columns, path):
    """Refuse SFT rows with a column that judges the response."""
    tables, named = [row for row in rows if isinstance(row.value, dict)], ",".join(map("=".join, columns.items()))
    for name in JUDGED:
        filled = [row for row in tables if name in row.value and name not in columns.values()]
        sentence = (
            f"a column '{name}' says that some responses are bad ones, and SFT would learn them all; pair them "
            f"(make_prefs.py --strategy label), keep the good rows, or say --columns {named}"
        )
        if filled and 2 * len(filled) >= len(tables):
            raise InputError(f"{path}: {sentence}")
        for row in filled:
            row.leave_out("malformed", sentence)
