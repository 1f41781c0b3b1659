"""Plant one named error in a worked solution of any source, in one of its equations, and work on to a wrong answer.

    errors("... 48 friends ...", "48/2 = <<48/2=24>>24 in May.\\n48+24 = <<48+24=72>>72 altogether.\\n#### 72")
        -> ("wrong_operation", 0, "48*2 = 96 in May.\\n48+96 = 144 altogether.\\n#### 144"), ...

The kinds are those of the embedded tasks (arithmetic.py). An error is planted only where its consequences can be
followed: in a true equation of two numbers whose result is new, neither a number of the question nor said before. Every
later mention of that number ("24 hours" as well, where 24 is the result) is replaced, and every equation that uses it
is worked again; its result must be new, too. A version that divides unevenly, goes below zero or needs an expression
that is not understood is left out. Solutions end in "#### answer", as GSM8K's do.
"""

import operator
import re
from fractions import Fraction

NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
NUMBERS = re.compile(rf"(?<![\w.])(?:{NUMBER})(?![\d%])")
EQUATION = re.compile(
    rf"(?<![\w.+*/×÷=-])(?<![+*/×÷=-] )\$?(?P<a>{NUMBER})(?P<left>\s*)(?P<op>[-+*/×÷x])(?P<right>\s*\$?)"
    rf"(?P<b>{NUMBER})(?P<equals>\s*=\s*\$?)(?P<c>{NUMBER})(?![\d%]|\s*[-+*/×÷=]|\.\d)"
)
ANNOTATION = re.compile(r"<<[^<>]*>>")
MEANS = {"×": "*", "x": "*", "÷": "/"}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def plain(solution):
    """`solution` without GSM8K's calculator annotations, <<48/2=24>>, which a planted error would contradict."""
    return ANNOTATION.sub("", solution)


def value(text):
    return Fraction(text.replace(",", ""))


def compute(a, op, b):
    """a op b if it is at least 0 and has at most two decimals, else None."""
    if MEANS.get(op, op) == "/" and b == 0:
        return None
    result = OPERATIONS[MEANS.get(op, op)](a, b)
    return result if result >= 0 and (result * 100).denominator == 1 else None


def write(number, like):
    """A Fraction as text, in the spelling of the text `like`: with thousands commas, with two decimals."""
    whole, cents = divmod(number * 100, 100)
    text = f"{int(whole):,}" if "," in like else str(int(whole))
    if not cents:
        return text
    decimals = f"{int(cents):02d}"
    has_two = "." in like and len(like.rpartition(".")[2]) == 2
    return f"{text}.{decimals if has_two else decimals.rstrip('0')}"


def equations(solution):
    """The matches of EQUATION that are true."""
    return [
        match
        for match in EQUATION.finditer(solution)
        if compute(value(match["a"]), match["op"], value(match["b"])) == value(match["c"])
    ]


def numbers(text):
    return {value(match[0]) for match in NUMBERS.finditer(text)}


# --- the consequences -------------------------------------------------------------------------------------


def replaced(text, changed):
    """`text` with the numbers of `changed` {old: new} replaced."""

    def new(match):
        number = value(match[0])
        return write(changed[number], match[0]) if number in changed else match[0]

    return NUMBERS.sub(new, text)


def follow(text, changed, known):
    """`text`, which comes after a changed result, worked again; None where it cannot be.

    changed: {old: new} results so far; known: the numbers said before `text`, which mean something else.
    """
    changed, known, parts, end = dict(changed), known | set(changed), [], 0
    for match in equations(text):
        a, b, c = (value(match[name]) for name in "abc")
        between = text[end : match.start()]
        if not understood(between, changed):
            return None
        parts.append(replaced(between, changed))
        known = known | numbers(between)
        if a in changed or b in changed:
            result = compute(changed.get(a, a), match["op"], changed.get(b, b))
            if result is None or c in known | {a, b}:
                return None
            parts.append(spelled(match, changed.get(a, a), match["op"], changed.get(b, b), result))
            changed[c] = result
        else:
            if c in changed:  # the same number anew, from sound numbers: which is meant later?
                return None
            parts.append(match[0])
        known = known | {a, b, c}
        end = match.end()
    if not understood(text[end:], changed):
        return None
    return "".join(parts) + replaced(text[end:], changed)


def understood(text, changed):
    """Whether no changed number stands in a calculation that no equation of ours covers."""
    return not any("=" in line and numbers(line) & set(changed) for line in text.split("\n"))


def spelled(match, a, op, b, c):
    """The matched equation with other numbers or another sign; its spacing, and what stays the same, are kept."""
    a, b, c = (
        match[name] if value(match[name]) == number else write(number, match[name])
        for name, number in (("a", a), ("b", b), ("c", c))
    )
    dollar = "$" if match[0].startswith("$") else ""
    return dollar + a + match["left"] + op + match["right"] + b + match["equals"] + c


# --- the errors -------------------------------------------------------------------------------------------


def wrong(match, known):
    """Yields (kind, a, op, b, c): every wrong version of one equation; known: the numbers that could be miscopied."""
    a, op, b, c = value(match["a"]), match["op"], value(match["b"]), value(match["c"])
    for slip in (-10, -2, -1, 1, 2, 10):
        if c + slip > 0:
            yield "arithmetic_slip", a, op, b, c + slip
    for other in "+-*/":
        if other != MEANS.get(op, op) and compute(a, other, b) not in (None, c):
            yield "wrong_operation", a, other, b, compute(a, other, b)
    for number in sorted(known):
        for left, right in ((number, b), (a, number)):
            if (left, right) != (a, b) and compute(left, op, right) not in (None, c):
                yield "wrong_number_copied", left, op, right, compute(left, op, right)


def errors(prompt, solution):
    """Yields (kind, place, text): `solution` without annotations, with an error of `kind` in equation `place`."""
    solution = plain(solution)
    found, asked = equations(solution), numbers(prompt)
    for place, match in enumerate(found):
        head, tail, result = solution[: match.start()], solution[match.end() :], value(match["c"])
        known = asked | numbers(head) | {value(match["a"]), value(match["b"])}
        if result in known:
            continue
        for kind, a, op, b, c in wrong(match, asked):
            rest = follow(tail, {result: c}, known)
            if rest is not None:
                yield kind, place, head + spelled(match, a, op, b, c) + rest
        start, end = solution.rfind("\n", 0, match.start()) + 1, solution.find("\n", match.end())
        is_alone = [each for each in found if start <= each.start() < end] == [match]
        if len(found) > 1 and end > 0 and is_alone:
            rest = follow(solution[end + 1 :], {result: value(match["a"])}, known)
            if rest is not None:
                yield "dropped_step", place, solution[:start] + rest
