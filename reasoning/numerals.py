"""Numbers and times of day as models write them, in one spelling.

number("$1,200.0 a day")         "1200"      number("x = \\\\frac{1}{2}")      "1/2"
number("18 or 20")               ""          number("no idea")              None
number_in_prose("9 * 2 = 18. So she makes 18 dollars.")                     "18"
"""

import re
from fractions import Fraction

from reasoning.marks import CLAUSE, UNCLEAR, is_marked, said_places

NUMBER = re.compile(
    r"(?<![\w./])(?P<sign>(?<!\))-)?(?P<whole>\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+|(?<=\d))"
    r"(?P<scale> ?(?:thousand|million|billion)\b|[kKM]\b|[eE][+-]?\d{1,2}\b)?"
    r"(?: (?P<over>\d+)(?=/[1-9]))?(?:/(?P<under>[1-9]\d*))?"
)
SCALE = {"thousand": 3, "million": 6, "billion": 9, "k": 3, "K": 3, "M": 6}
LONGEST = 200  # characters of a number; Python refuses to read thousands
GOES_ON = re.compile(  # what makes a number one of several, or the beginning of a calculation
    r"\w*\d|\s?[xyzn]\b|\(|[.:,]\d|\s*[\^\\]"
    r"|\s*(?:[-+*/=:;±÷,]|\*\*|x\b|(?:[A-Za-z]+\s+){0,2}(?:or|and|to)\b|[A-Za-z]+(?=\s)|(?=\s))\s*\(?-?\.?\d"
)
TWO_NAMES = re.compile(r"[A-Za-z]\w* *=[^=]*(?:[,;]|\band\b|\bor\b)[^=]*[A-Za-z]\w* *=")  # "x = 3, y = 4"
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
CHARACTERS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
CHARACTERS |= dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63"), "-")
THOUSANDS = r"(?<=\d)(?:,?\\!|\{,\}|\\[,;: ]|\\thinspace|[\u2009\u202f\u00a0'~])\s?(?=\d{3}(?!\d))"  # 1\,234
SPELLINGS = [  # (pattern, what it becomes), in this order
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator
    (THOUSANDS, ""),
    (r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))", r" \1\3/\2\4 "),
    (r"(?<=\d)[²³]", "^2"),  # a power, and no number
    (r"½", " 1/2"),
    (r"¼", " 1/4"),
    (r"¾", " 3/4"),
    (r"(?i)\b(?:minus|negative) +(?=[.\d])", "-"),
    (r"\^\s*\{?\s*\\circ\b\s*\}?", " "),
    (r"\\(?:text|math|mbox)[a-z]*(?=[\s{])|\\(?:left|right|displaystyle|q?quad|approx)(?![A-Za-z])", " "),
    (r"\\[,;:! ()\[\]]", " "),
    (r"\\(?:times|cdot)(?![A-Za-z])|[×·]", "*"),
    (r"\\div(?![A-Za-z])", "÷"),
    (r"\s*\*\s*10\s*\^\s*\{?\s*(-?\d+)\s*\}?", r"e\1"),
    (r"\\?\$|[€£¥]|(?<=\d):00\b", ""),  # 2:00 pm is 2
    (r"\\?%|[{}\"“”_≈~°]", " "),
]


def plain(text):
    """`text` in the spelling of NUMBER: without markup, TeX and currencies, 1\\,234 as 1234, \\frac{1}{2} as 1/2."""
    text = text.translate(CHARACTERS)
    for pattern, becomes in SPELLINGS:
        text = re.sub(pattern, becomes, text)
    return re.sub(r"[ \t]+", " ", text).strip()


def spelled(found):
    """One spelling for one number, a match of NUMBER: 1,200.50 -> 1200.5, -0 -> 0, 007 -> 7, 1 1/2 -> 3/2."""
    is_mixed = found["over"] and (found["decimals"] or found["scale"] or not found["whole"])  # 1.5 1/2 is no number
    if len(found[0]) > LONGEST or is_mixed:
        return UNCLEAR
    whole, decimals = re.sub(r"\D", "", found["whole"] or ""), found["decimals"][1:]
    point = len(whole) + exponent((found["scale"] or "").strip())
    digits = (whole + decimals).ljust(point, "0").rjust(len(whole + decimals) - min(point, 0), "0")
    point = max(point, 0)
    parts = digits[:point].lstrip("0") or "0", digits[point:].rstrip("0")
    number = ".".join(part for part in parts if part)
    if found["over"]:
        number = str(int(whole) * int(found["under"]) + int(found["over"]))
    if found["under"]:
        number += f"/{found['under']}"
    return f"-{number}" if found["sign"] and value(number) else number


