"""Tests of puzzles.py: each question is solved from its text alone, by brute force, and each planted error is checked.

bash tests/run.sh tests/reasoning/test_puzzles.py
"""

import hashlib
import itertools
import random
import re
from collections import Counter
from itertools import permutations, product

import pytest

from reasoning import arithmetic, puzzles, tasks

FAMILIES = tuple(puzzles.PUZZLES)
# Of 40 train problems and their planted errors: a change of it is a change of everybody's data.
SHA256 = {
    "ordering": "49f516c0a8720250a42fa8db2129634e44617ba85e3d1c425f1829c96e63f5a3",
    "constraints": "50ecc6fd75b00065f96a974d1896d84b358589facd1534c0bc2ae69b39c2ef98",
    "lookup": "4ccc78d1368b5d71ce615d18222e9ec079784d028a2f116c61678a1ee008a183",
    "times": "9abc65464f647a1ceb3553fb9af84622855b997ab292f1a2d3ed0dda073d3385",
    "quantities": "f3fb2eaa759ce80f61226fc0026f5ebe1593af8841d3135bfa91ddf07a0d440e",
    "containment": "b30d1acc258c70e247a6751556962679b997124e6943087585003a1bd1d3d15e",
}


@pytest.fixture(scope="module")
def problems():
    return {family: tasks.generate(400, "train", 1, (family,)) for family in FAMILIES}


# --- solving from the text alone --------------------------------------------------------------------------


def question(prompt):
    """(the statements, what is asked) of "Question: ... ?\\nAnswer:"."""
    assert (
        prompt.startswith("Question: ") and prompt.endswith("?\nAnswer:") and "  " not in prompt and "{" not in prompt
    )
    *told, asked = re.split(r"(?<=[.?]) ", prompt[len("Question: ") : -len("\nAnswer:")])
    return told, asked


def solve_ordering(prompt):
    """(answer, orders that fit): every order of the people, greatest first, is tried."""
    told, asked = question(prompt)
    words = {word: (relation, sign) for relation in puzzles.RELATIONS for word, sign in zip(relation[:2], (1, -1))}
    clues = [re.fullmatch(r"(\w+) is (\w+) than (\w+)\.", sentence).groups() for sentence in told]
    assert len({words[word][0] for _, word, _ in clues}) == 1
    relation = words[clues[0][1]][0]
    pairs = [(a, b) if words[word][1] == 1 else (b, a) for a, word, b in clues]
    people = sorted({person for pair in pairs for person in pair})
    fits = []
    for order in permutations(people):
        if all(order.index(a) < order.index(b) for a, b in pairs):
            fits.append(order)
    second, superlative = re.fullmatch(r"Who is the (second )?(\w+)\?", asked).groups()
    assert superlative in relation[2:] and not (second and superlative == relation[3])
    return {order[1 if second else 0 if superlative == relation[2] else -1] for order in fits}, pairs


def solve_constraints(prompt):
    (opening, *clues), asked = question(prompt)
    people, pets = (
        re.findall(r"\b[A-Za-z]+\b", part.replace(" and ", ", ").replace(" a ", " "))
        for part in re.fullmatch(r"(.*) have (.*), one each\.", opening).groups()
    )
    pets = [pet for pet in pets if pet != "a"]
    fits = []
    for order in permutations(pets):
        has = dict(zip(people, order))
        for clue in clues:
            who, no, what = re.fullmatch(r"(\w+) (has|does not have) (.*)\.", clue).groups()
            if (has[who] in re.findall(r"the (\w+)", what)) != (no == "has"):
                break
        else:
            fits.append(has)
    who, what = re.fullmatch(r"What does (\w+) have\?|Who has the (\w+)\?", asked).groups()
    answers = set()
    for has in fits:
        owners = dict(zip(has.values(), has))
        answers.add(has[who] if who else owners[what])
    return answers, fits


