"""Small arithmetic word problems with worked solutions, and the errors that can be planted in them.

    Question: Ben has 7 pens. Later he buys 5 more. Then he gives away 4 pens. How many pens does Ben have now?
    Answer: 7 + 5 = 12
    12 - 4 = 8
    #### 8

Every number is between 1 and 99. What all families share is also here: Problem, the names, `pick`.
"""

from dataclasses import dataclass
from functools import lru_cache

# --- what all families share ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    prompt: str  # "Question: ...?\nAnswer:"
    solution: str  # " 7 + 5 = 12\n12 - 4 = 8\n#### 8": one step of reasoning a line, the answer last
    answer: str  # "8"
    family: str  # a key of tasks.FAMILIES
    steps: tuple  # one entry a step, of the family's own form: ((7, "+", 5, 12), (12, "-", 4, 8))
    facts: tuple = ()  # what the question says and the steps do not hold, in the family's own form


def write(lines, answer):
    """(["7 + 5 = 12", "12 - 4 = 8"], 8) -> " 7 + 5 = 12\\n12 - 4 = 8\\n#### 8"; the space follows "Answer:"."""
    return " " + "".join(f"{line}\n" for line in lines) + f"#### {answer}"


def pick(rng, options):
    """One of `options`, from one rng.random(): the only draw whose sequence Python promises to keep across versions."""
    return options[int(rng.random() * len(options))]


HE, SHE = ("he", "him"), ("she", "her")
MEN = ("Adam", "Ben", "Carl", "Dan", "Eric", "Fred", "Hugo", "Ivan", "Jack", "Leo", "Max", "Sam", "Tom")
WOMEN = ("Amy", "Bella", "Cora", "Dora", "Emma", "Fay", "Gina", "Iris", "Julia", "Kate", "Lily", "Mia")
# name -> pronouns; no name is a word of a template, so a prompt shows its skeleton
NAMES = {**dict.fromkeys(MEN, HE), **dict.fromkeys(WOMEN, SHE)}


def draw_people(rng, count):
    """`count` different names (not rng.sample: see `pick`)."""
    people = []
    while len(people) < count:
        people.append(pick(rng, [name for name in NAMES if name not in people]))
    return people


# --- the closed vocabulary --------------------------------------------------------------------------------

THINGS = tuple(
    "apples balls beads books bricks buttons cakes cards coins cups dolls eggs flowers hats keys lamps nuts pears pens "
    "plates rings rocks shells stamps toys".split()
)

# Every number in a question is at least 2, so a plural is always right.
OPENINGS = ("{n0} has {a} {things}.", "{n0} starts with {a} {things}.", "{n0} collects {a} {things}.")
PACKS = ("{n0} has {a} boxes with {b} {things} in each box.", "{n0} buys {a} bags of {things} with {b} in each bag.")
BEFORE = ("Later", "Then", "Next")  # by place of the step in the story
CHANGES = {
    "+": ("{he} buys {b} more.", "{he} finds {b} more {things}.", "a friend gives {him} {b} more."),
    "-": ("{he} gives away {b} {things}.", "{he} loses {b} of them.", "{he} sells {b} {things}."),
    "*": ("{he} works until {he} has {b} times as many.", "{he} saves until {he} has {b} times as many."),
    "/": ("{he} makes {b} equal piles and keeps one.", "{he} splits them {b} ways and keeps one part."),
}
CHANGE_QUESTIONS = ("How many {things} does {n0} have now?", "How many {things} does {he} have?")
COMPARISONS = {  # a chain of people: each has more or fewer than the one before
    "+": "{%d} has {b} more {things} than {%d}.",
    "-": "{%d} has {b} fewer {things} than {%d}.",
    "*": "{%d} has {b} times as many {things} as {%d}.",
}

# --- numbers ----------------------------------------------------------------------------------------------

LARGEST = 99
# op -> (range of a story's first number, range of the second operand)
OPERANDS = {
    "+": (range(2, 21), range(2, 21)),
    "-": (range(2, 21), range(2, 21)),
    "*": (range(2, 10), range(2, 10)),
    "/": (range(4, 41), range(2, 10)),
}
LARGEST_MULTIPLICAND = 12  # a running result above it is not multiplied: two-digit products are no aim here
STEP_COUNTS = (1,) * 8 + (2,) * 7 + (3,) * 5  # 40%, 35%, 25%
KINDS = ("wrong_operation", "dropped_step", "arithmetic_slip", "wrong_number_copied")


def compute(a, op, b):
    """a op b if it is a whole number between 1 and 99, else None: (7, "+", 5) -> 12, (7, "/", 2) -> None."""
    if op == "/":
        c = a // b if a % b == 0 else 0
    else:
        c = {"+": a + b, "-": a - b, "*": a * b}[op]
    return c if 1 <= c <= LARGEST else None


@lru_cache(maxsize=None)
def legal_steps(running, op, least):
    """Every step (a, op, b, c) with c >= `least` that a story may take from `running` (None: its first step)."""
    first, second = OPERANDS[op]
    if running is not None:
        first = () if op == "*" and running > LARGEST_MULTIPLICAND else (running,)
    steps = ((a, op, b, compute(a, op, b)) for a in first for b in second)
    return [step for step in steps if step[3] is not None and step[3] >= least]


