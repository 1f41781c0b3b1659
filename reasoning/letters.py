"""The letter of an option, A to J, as models write it: (B), option B, "The answer is B."."""

import re

from reasoning.marks import UNCLEAR

BARE = r"(?<![A-Za-z'])([A-HJ])(?![A-Za-z'])"  # a letter that is no word's; I is one
LETTER = rf"\(?{BARE}(?:\)|(?=\s*(?:[.,:;!]|\n|\Z))|(?=\s+(?:because|since|as|is|or|and)\b)|(?=\s+[-–—]\s))"
SEVERAL = re.compile(r"\s*(?:,|,?\s*(?:or|and)\b)\s*\(?" + BARE + r"(?!\)?\s+is\b)")  # "A or B", "A, B": no answer
ENDS_IN_SEVERAL = re.compile(BARE + r"\)?" + SEVERAL.pattern + r"\)?[.!]?\Z")
MARKUP = re.compile(r"\\?(?:boxed|text\w*|mathrm|mathbf)\s*\{|\\[()\[\]]|</?answer>|[{}$*_`\"“”‘’\[\]]|'(?=[A-HJ]'|\W)")
OPTION = re.compile(r"(?i:(?:option|choice|answer)\s*:?\s+)?" + LETTER)
ANSWER_IS = re.compile(r"(?i:answer\s*(?:is|:)[\s:]*(?:either\s+)?(?:option\s+|choice\s+)?)" + LETTER)
IS_RIGHT = re.compile(
    rf"(?:(?i:\b(?:option|choice)\s+(?:is\s+)?)\(?{BARE}\)?|\(?{BARE}\)?)"
    r"\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)


def letter(text):
    """The letter that a marked place holds: "(B)", "B. Paris", "option B"."""
    text = MARKUP.sub("", text).strip()
    found = ANSWER_IS.search(text) or OPTION.match(text)
    if not found:
        return None
    return UNCLEAR if SEVERAL.match(text[found.end() :]) else found[1]


def letter_in_prose(text):
    """The letter of a text. It is looked for, in this order,

    after the last "answer is" or "answer:"; where an option is said to be right; at the end of the last line; at the
    beginning, if no other line begins with an option. "A teacher" has an article, and "A or B" is no answer.
    """
    text = MARKUP.sub("", text).strip()
    for pattern in (ANSWER_IS, IS_RIGHT):
        if said := list(pattern.finditer(text)):
            last = said[-1]
            return UNCLEAR if SEVERAL.match(text[last.end() :]) else next(filter(None, last.groups()))
    return letter_by_place([line.strip() for line in text.split("\n") if line.strip()])


def letter_by_place(lines):
    """The letter at the end of the last of `lines`, or at the beginning of the first."""
    if not lines:
        return None
    ending = set(re.findall(r"\(([A-HJ])\)", lines[-1])) or set(re.findall(BARE + r"[.!)]?\Z", lines[-1]))
    beginning = [match[1] for match in map(OPTION.match, lines) if match]
    if ENDS_IN_SEVERAL.search(lines[-1]):
        return UNCLEAR
    if len(ending) == 1 and (len(lines) > 1 or not beginning):
        return ending.pop()
    return beginning[0] if len(beginning) == 1 and OPTION.match(lines[0]) else None
