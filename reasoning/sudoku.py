"""4x4 Sudoku as d1 asks it (Zhao et al., arXiv 2504.12216): a grid is 16 digits in reading order, 0 an empty cell.

    3102200002100320     Row 1, column 2: not 1, 2, 3, so 4.     3142243142131324
                         ...

draw and errors are those of a family (reasoning/tasks.py); grid, in_prose and same read answers (answers.py). The gold
answer is the puzzle itself, "3102 2000 0210 0320, such as 3142 2431 4213 1324", with one of its solutions or without:
every grid that completes the puzzle by the rules is right.
"""

import functools
import re
from itertools import permutations

from reasoning import numerals
from reasoning.arithmetic import Problem, pick
from reasoning.marks import is_marked, said_places
from reasoning.puzzles import shuffled

PROMPT = (  # eval/sudoku.py of d1, word for word
    "\nPlease solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading "
    "left-to-right, top-to-bottom, where '0' represents empty cells.\n\nRules:\n- Fill empty cells with digits 1-4\n"
    "- Each row must contain digits 1-4 exactly once\n- Each column must contain digits 1-4 exactly once\n- Each 2x2 "
    "box must contain digits 1-4 exactly once\n\nImportant: Your solution must be a COMPLETE 16-character string with "
    "only the digits 1-4, representing your final solved grid.\n\nRespond in this exact format:\n<reasoning>\nYour "
    "step-by-step solving process\n</reasoning>\n<answer>\n[16-character solution string with no spaces or separators]"
    "\n</answer>\n"
)


def ask(puzzle, solved):
    """(question, prompt, gold answer) of a puzzle and one of its solutions, 16 digits each."""
    question = f"Solve the following Sudoku puzzle: {puzzle}\n"
    puzzle, solved = (" ".join(re.findall("....", each)) for each in (puzzle, solved))
    return question, f"{PROMPT}\n\n{question}", f"{puzzle}, such as {solved}"


# --- the rules --------------------------------------------------------------------------------------------


@functools.cache
def grids():
    """All 288 solved grids."""
    rows = ["".join(row) for row in permutations("1234")]
    found = []
    for top in [a + b for a in rows for b in rows if not {*a[:2]} & {*b[:2]}]:
        for third in rows:
            left = [set("1234") - set(column) for column in zip(top[:4], top[4:], third)]
            if all(len(each) == 1 for each in left):
                last = "".join(each.pop() for each in left)
                if not {*third[:2]} & {*last[:2]}:
                    found.append(top + third + last)
    return found


def fits(puzzle, solved):
    """Whether a grid keeps the digits that the puzzle gives."""
    return all(given in ("0", digit) for given, digit in zip(puzzle, solved))


@functools.lru_cache(maxsize=4096)
def solutions(puzzle):
    """The grids that complete a puzzle."""
    return [solved for solved in grids() if fits(puzzle, solved)]