def solve_lookup(prompt):
    told, asked = question(prompt)
    facts = {}
    for sentence in told:
        key, value = filter(
            None,
            re.fullmatch(
                r"(\w+ lives) in (\w+)\.|The (bus to \w+) is (\w+)\.|"
                r"The (\w+ bus) leaves from stop (\d)\.",
                sentence,
            ).groups(),
        )
        facts[key] = value
    assert len(facts) == len(told)
    who = re.search(r"takes (\w+) home", asked)[1]
    colour = facts[f"bus to {facts[f'{who} lives']}"]
    return {colour if "colour" in asked else facts[f"{colour} bus"]}, facts


def minutes(text):
    hours, rest = text.split(":")
    assert 0 <= int(hours) < 24 and len(rest) == 2 and 0 <= int(rest) < 60
    return 60 * int(hours) + int(rest)


def solve_times(prompt):
    [sentence], asked = question(prompt)
    assert asked == "What time is it then?" and re.search(r", .* and | and ", sentence)
    start, legs = re.search(r" at (\d+:\d\d)", sentence)[1], re.findall(r"for (\d+) minutes", sentence)
    end = minutes(start) + sum(map(int, legs))
    return {f"{end // 60}:{end % 60:02d}"}, (start, [int(leg) for leg in legs])


FACTORS = {"dozen eggs": 12, "pairs of shoes": 2, "weeks of": 7, "days for": 24, "for years": 12, "quartets of": 4}


def solve_quantities(prompt):
    (first, change), _ = question(prompt)
    number = int(re.search(r"\d+", first)[0])
    [each] = [factor for words, factor in FACTORS.items() if words in re.sub(r"\d+ ", "", first)]
    other = int(re.search(r"\d+", change)[0])
    sign = -1 if re.search(r"uses|loses|sleeps|stops|leave", change) else 1
    assert sign == -1 or re.search(r"finds|gets|goes on|come", change)
    return {str(number * each + sign * other)}, (number, each, sign, other)


def solve_containment(prompt):
    told, asked = question(prompt)
    inside = {}
    for sentence in told:
        moved = re.fullmatch(r"Then \w+ carries the (\w+) to the (\w+)\.", sentence)
        assert not moved or sentence is told[-1]
        a, b = (moved or re.fullmatch(r"The (\w+) is in the (\w+)\.", sentence)).groups()
        assert moved or a not in inside
        inside[a] = b
    thing = re.fullmatch(r"In which room is the (\w+) now\?", asked)[1]
    while thing in inside:
        thing = inside[thing]
    return {thing}, inside


SOLVE = {family: globals()[f"solve_{family}"] for family in FAMILIES}


def lines_of(text):
    """The lines of a solution and its answer as written."""
    assert text.startswith(" ") and not text.startswith("  ")
    *lines, last = text[1:].split("\n")
    assert lines and last.startswith("#### ")
    return lines, last[5:]


@pytest.mark.parametrize("family", FAMILIES)
def test_question_has_one_answer_and_it_is_the_solutions(problems, family):
    for problem in problems[family]:
        found, _ = SOLVE[family](problem.prompt)
        assert found == {problem.answer} == {lines_of(problem.solution)[1]} and problem.family == family
        assert tasks.verify(problem, problem.solution) and not tasks.verify(problem, problem.solution + "x1")
        assert len(problem.prompt) < 500 and len(problem.solution) < 260


