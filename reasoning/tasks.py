"""Generated tasks: small problems with worked solutions, their verifier, and solutions with one planted error.

    tasks.generate(200, "test", seed=0)                          200 arithmetic problems, the same on every machine
    tasks.generate(200, "test", 0, ("ordering", "times"))        of other families: the keys of FAMILIES
    tasks.verify(problem, " 7 + 5 = 12\\n12 - 4 = 8\\n#### 8")     whether a response ends in the right answer
    tasks.corrupt(problem, rng)                                  (a wrong solution, the name of its error)

The language of EMBEDDED is small on purpose (a closed vocabulary): a model of a million parameters must learn it from
scratch on a CPU. Arithmetic is in arithmetic.py; logic, look-ups and common sense in puzzles.py. The other families,
countdown.py and sudoku.py, are asked in d1's words, for models that follow instructions.
"""

import hashlib
import math
import random

from files import InputError
from reasoning import answers, arithmetic, countdown, sudoku
from reasoning.arithmetic import Problem, pick
from reasoning.puzzles import PUZZLES

# family -> (draw, errors); draw(rng) -> (skeleton, Problem), errors(problem) yields (kind, place, text)
EMBEDDED = {"arithmetic": (arithmetic.draw, arithmetic.errors), **PUZZLES}  # what examples/tiny knows; --task all
FAMILIES = EMBEDDED | {"countdown": (countdown.draw, countdown.errors), "sudoku": (sudoku.draw, sudoku.errors)}
ALL = f"all but {' and '.join(name for name in FAMILIES if name not in EMBEDDED)}, which examples/tiny never saw"


def split_of(skeleton):
    """ "test" for one skeleton in ten, by its hash, else "train".

    So whatever the seeds, a test story with its numbers is never trained on, not even with another name or thing.
    """
    digest = hashlib.sha256(skeleton.encode()).hexdigest()
    return "test" if int(digest, 16) % 10 == 0 else "train"


def generate(n, split, seed=0, families=("arithmetic",)):
    """`n` problems of `split` with different prompts, the same ones for the same seed and families on every machine."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    rng = random.Random(seed)
    problems, in_vain = {}, 0  # {prompt: Problem}; draws since the last new one
    while len(problems) < n:
        draw, _ = FAMILIES[pick(rng, families)]
        skeleton, problem = draw(rng)
        in_vain += 1
        if split_of(skeleton) == split and problem.prompt not in problems:
            problems[problem.prompt], in_vain = problem, 0
        if in_vain > 50_000:
            raise InputError(
                f"{n} problems of {', '.join(families)} are asked for; its {split} split has about {len(problems)}"
            )
    return list(problems.values())


# --- verifier ---------------------------------------------------------------------------------------------


def verify(problem_or_answer, response):
    """Whether `response` gives the right answer; None if it has none that can be read (reasoning/answers.py).

    Takes a Problem or its answer: verify("8", "4 + 4 = 8\\n#### 8").
    """
    answer = problem_or_answer.answer if isinstance(problem_or_answer, Problem) else problem_or_answer
    right = answers.gold(answer)
    if right is None:
        raise ValueError(f"the answer to verify against is {answer!r}; expected a number or a few words, such as '8'")
    return answers.grade(*right, response)["correct"]


def wilson(rate, n, z=1.96):
    """The 95% interval [low, high] of a proportion (Wilson, 1927)."""
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))]


# --- planted errors ---------------------------------------------------------------------------------------


def corruptions(problem):
    """{kind: {place: [text]}}: every solution with one error that leads to a wrong answer."""
    return leading_astray(FAMILIES[problem.family][1](problem), problem.answer)


def leading_astray(errors, answer):
    """{kind: {place: [text]}} of those `errors`, (kind, place, text), whose final answer is not `answer`."""
    possible = {}
    for kind, place, text in errors:
        if not verify(answer, text):
            possible.setdefault(kind, {}).setdefault(place, []).append(text)
    return possible


def choose(possible, rng):
    """(text, kind) from what `corruptions` returns: the kinds are equally likely, then the places, then the texts."""
    kind = pick(rng, list(possible))
    return pick(rng, pick(rng, list(possible[kind].values()))), kind


def corrupt(problem, rng):
    """(text, kind): the solution with one error at one place, everything after it worked consistently from it.

    " 7 + 5 = 12\\n12 - 4 = 8\\n#### 8" -> (" 7 + 5 = 13\\n13 - 4 = 9\\n#### 9", "arithmetic_slip")
    The answer is always wrong; the kinds that this problem allows are equally likely.
    """
    return choose(corruptions(problem), rng)


def preference_rows(n, split, seed, families=("arithmetic",)):
    """Yields `n` rows {"prompt", "chosen", "rejected", "meta": {"family", "steps", "error", "answer"}}."""
    rng = random.Random(f"corrupt {seed}")  # of its own: the problems are those of generate(n, split, seed, families)
    for problem in generate(n, split, seed, families):
        rejected, kind = corrupt(problem, rng)
        yield {
            "prompt": problem.prompt,
            "chosen": problem.solution,
            "rejected": rejected,
            "meta": {"family": problem.family, "steps": len(problem.steps), "error": kind, "answer": problem.answer},
        }


def solved_line(correct):
    """[True, False, None, ...] -> "solved 93 of 200 (46.5%, 95% interval 39.7-53.4), 3 without a readable answer"."""
    k, n = correct.count(True), len(correct)
    low, high = (100 * abs(end) for end in wilson(k / n, n))
    unread = f", {correct.count(None)} without a readable answer" if None in correct else ""
    return f"solved {k} of {n} ({100 * k / n:.1f}%, 95% interval {low:.1f}-{high:.1f}){unread}"
