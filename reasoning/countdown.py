"""Countdown: make a target from three numbers, each used once, as d1 asks it (Zhao et al., arXiv 2504.12216).

    Numbers: [83, 18, 75]     83 - 75 = 8
    Target: 10                18 - 8 = 10     \\boxed{18 - (83 - 75)}

draw and errors are those of a family (reasoning/tasks.py); expression, in_prose and same read answers (answers.py). The
gold answer is the problem itself, "10 from 83, 18, 75": every expression of these numbers with this value is right.
"""

import ast
import operator
import re
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from reasoning import numerals
from reasoning.arithmetic import Problem, pick
from reasoning.marks import is_marked, lone_line, said_places
from reasoning.puzzles import shuffled

LARGEST = 100  # of the numbers and of the target, as in d1's test file
PROMPT = (  # eval/countdown.py of d1, word for word
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
    "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
    "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an "
    "equals sign or the target number. For example: \\boxed{a + b * c}Respond in the following format:\n"
    "<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)


def ask(numbers, target):
    """(question, prompt, gold answer)"""
    question = f"Numbers: {list(numbers)}\nTarget: {target}"
    return question, f"{PROMPT}\n\n{question}", f"{target} from {', '.join(map(str, numbers))}"


# --- reading ----------------------------------------------------------------------------------------------

LONGEST = 200  # characters of an expression; Python refuses to read numbers of thousands of digits
GOLD = re.compile(r"(\d+) from (\d+(?:, ?\d+)+)")
SPELLINGS = [  # (pattern, what it becomes), in this order
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\\(?:times|cdot)(?![A-Za-z])|[×·]|(?<=[\d) ])x(?=[\d( ])", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\\(?:left|right)(?![A-Za-z])|\\[()\[\],;:! ]|\$", " "),
]
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def expression(text):
    """The calculation of a marked place, without the result that may follow it; None if there is none."""
    text = text.translate(numerals.CHARACTERS)
    for pattern, becomes in SPELLINGS:
        text = re.sub(pattern, becomes, text)
    *_, last = [line for line in text.split("\n") if line.strip()] or [""]
    sides = last.strip().rstrip(".>").split("=")
    if not re.fullmatch(r"[-+*/(). \d]*\d[-+*/(). \d]*", "".join(sides)):
        return None
    return " ".join(next((each for each in sides if re.search(r"\d.*[-+*/]", each)), sides[0]).split())


def in_prose(text):
    """What follows the last "the answer is", or the line that is all there is."""
    if is_marked(text):
        return None
    places = [said for _, said in said_places(text)] + [lone_line(text) or ""]
    return next((found for place in places if (found := expression(place)) is not None), None)


def value(node):
    """The Fraction of a tree of Python's parser. Raises ValueError if it holds more than + - * / of whole numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    raise ValueError


def claim(text):
    """(value, sorted numbers) of an expression or a gold answer; value: None if it has none, as "5 / 0"."""
    if len(text) > LONGEST:
        return None, []
    if gold := GOLD.fullmatch(text):
        return Fraction(gold[1]), sorted(map(int, gold[2].split(",")))
    numbers = sorted(map(int, re.findall(r"\d+", text)))
    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None, numbers


def same(answer, right):
    """Whether an expression has the value and the numbers of `right`, a gold answer or another expression."""
    return claim(answer) == claim(right)


# --- problems ---------------------------------------------------------------------------------------------


SLIPS = [slips for off in (-10, -2, -1, 1, 2, 10) for slips in ((off, 0), (0, off))]  # of the two results


class Way(NamedTuple):
    """(a op b) then `other`, or `other` then (a op b)."""

    a: int
    op: str
    b: int
    then: str  # the second operation
    other: int
    is_first: bool  # (a op b) stands before `other`


def ways(numbers):
    """Every Way to use three numbers."""
    for place, op, then, is_first, turned in product(range(3), "+-*/", "+-*/", (True, False), (True, False)):
        a, b = numbers[:place] + numbers[place + 1 :]
        a, b = (b, a) if turned else (a, b)
        yield Way(a, op, b, then, numbers[place], is_first)


def compute(a, op, b):
    """a op b if it is a whole number above 0, else None."""
    if op == "/":
        return a // b if a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if result > 0 else None


def worked(way, slips=(0, 0)):
    """((a, op, b, result), (left, op, right, result)) with results `slips` off; None where one is not above 0."""
    first = compute(way.a, way.op, way.b)
    if first is None or (first := first + slips[0]) < 1:
        return None
    left, right = (first, way.other) if way.is_first else (way.other, first)
    second = compute(left, way.then, right)
    if second is None or (second := second + slips[1]) < 1:
        return None
    return (way.a, way.op, way.b, first), (left, way.then, right, second)


def spelled(way):
    """Way(83, "-", 75, "-", 18, False) -> "18 - (83 - 75)": parentheses only where they are needed."""
    text = f"{way.a} {way.op} {way.b}"
    is_sum = way.op in "+-"
    if is_sum and way.then in "*/" or not way.is_first and (way.then == "/" or is_sum and way.then == "-"):
        text = f"({text})"
    return f"{text} {way.then} {way.other}" if way.is_first else f"{way.other} {way.then} {text}"


def write(steps, answer):
    """The response in d1's format."""
    lines = "".join("%d %s %d = %d\n" % step for step in steps)
    return f"<reasoning>\n{lines}</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>"


def draw(rng):
    """(skeleton, Problem). The skeleton is the numbers alone: in any order, with any target, they are of one split."""
    steps = None
    while not steps or steps[-1][3] > LARGEST:
        numbers = [1 + int(rng.random() * LARGEST) for _ in range(3)]
        a, b, other = shuffled(rng, numbers)
        way = Way(a, pick(rng, "+-*/"), b, pick(rng, "+-*/"), other, rng.random() < 0.5)
        steps = worked(way)
    _, prompt, gold = ask(numbers, steps[-1][3])
    facts = (tuple(numbers), way)
    return str(sorted(numbers)), Problem(prompt, write(steps, spelled(way)), gold, "countdown", steps, facts)


def completing(way, target):
    """Numbers that may take the place of the last one so that the target is reached, in order."""
    first = compute(way.a, way.op, way.b)
    if first is None:
        return []
    found = {target - first, first - target, target + first, target * first, target // first, first // target}
    return sorted(number for number in found if 1 <= number <= LARGEST)


def errors(problem):
    """wrong_operation: other numbers come out. arithmetic_slip: a false equation seems to reach the target.
    wrong_number: one that is not given reaches it. dropped_step: the last number is not used."""
    numbers, right = problem.facts
    target = problem.steps[-1][3]
    for op in "+-*/":
        for place, way in enumerate((right._replace(op=op), right._replace(then=op))):
            if steps := worked(way):
                yield "wrong_operation", place, write(steps, spelled(way))
    for way in ways(numbers):
        for slips in SLIPS:
            steps = worked(way, slips)
            if steps and steps[-1][3] == target:
                yield "arithmetic_slip", int(slips[0] == 0), write(steps, spelled(way))
        for number in completing(way, target):
            wrong = way._replace(other=number)
            steps = worked(wrong)
            if steps and steps[-1][3] == target:
                yield "wrong_number", 1, write(steps, spelled(wrong))
    yield "dropped_step", 1, write(problem.steps[:1], "%d %s %d" % problem.steps[0][:3])