def sees(cell):
    """The other cells of a cell's row, column and box."""
    row, column = divmod(cell, 4)
    rows, columns = [4 * row + i for i in range(4)], [column + 4 * i for i in range(4)]
    box = [4 * (row // 2 * 2 + i) + column // 2 * 2 + j for i in range(2) for j in range(2)]
    return {*rows, *columns, *box} - {cell}


SEEN = [sees(cell) for cell in range(16)]
BANDS = [order for order in permutations(range(4)) if {*order[:2]} in ({0, 1}, {2, 3})]  # of rows or of columns
TURNS = [[4 * row + column for row in rows for column in columns] for rows in BANDS for columns in BANDS]
TURNS += [[4 * column + row for row in rows for column in columns] for rows in BANDS for columns in BANDS]


def relabelled(puzzle):
    """Its digits as 1, 2, 3, 4 in the order of their appearance."""
    names = {"0": "0"}
    return "".join(names.setdefault(digit, str(len(names))) for digit in puzzle)


def class_of(puzzle):
    """One text for all puzzles that are the same up to other digits and the 128 symmetries of the grid."""
    return min(relabelled([puzzle[cell] for cell in turn]) for turn in TURNS)


# --- reading ----------------------------------------------------------------------------------------------

GOLD = re.compile(r"([0-4]{4}(?: [0-4]{4}){3})(?:, such as ([1-4]{4}(?: [1-4]{4}){3}))?")
TAGS = re.compile(r"</?(?:answer|reasoning)?>?")
SEPARATORS = r"[\s|,;.:_+\-=\[\](){}'\"`\\&$]"
AT_END = re.compile(rf"(?<![\w-])(?:\d{SEPARATORS}*){{8,}}\Z")  # "The solution is:\n3142243142131324"
SOLVED = re.compile(r"(?<!\d)[1-4](?:\W{0,6}[1-4]){15}(?!\d)")


def grid(text):
    """The digits of a marked place, as many as there are, or those at its end; None if there are none."""
    text = TAGS.sub(" ", text.translate(numerals.CHARACTERS))
    digits = re.sub(SEPARATORS, "", text)
    if re.fullmatch("[0-9]+", digits):
        return digits
    found = AT_END.search(text)
    return found and re.sub(SEPARATORS, "", found[0])


def in_prose(text):
    """What follows the last "the answer is", else the digits at the end, else the last 16 digits without a 0."""
    if is_marked(text):
        return None
    places = [*(said for _, said in said_places(text)), text, *SOLVED.findall(text)[-1:]]
    return next((found for place in places if (found := grid(place))), None)


def named(gold):
    """(puzzle, the solution that a gold answer names or None), 16 digits each; None if it is no gold answer."""
    found = GOLD.fullmatch(gold)
    return found and tuple(each and each.replace(" ", "") for each in found.groups())


def same(answer, right):
    """Whether an answer completes `right`, a gold answer; or is `right`, where that is another answer."""
    if found := named(right):
        return answer in solutions(found[0])
    return answer == right


def cells(answer, right):
    """The share of the puzzle's empty cells where an answer is like the solution that the gold answer names.

    That is what d1 reports: too few digits are filled up with zeros, what exceeds 16 is cut off. Where none is named,
    the solution counts that is most like the answer.
    """
    puzzle, solved = named(right)
    empty = [cell for cell in range(16) if puzzle[cell] == "0"]
    said = answer.ljust(16, "0")
    counts = [sum(said[cell] == each[cell] for cell in empty) for each in ([solved] if solved else solutions(puzzle))]
    return max(counts, default=0) / max(len(empty), 1)


# --- problems ---------------------------------------------------------------------------------------------

EMPTY = (6, 7, 8, 8, 8, 9, 10)  # cells; d1's puzzles have 8


def left(cells, cell):
    """The digits that stand in no cell that `cell` sees, in order."""
    seen = {cells[other] for other in SEEN[cell]}
    return [digit for digit in "1234" if digit not in seen]


def worked(puzzle):
    """((cell, digit), ...): always the first cell that has one digit left; None if at some point no cell has.

    Where it is not None there is one solution; all puzzles of 8 empty cells with one solution are solved so.
    """
    cells, steps = list(puzzle), []
    while "0" in cells:
        single = next((cell for cell in range(16) if cells[cell] == "0" and len(left(cells, cell)) == 1), None)
        if single is None:
            return None
        [cells[single]] = left(cells, single)
        steps.append((single, cells[single]))
    return tuple(steps)


def filled(puzzle, steps):
    """The puzzle's cells with the digits of the steps, as one text."""
    digits = dict(steps)
    return "".join(digits.get(cell, given) for cell, given in enumerate(puzzle))


def explained(puzzle, steps):
    """A line for each step that says which digits its cell sees."""
    lines = []
    for place, (cell, digit) in enumerate(steps):
        possible = {digit, *left(filled(puzzle, steps[:place]), cell)}
        seen = ", ".join(other for other in "1234" if other not in possible)
        why = f"not {seen}, so " if seen else ""
        lines.append(f"Row {cell // 4 + 1}, column {cell % 4 + 1}: {why}{digit}.\n")
    return "".join(lines)


def write(lines, answer):
    """The response in d1's format."""
    return f"<reasoning>\n{lines}</reasoning>\n<answer>\n{answer}\n</answer>"


def solution(puzzle, steps):
    return write(explained(puzzle, steps), filled(puzzle, steps))


def draw(rng):
    """(skeleton, Problem) with one solution. The skeleton is the puzzle's class: no test puzzle is a training puzzle
    with other digits, turned, mirrored or with rows or columns exchanged."""
    steps = None
    while steps is None:
        solved, empty = pick(rng, grids()), shuffled(rng, range(16))[: pick(rng, EMPTY)]
        puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(solved))
        steps = worked(puzzle)
    _, prompt, gold = ask(puzzle, solved)
    return class_of(puzzle), Problem(prompt, solution(puzzle, steps), gold, "sudoku", steps, (puzzle,))


def astray(puzzle, steps, place, wrong):
    """The steps with a `wrong` digit at one place. Later cells take the first digit left, or missing in their row."""
    steps, later = (*steps[:place], (steps[place][0], wrong)), steps[place + 1 :]
    for cell, _ in later:
        so_far = filled(puzzle, steps)
        row = so_far[cell // 4 * 4 :][:4]
        [digit, *_] = left(so_far, cell) or [digit for digit in "1234" if digit not in row]
        steps += ((cell, digit),)
    return steps


def is_forced(puzzle, steps):
    """Whether each step's cell has one digit left."""
    return all(len(left(filled(puzzle, steps[:place]), cell)) == 1 for place, (cell, _) in enumerate(steps))


def errors(problem):
    """overlooked_digit: one that the cell sees is taken. dropped_step: a cell that no later one needs stays empty.
    wrong_conclusion: the answer has a digit too many or too few, or two neighbours exchanged."""
    steps, [puzzle] = problem.steps, problem.facts
    for place, (_, digit) in enumerate(steps):
        for wrong in "1234".replace(digit, ""):
            yield "overlooked_digit", place, solution(puzzle, astray(puzzle, steps, place, wrong))
        without = steps[:place] + steps[place + 1 :]
        if is_forced(puzzle, without):
            yield "dropped_step", place, solution(puzzle, without)
    lines, solved = explained(puzzle, steps), filled(puzzle, steps)
    for i in range(16):
        for wrong in (
            solved[:i] + solved[i + 1 :],
            solved[:i] + solved[i:][:1] + solved[i:],
            solved[:i] + solved[i:][:2][::-1] + solved[i + 2 :],
        ):
            yield "wrong_conclusion", len(steps), write(lines, wrong)