@pytest.mark.parametrize("family", FAMILIES)
def test_every_line_of_the_solution_is_true(problems, family):
    for problem in problems[family]:
        (lines, answer), (_, known) = lines_of(problem.solution), SOLVE[family](problem.prompt)
        if family == "ordering":
            assert [tuple(line.split(" > ")) for line in lines[:-1]] == known
            order = lines[-1].split(" > ")
            assert all(order.index(a) < order.index(b) for a, b in known) and len(order) == len(known) + 1
        elif family == "constraints":
            [has] = known
            for line in lines:
                person, told = line.split(": ")
                assert has[person] == told.split()[-1] and has[person] not in re.findall(r"not (\w+)", told)
                assert "so" not in told or len(set(re.findall(r"not (\w+)", told))) == len(has) - 1  # it follows
            assert len(lines) == len(has)
        elif family == "lookup":
            links = [line.split(" -> ") for line in lines]
            assert all(later[0] == earlier[1] for earlier, later in zip(links, links[1:])) and links[-1][1] == answer
            for a, b in links:
                assert b in {value for key, value in known.items() if a in key.split()}
        elif family == "times":
            assert all(
                minutes(a) + int(b) == minutes(c)
                for a, b, c in (re.fullmatch(r"(\S+) \+ (\d+) = (\S+)", line).groups() for line in lines)
            )
        elif family == "quantities":
            number, each, sign, other = known
            assert lines == [
                f"{number} * {each} = {number * each}",
                f"{number * each} {'+' if sign > 0 else '-'} {other} = {answer}",
            ]
        else:
            links = [tuple(line.split(" in ")) for line in lines]
            assert all(known[a] == b for a, b in links) and links[-1][1] == answer


def test_questions_are_varied(problems):
    """Each kind of question, of clue and of change comes up."""
    text = {}
    for family in FAMILIES:
        text[family] = " ".join(problem.prompt for problem in problems[family])
    for word in [*itertools.chain.from_iterable(puzzles.RELATIONS), "second"]:
        assert word in text["ordering"], word
    assert all(words in text["constraints"] for words in ("Who has", "What does", "does not have", " has the "))
    assert "Which colour" in text["lookup"] and "From which stop" in text["lookup"]
    assert {len(problem.steps) for problem in problems["times"]} == {1, 2, 3}
    assert all(
        change.split("{b}")[1].strip() in text["quantities"] for pair in puzzles.AFTER.values() for _, change in pair
    )
    assert 0.3 < sum("carries" in problem.prompt for problem in problems["containment"]) / 400 < 0.9
    chain = sum(
        solve_ordering(problem.prompt)[1] == list(zip(problem.facts[0], problem.facts[0][1:]))
        for problem in problems["ordering"]
    )
    assert 40 < chain < 200  # clues told in the order of the solution
    last = sum(
        problem.facts[1] in (line[0].strip(":"), line[-1])
        for problem in problems["constraints"]
        for line in [problem.solution.split("\n")[-2].split()]
    )
    assert 80 < last < 200  # asked about whom nothing is told
    assert sum("ignored_clue" in tasks.corruptions(problem) for problem in problems["constraints"]) > 360
    starts = Counter(problem.answer == problem.facts[0][0] for problem in problems["ordering"])
    assert min(starts.values()) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_position_in_the_text_does_not_tell_the_answer(problems, family):
    """Where the answer's word stands among the names of the question is not always the same."""
    places = Counter(
        problem.prompt.index(problem.answer) if problem.answer in problem.prompt else -1 for problem in problems[family]
    )
    assert max(places.values()) < 200 or family in ("times", "quantities")  # there the answer is not in the question


# --- planted errors ---------------------------------------------------------------------------------------

