"""Where answers stand in what models write: after ####, in \\boxed{}, in <answer>, after "the answer is".

problems("so 18\\n#### 18\\n\\nQuestion: ...")       ["so 18\\n#### 18", "\\n\\nQuestion: ..."]
marked_places("so 18\\n#### $18 a day")           ["$18 a day"]
"""

import re

UNCLEAR = ""  # what a parser says of a place with several answers, or with a calculation: nothing else is looked at

NEXT = re.compile(
    r"\n[ \t#*>-]*(?:Next )?(?:Question|Problem|Exercise|Instruction|Human|User|Q)(?: ?\d+\**[.:)]|\**:)\**\s*\S"
)
PARAGRAPH = re.compile(r"####[^\w\n]*\d[^\n]*\n(?=[ \t]*\n)")  # "#### 18" and an empty line
HEADING = re.compile(
    r"\W*(?:(?i:(?:step|part|case|phase|section|day|week|method)\s+\d|(?:explanation|reasoning|note|check|verification)\b)"
    r"|\d[.)] +[A-Z])"
)
ANSWERED = re.compile(r"(?:####[ \t]*[^\s#]|\\boxed\s*\{|</answer>|(?i:\banswer is\b))[^\n]*\n")
EMPHASIS = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|`")  # 2**3 is a power
BOX = re.compile(r"\\?(?:boxed|fbox)\s*\{")  # some models lose the backslash
TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.S)
SAID = re.compile(  # up to the end of the line or to another "the answer is"; a question ends what is ours
    r"(?i)\banswers?\b[^.:\n]{0,60}?(?:\b(is|are)\b|:)(?! not\b)[\s:]*"
    r"(\S(?:(?!\bthe (?:\w+ )?answer is\b)[^\n?])*(?:\?[^\n]*)?)"
)
CLAUSE = re.compile(r"[.;!?](?:\s|\Z)|,\s+(?=[a-z])|\s(?:because|since|which|where|as)\b")


def without_thoughts(text):
    """What follows the last <think> block of a response: all of it without one, nothing where it is not closed.

    Models whose chat template knows thoughts (Qwen3's, and so SDAR's) begin every response with such a block.
    """
    _, closed, answer = text.rpartition("</think>")
    if closed:
        return answer.lstrip("\n")
    return "" if text.lstrip().startswith("<think>") else text


def problems(text):
    """`text` in parts, one for each problem that it solves: a model may run on into others after its answer.

    A part ends before a line that begins with "Question:" or the like, after an answer with a question mark behind, and
    after a paragraph that ends in #### and a number.
    """
    last_question = text.rfind("?")
    ends = {found.start() for found in NEXT.finditer(text)}
    ends |= {found.end() - 1 for found in ANSWERED.finditer(text) if found.end() <= last_question}
    ends |= {found.end() - 1 for found in PARAGRAPH.finditer(text)}
    places = [0, *sorted(ends), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:])]


def boxed(text):
    """What the last \\boxed{...} or \\fbox{...} holds, braces balanced; None if there is none or it is cut off."""
    starts = list(BOX.finditer(text))
    if not starts:
        bare = re.findall(r"\\boxed\s+([^\s$.]+)", text)  # "\boxed 2" is TeX, too
        return bare[-1] if bare else None
    start, depth = starts[-1].end(), 1
    for mark in re.finditer(r"\\.|[{}]", text[start:], re.S):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start : start + mark.start()].strip()
    unclosed = re.match(r"([^\n<]*\w[^\n<]*)(?:\n|</)", text[start:])  # the brace is forgotten, but the text goes on
    return unclosed[1].strip() if unclosed else None


def marked_places(text):
    """The texts of the places where an answer is marked, the one that counts most first."""
    _, *marked = text.split("####")
    box_after = boxed(marked[-1]) if marked else None
    lines = [each.strip().partition("\n")[0] for each in reversed(marked)]
    lines = [line for line in lines if not HEADING.match(line)]
    tags = [each.strip() for each in TAG.findall(text)[-1:]]
    return [place for place in (box_after, *lines, boxed(text), *tags) if place is not None]


def is_marked(text):
    return "####" in text or BOX.search(text) is not None or "<answer>" in text


def said_places(text):
    """[("is" or "", what follows)] of every "the answer is ..." and "Answer: ...", the last one first."""
    return [(verb, said.strip()) for verb, said in reversed(SAID.findall(text))]


def lone_line(text):
    """The only line of `text` that is not blank, or None."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[0] if len(lines) == 1 else None