def exponent(scale):
    """The power of ten of a "million", a "k" or an "e-3"."""
    return int(scale[1:]) if scale[:1] in ("e", "E") else SCALE.get(scale, 0)


def value(number):
    """The Fraction of what spelled() writes."""
    over, _, under = number.partition("/")
    return Fraction(over) / Fraction(under or 1)


def right_side(text):
    """What stands after the last "=" that a number follows."""
    sides = text.split("=")
    return next((side for side in reversed(sides) if re.search(r"\d", side)), text)


def number(text):
    """The number that a marked place holds: "$18 a day", "x = 18" and "\\frac{36}{2} = 18" hold 18, "5 + 3" none."""
    text = plain(text)
    if TWO_NAMES.search(text) or "=" in text[len(CLAUSE.split(text)[0]) :]:
        return UNCLEAR
    text = re.sub(r"\A\W*?- (?=[.\d])", "-", right_side(text).strip())
    found = NUMBER.search(text)
    if not found:
        return UNCLEAR if re.search(r"\d", text) else None
    before, after = text[: found.start()], text[found.end() :]
    if re.search(r"[A-Za-z]{2}", before) and NUMBER.search(after):
        return None  # a sentence
    if "\\" in before or GOES_ON.match(after):
        return UNCLEAR
    return spelled(found)


def number_in_prose(text):
    """The number after the last "the answer is", else that of a first line without words, else the only one of the last
    sentence that has any."""
    if is_marked(text):
        return None
    for verb, said in said_places(text):
        if verb and (answer := number(CLAUSE.split(said)[0])) is not None:
            return answer
        if not verb and (answer := only_number(said)):
            return answer
    if "=" not in (first := text.strip().partition("\n")[0]) and is_number(first):
        return number(first)
    sentences = [re.sub(r"\A\s*[-*•] ", "", each) for each in SENTENCE.split(text)]
    return next((found for each in reversed(sentences) if (found := only_number(each)) is not None), None)


def only_number(sentence):
    """The number of a sentence, of its last equation's right side where it has one; UNCLEAR if it has several."""
    text = right_side(plain(sentence))
    numbers = {spelled(found) for found in NUMBER.finditer(text)}
    if not numbers:
        return None
    return numbers.pop() if len(numbers) == 1 and "\\" not in text else UNCLEAR


def is_number(text):
    """Whether a text is a number, with a unit at most: "$1,200", "x = 5", "3 red pens"; not "3 Doors Down"."""
    text = right_side(plain(text)).strip(" .()")
    found = NUMBER.match(text)
    return found is not None and re.fullmatch(r"(?:[ /²³]|[a-z]{2,}|\b[ghlms]\b)*", text[found.end() :]) is not None


def same_number(answer, gold):
    return value(answer) == value(gold)


# --- times of day -----------------------------------------------------------------------------------------

TIME = re.compile(r"(?<![\d:])(\d{1,2}):([0-5]\d)(?:\s*([ap])\.?m\b|(?![\w:]))", re.IGNORECASE)


def time_of_day(text):
    """ "09:35" -> "9:35", "9:35 pm" -> "21:35"; UNCLEAR where there are several."""
    found = {clock(match) for match in TIME.finditer(text.partition("\n")[0])}
    if len(found) > 1:
        return UNCLEAR
    return found.pop() if found else None


def clock(match):
    hours, half = int(match[1]), (match[3] or "").lower()
    if half:
        hours = hours % 12 + (12 if half == "p" else 0)
    return f"{hours}:{match[2]}"


def time_in_prose(text):
    places = [said for _, said in said_places(text)] + text.split("\n")[::-1]
    return next((found for place in places if (found := time_of_day(place)) is not None), None)


def same_time(answer, gold):
    """Equal; twelve hours apart, where no am or pm is said, it cannot be told."""
    if answer == gold:
        return True
    (hours, minutes), (gold_hours, gold_minutes) = answer.split(":"), gold.split(":")
    return None if minutes == gold_minutes and (int(hours) - int(gold_hours)) % 12 == 0 else False