KINDS = {
    "ordering": {"reversed_relation", "ignored_clue", "wrong_conclusion"},
    "constraints": {"ignored_clue", "wrong_conclusion"},
    "lookup": {"wrong_row", "wrong_start", "dropped_step"},
    "times": {"forgotten_carry", "wrong_operation", "arithmetic_slip", "dropped_step"},
    "quantities": {"wrong_unit", "wrong_operation", "arithmetic_slip", "dropped_step"},
    "containment": {"ignored_clue", "wrong_row", "dropped_step"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_errors(problems, family):
    """Each has its family's form, is wrong in one place of the kind that it is called, and ends in a wrong answer."""
    seen = Counter()
    for problem in problems[family][:150]:
        right, answer = lines_of(problem.solution)
        possible = tasks.corruptions(problem)
        assert possible and set(possible) <= KINDS[family]
        for kind, by_place in possible.items():
            for place, texts in by_place.items():
                for text in texts:
                    seen[kind] += 1
                    wrong, said = lines_of(text)
                    assert not tasks.verify(problem, text) and text != problem.solution
                    assert wrong[:place] == right[:place]  # nothing is wrong before it
                    if kind == "wrong_conclusion":
                        assert wrong == right and said != answer
                    else:
                        CHECK[family](problem, right, wrong, said, kind, place)
    assert set(seen) == KINDS[family]


def check_ordering(problem, right, wrong, said, kind, place):
    _, pairs = solve_ordering(problem.prompt)
    read = [tuple(line.split(" > ")) for line in wrong[:-1]]
    order = wrong[-1].split(" > ")
    if kind == "ignored_clue":
        assert read == pairs[:place] + pairs[place + 1 :]
    else:
        assert read == pairs[:place] + [pairs[place][::-1]] + pairs[place + 1 :]
    assert all(order.index(a) < order.index(b) for a, b in read) and sorted(order) == sorted(right[-1].split(" > "))
    right_place = right[-1].split(" > ").index(problem.answer)
    assert said == order[right_place]


def check_constraints(problem, right, wrong, said, kind, place):
    has = dict(line.split(": ") for line in wrong)
    has = {person: told.split()[-1] for person, told in has.items()}
    assert len(set(has.values())) == len(has) == len(right)  # one pet each, still
    [true] = solve_constraints(problem.prompt)[1]
    people = list(has)
    assert has[people[place]] != true[people[place]]
    taken = [has[person] for person in people[: place + 1]]
    for person in people[place + 1 :]:  # from there on, every line follows or is the only one left
        excluded = re.findall(rf"{person} does not have (.*?)\.", problem.prompt)
        excluded = re.findall(r"the (\w+)", excluded[0]) if excluded else []
        told = f"{person} has the {has[person]}." in problem.prompt
        assert has[person] not in taken and (told or set(true.values()) - set(taken) - set(excluded) == {has[person]})
        taken.append(has[person])


def check_lookup(problem, right, wrong, said, kind, place):
    _, facts = solve_lookup(problem.prompt)
    links = [tuple(line.split(" -> ")) for line in wrong]
    true = []
    for a, b in links:
        true.append(any(a in key.split() and value == b for key, value in facts.items()))
    assert said == links[-1][1]
    if kind == "wrong_row":
        assert (
            true.count(False) == 1
            and not true[place]
            and links[0][0] == right[0].split()[0]
            and len(links) == len(right)
        )
        assert links[place][1] in facts.values()
    else:
        assert all(true)
        assert links[0][0] != right[0].split()[0] if kind == "wrong_start" else wrong == right[:-1]


def check_times(problem, right, wrong, said, kind, place):
    _, (start, legs) = solve_times(problem.prompt)
    sums = [re.fullmatch(r"(\S+) ([+-]) (\d+) = (\S+)", line).groups() for line in wrong]
    assert (
        sums[0][0] == start
        and all(later[0] == earlier[3] for earlier, later in zip(sums, sums[1:]))
        and sums[-1][3] == said
    )
    used = [int(b) for _, _, b, _ in sums]
    off = [minutes(c) - minutes(a) - (int(b) if op == "+" else -int(b)) for a, op, b, c in sums]
    if kind == "dropped_step":
        assert used == legs[:place] + legs[place + 1 :] and not any(off)
        return
    assert used == legs and [i for i, each in enumerate(off) if each] == ([place] if kind != "wrong_operation" else [])
    assert [i for i, each in enumerate(sums) if each[1] == "-"] == ([place] if kind == "wrong_operation" else [])
    assert kind != "forgotten_carry" or minutes(sums[place][0]) % 60 + legs[place] >= 60
    assert kind == "wrong_operation" or (off[place] == -60) == (kind == "forgotten_carry")


def check_quantities(problem, right, wrong, said, kind, place):
    number, each, sign, other = solve_quantities(problem.prompt)[1]
    sums = [re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups() for line in wrong]
    assert sums[0][0] == str(number) and sums[-1][3] == said and all(b[0] == a[3] for a, b in zip(sums, sums[1:]))
    slips = [int(c) - {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] for a, op, b, c in sums]
    told = [("*", str(each)), ("+" if sign > 0 else "-", str(other))]
    read = [(op, b) for _, op, b, _ in sums]
    if kind == "dropped_step":
        assert read == told[:place] + told[place + 1 :] and not any(slips)
    elif kind == "arithmetic_slip":
        assert read == told and [i for i, slip in enumerate(slips) if slip] == [place]
    else:
        at = 0 if kind == "wrong_operation" else 1
        assert not any(slips) and [i for i in (0, 1) if read[i] != told[i]] == [place]
        assert read[place][at] != told[place][at] and read[place][1 - at] == told[place][1 - at]


def check_containment(problem, right, wrong, said, kind, place):
    told, _ = question(problem.prompt)
    inside = solve_containment(problem.prompt)[1]
    links = [tuple(line.split(" in ")) for line in wrong]
    true = [inside[a] == b for a, b in links]
    assert said == links[-1][1] and links[0][0] == right[0].split()[0]
    if kind == "wrong_row":
        assert true.count(False) == 1 and not true[place]
    elif kind == "dropped_step":
        assert all(true) and wrong == right[:-1]
    else:
        assert "carries" in told[-1]
        assert all(f"The {a} is in the {b}." in told for a, b in links) and not all(true)


CHECK = {family: globals()[f"check_{family}"] for family in FAMILIES}


# --- splits and streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_skeleton(family):
    """A test question is no training question with other names, pets, towns, rooms or people."""
    closed = {
        *arithmetic.NAMES,
        *puzzles.THINGS,
        *puzzles.TOWNS,
        *puzzles.COLOURS,
        *puzzles.SMALL,
        *puzzles.HOLDERS,
        *puzzles.ROOMS,
    }

    def blank(prompt):
        order = {}
        prompt = re.sub(
            r"\b(?:he|she)\b",
            "@he",
            re.sub(r"stop \d", lambda m: f"stop {order.setdefault(m[0], f'@{len(order)}')}", prompt),
        )
        return re.sub(r"\w+", lambda m: order.setdefault(m[0], f"@{len(order)}") if m[0] in closed else m[0], prompt)

    keys = {
        split: Counter(
            blank(problem.prompt) for seed in (0, 5) for problem in tasks.generate(800, split, seed, (family,))
        )
        for split in ("train", "test")
    }
    assert not set(keys["train"]) & set(keys["test"])
    assert family == "times" or max(keys["test"].values()) > 1  # the keys do repeat: they compare something


def test_families_mix_and_repeat():
    mixed = tasks.generate(700, "train", 3, tuple(tasks.EMBEDDED))
    counts = Counter(problem.family for problem in mixed)
    assert set(counts) == set(tasks.EMBEDDED) and min(counts.values()) > 60
    assert mixed[:50] == tasks.generate(50, "train", 3, tuple(tasks.EMBEDDED))
    assert len({problem.prompt for problem in mixed}) == 700


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_data(family):
    rows = list(tasks.preference_rows(40, "train", 0, (family,)))
    text = "\n".join(row["prompt"] + row["chosen"] + row["rejected"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[family]
    assert {row["meta"]["error"] for row in rows} == KINDS[family]


def test_shuffled_is_fair():
    rng = random.Random(0)
    counts = Counter(tuple(puzzles.shuffled(rng, "abc")) for _ in range(6000))
    assert set(counts) == set(permutations("abc")) and all(abs(count - 1000) < 130 for count in counts.values())


def test_clock():
    assert [puzzles.clock(60 * h + m) for h, m in product((0, 9, 23), (0, 5, 59))] == [
        "0:00",
        "0:05",
        "0:59",
        "9:00",
        "9:05",
        "9:59",
        "23:00",
        "23:05",
        "23:59",
    ]
    assert puzzles.clock(-1) is puzzles.clock(24 * 60) is None