def draw_steps(rng, count, ops):
    """`count` chained steps: each but the first starts from the result before it."""
    steps, running = [], None
    for place in range(count):
        least = 1 if place == count - 1 else 2  # a running 1 would need a singular and leaves little to do
        options = [legal for op in ops if (legal := legal_steps(running, op, least))]
        steps.append(pick(rng, pick(rng, options)))  # the operation first: + has the most operands
        running = steps[-1][3]
    return tuple(steps)


# --- stories ----------------------------------------------------------------------------------------------


def fill_numbers(template, step):
    return template.replace("{a}", str(step[0])).replace("{b}", str(step[2]))


def change_skeleton(rng, steps):
    """One person's things grow and shrink: "{n0} has 7 {things}. Later {he} buys 5 more. How many ...?"."""
    packed = steps[0][1] == "*" and rng.random() < 0.7
    sentences = [fill_numbers(pick(rng, PACKS if packed else OPENINGS), steps[0])]
    for place, step in enumerate(steps):
        if packed and place == 0:
            continue  # the opening is this step: boxes times things in each
        sentences.append(BEFORE[place] + " " + fill_numbers(pick(rng, CHANGES[step[1]]), step))
    return " ".join(sentences + [pick(rng, CHANGE_QUESTIONS)])


def compare_skeleton(steps):
    """A chain of people: "{n0} has 7 {things}. {n1} has 5 more {things} than {n0}. How many {things} ...?"."""
    sentences = [fill_numbers(OPENINGS[0], steps[0])]
    for place, step in enumerate(steps):
        sentence = COMPARISONS[step[1]].replace("%d", "n%d") % (place + 1, place)
        sentences.append(fill_numbers(sentence, step))
    return " ".join(sentences + ["How many {things} does {n%d} have?" % len(steps)])


def draw(rng):
    """(skeleton, Problem): the skeleton is the story with its numbers, names and things left blank."""
    count = pick(rng, STEP_COUNTS)
    compares = rng.random() < 0.25
    steps = draw_steps(rng, count, "+-*" if compares else "+-*/")
    skeleton = compare_skeleton(steps) if compares else change_skeleton(rng, steps)
    people = draw_people(rng, count + 1 if compares else 1)
    he, him = NAMES[people[0]]
    story = skeleton.format(
        things=pick(rng, THINGS), he=he, him=him, **{f"n{i}": name for i, name in enumerate(people)}
    )
    problem = Problem(
        prompt=f"Question: {story}\nAnswer:",
        solution=write_solution(steps),
        answer=str(steps[-1][3]),
        family="arithmetic",
        steps=steps,
    )
    return skeleton, problem


def write_solution(steps):
    return write(["%d %s %d = %d" % step for step in steps], steps[-1][3])


# --- planted errors ---------------------------------------------------------------------------------------


def misread(number, asked):
    """What `number` may be copied as: another number of the question (`asked`), or a near one."""
    return sorted((asked | {number - 2, number - 1, number + 1, number + 2}) - {number, 0, 1})


def wrong_steps(steps, place, kind):
    """Every wrong version of steps[place] of `kind` (not dropped_step, which leaves no step behind).

    (7, "+", 5, 12)   wrong_operation: (7, "-", 5, 2); arithmetic_slip: (7, "+", 5, 13);
    wrong_number_copied: (7, "+", 4, 11)
    """
    a, op, b, c = steps[place]
    if kind == "wrong_operation":
        candidates = [(a, other, b, compute(a, other, b)) for other in "+-*/" if other != op]
    elif kind == "arithmetic_slip":
        candidates = [(a, op, b, c + slip) for slip in (-10, -2, -1, 1, 2, 10) if 1 <= c + slip <= LARGEST]
    else:
        asked = {steps[0][0]} | {step[2] for step in steps}  # the numbers in the question
        candidates = [(a, op, wrong, compute(a, op, wrong)) for wrong in misread(b, asked)]
        if place == 0:  # later first operands are running results: not copied from the question
            candidates += [(wrong, op, b, compute(wrong, op, b)) for wrong in misread(a, asked)]
    return [step for step in candidates if step[3] is not None]


def follow(running, steps):
    """`steps` worked again from another running result, or None where that leaves the whole numbers from 1 to 99."""
    worked = []
    for _, op, b, _ in steps:
        result = compute(running, op, b)
        if result is None:
            return None
        worked.append((running, op, b, result))
        running = result
    return tuple(worked)


def errors(problem):
    """Yields (kind, place, text): the solution with one error of `kind` at step `place`, worked on from there."""
    steps = problem.steps
    for kind in KINDS:
        for place in range(len(steps)):
            if kind == "dropped_step":
                heads = [(steps[:place], steps[place][0])] if len(steps) > 1 else []
            else:
                heads = [(steps[:place] + (wrong,), wrong[3]) for wrong in wrong_steps(steps, place, kind)]
            for head, running in heads:
                tail = follow(running, steps[place + 1 :])
                if tail is not None:
                    yield kind, place, write_solution(head + tail)
