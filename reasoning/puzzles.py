"""Problems of other kinds of reasoning than arithmetic, with worked solutions and errors that can be planted in them.

    ordering      logic         clues about neighbours, to one order            Ben > Amy / Amy > Leo / Ben > Amy > Leo
    constraints   logic         who has what, by elimination                    Amy: not cat, not dog, so fish
    lookup        multi-step    a chain of look-ups in a table of facts         Amy -> Arden / Arden -> red / red -> 4
    times         common sense  clock times: 60 minutes make an hour            9:40 + 35 = 10:15
    quantities    common sense  dozens, pairs, weeks: how many that is          3 * 12 = 36 / 36 - 4 = 32
    containment   common sense  what is in a box is where the box is            ring in box / box in cellar

Each has draw(rng) -> (skeleton, Problem) and errors(problem), which yields (kind, place, text) as arithmetic.errors
does: a solution with one error of that kind at that step, worked on consistently from there. Some still end in the
right answer; tasks.corrupt leaves those out. A skeleton is the question with its names and things left blank.
"""

from itertools import permutations
from string import Formatter

from reasoning.arithmetic import NAMES, Problem, draw_people, pick, write

ORDINALS = ("the ", "the second ")


def shuffled(rng, options):
    """In a new order (not rng.shuffle: see arithmetic.pick)."""
    left, order = list(options), []
    while left:
        order.append(left.pop(int(rng.random() * len(left))))
    return order


def story(sentences, question, **names):
    """(skeleton, prompt): the sentences and the question, blanks such as {n0} filled with names.

    The skeleton numbers its blanks in their order, so that it does not show who is who in the solution.
    """
    text = " ".join([*sentences, question])
    order = {}
    for _, name, _, _ in Formatter().parse(text):
        if name:
            order.setdefault(name, f"{{{name.rstrip('0123456789')}{len(order)}}}")
    return text.format(**order), f"Question: {text.format(**names)}\nAnswer:"


def blanks(**lists):
    """n=["Amy", "Ben"] -> {"n0": "Amy", "n1": "Ben"}"""
    return {f"{name}{i}": value for name, values in lists.items() for i, value in enumerate(values)}


# --- ordering ---------------------------------------------------------------------------------------------

RELATIONS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("heavier", "lighter", "heaviest", "lightest"),
    ("faster", "slower", "fastest", "slowest"),
)


def draw_ordering(rng):
    """3 to 5 people, one clue for each two neighbours; asked is the first, the second or the last."""
    count = pick(rng, (3, 3, 4, 4, 5))
    more, less, most, least = pick(rng, RELATIONS)
    told = shuffled(rng, range(count - 1))  # clue i: person i comes before person i + 1
    sentences = [
        f"{{n{i}}} is {more} than {{n{i + 1}}}." if rng.random() < 0.5 else f"{{n{i + 1}}} is {less} than {{n{i}}}."
        for i in told
    ]
    place = pick(rng, (0, 1, count - 1))
    asked = f"the {least}" if place == count - 1 else ORDINALS[place] + most
    people = tuple(draw_people(rng, count))
    skeleton, prompt = story(sentences, f"Who is {asked}?", **blanks(n=people))
    steps = tuple((people[i], people[i + 1]) for i in told)
    solution = write_order(steps, people, place)
    return skeleton, Problem(prompt, solution, people[place], "ordering", steps, (people, place))


def write_order(clues, order, place, answer=None):
    return write([*(f"{a} > {b}" for a, b in clues), " > ".join(order)], answer or order[place])


def ordering_errors(problem):
    """reversed_relation, ignored_clue: any order that fits the clues as they were read; wrong_conclusion."""
    clues, (people, place) = problem.steps, problem.facts
    for kind in ("reversed_relation", "ignored_clue"):
        for i, (a, b) in enumerate(clues):
            read = clues[:i] + (((b, a),) if kind == "reversed_relation" else ()) + clues[i + 1 :]
            for order in permutations(people):
                if all(order.index(x) < order.index(y) for x, y in read):
                    yield kind, i, write_order(read, order, place)
    for wrong in people:
        yield "wrong_conclusion", len(clues), write_order(clues, people, place, wrong)


# --- constraints ------------------------------------------------------------------------------------------

THINGS = ("cat", "dog", "fish", "bird", "horse", "rabbit", "snake", "mouse")


def draw_constraints(rng):
    """3 or 4 people with one pet each: a clue for each but the last tells what the ones before leave to that person."""
    count = pick(rng, (3, 3, 4))
    told = [rng.random() < 0.25 for _ in range(count - 1)]  # outright, or what it is not
    has, pets, clues = [], list(range(count)), []  # person i has pet i
    for i in range(count - 1):
        others = shuffled(rng, pets[i + 1 :])
        has.append(() if told[i] else tuple(others))
        excluded = " or ".join(f"the {{p{other}}}" for other in others)
        clues.append(f"{{n{i}}} has the {{p{i}}}." if told[i] else f"{{n{i}}} does not have {excluded}.")
    opening = f"{listed('{n%d}', shuffled(rng, pets))} have {listed('a {p%d}', shuffled(rng, pets))}, one each."
    asked = int(rng.random() * count)
    by_name = rng.random() < 0.5
    question = f"What does {{n{asked}}} have?" if by_name else f"Who has the {{p{asked}}}?"
    people, things = draw_people(rng, count), shuffled(rng, THINGS)[:count]
    skeleton, prompt = story([opening, *shuffled(rng, clues)], question, **blanks(n=people, p=things))
    # a step: person, what a clue excludes, and the pet if a clue says it
    steps = []
    for i, person in enumerate(people):
        last = i == count - 1  # no clue is about this one
        excludes = () if last else tuple(things[pet] for pet in has[i])
        steps.append((person, excludes, things[i] if not last and told[i] else None))
    steps = tuple(steps)
    facts = (tuple(things), people[asked] if by_name else things[asked])
    given = things[asked] if by_name else people[asked]
    return skeleton, Problem(prompt, write_table(steps, tuple(things), facts[1]), given, "constraints", steps, facts)


def listed(blank, numbers):
    """'a {p%d}', [2, 0, 1] -> 'a {p2}, a {p0} and a {p1}'"""
    *others, last = (blank % number for number in numbers)
    return f"{', '.join(others)} and {last}"


def write_table(steps, pets, asked, answer=None):
    """`pets`: what the people of the steps have. A line excludes the pets before it and those of the person's clue."""
    lines = []
    for i, ((person, excluded, said), pet) in enumerate(zip(steps, pets)):
        out = [other for other in (*pets[:i], *excluded) if other != pet]
        why = "".join(f"not {other}, " for other in dict.fromkeys(out))
        lines.append(f"{person}: {pet}" if said == pet else f"{person}: {why}so {pet}")
    owner = {pet: step[0] for step, pet in zip(steps, pets)}
    found = owner.get(asked) or {person: pet for pet, person in owner.items()}[asked]
    return write(lines, answer or found)


def constraints_errors(problem):
    """ignored_clue: the person gets what the clue excludes, the others what is then left; wrong_conclusion."""
    steps, (pets, asked) = problem.steps, problem.facts
    for place in range(len(steps) - 1):
        for wrong in pets[place + 1 :]:
            found = (*pets[:place], wrong)
            for _, excluded, said in steps[place + 1 :]:
                left = [pet for pet in pets if pet not in found and pet not in excluded and said in (None, pet)]
                found += (left[0],) if len(left) == 1 else ()
            if len(found) == len(pets):
                misread = (steps[place][0], tuple(pet for pet in steps[place][1] if pet != wrong), None)
                yield "ignored_clue", place, write_table((*steps[:place], misread, *steps[place + 1 :]), found, asked)
    for wrong in pets if asked not in pets else [person for person, _, _ in steps]:
        yield "wrong_conclusion", len(steps), write_table(steps, pets, asked, wrong)


# --- look-ups ---------------------------------------------------------------------------------------------

TOWNS = ("Arden", "Brook", "Colby", "Derby", "Elton", "Farley", "Grange", "Hadley", "Ilford", "Kirby")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
HOPS = ("{n%d} lives in {t%d}.", "The bus to {t%d} is {c%d}.", "The {c%d} bus leaves from stop {s%d}.")
LOOKUP_QUESTIONS = {
    2: "Which colour is the bus that takes {n0} home?",
    3: "From which stop does the bus leave that takes {n0} home?",
}


def draw_lookup(rng):
    """A table of 2 to 4 people, their towns, the towns' buses and their stops, told in any order."""
    hops, count = pick(rng, (2, 3)), pick(rng, (2, 3, 4))
    sentences = shuffled(rng, [hop % (row, row) for hop in HOPS[:hops] for row in range(count)])
    columns = {
        "n": draw_people(rng, count),
        "t": shuffled(rng, TOWNS)[:count],
        "c": shuffled(rng, COLOURS)[:count],
        "s": [str(stop) for stop in shuffled(rng, range(1, 10))[:count]],
    }
    skeleton, prompt = story(sentences, LOOKUP_QUESTIONS[hops], **blanks(**columns))
    rows = tuple(zip(*(columns[name] for name in "ntcs"[: hops + 1])))
    steps = tuple(zip(rows[0], rows[0][1:]))
    return skeleton, Problem(prompt, write_links(steps), steps[-1][1], "lookup", steps, rows)


def write_links(links, word="->"):
    return write([f"{a} {word} {b}" for a, b in links], links[-1][1])


def lookup_errors(problem):
    """wrong_row: a look-up reads the next line of the table; wrong_start: somebody else; dropped_step: one too few."""
    links, rows = problem.steps, problem.facts
    for place in range(len(links)):
        for row in rows[1:]:
            there = ((links[place][0], row[place + 1]), *zip(row[place + 1 :], row[place + 2 :]))
            yield "wrong_row", place, write_links((*links[:place], *there))
    for row in rows[1:]:
        yield "wrong_start", 0, write_links(tuple(zip(row, row[1:])))
    yield "dropped_step", len(links) - 1, write_links(links[:-1])


# --- times ------------------------------------------------------------------------------------------------

OUTINGS = ("{n0} leaves at {a}", "{n0} starts at {a}", "{n0} gets up at {a}")
LEGS = tuple(f"{verb} for {{b}} minutes" for verb in ("walks", "waits", "reads", "works", "rests", "drives"))


def clock(minutes):
    """575 -> "9:35"; None outside one day."""
    return f"{minutes // 60}:{minutes % 60:02d}" if 0 <= minutes < 24 * 60 else None


def draw_times(rng):
    """A start and one to three durations: what is the time at the end?"""
    count, now = pick(rng, (1, 1, 2, 2, 3)), 60 * (6 + int(rng.random() * 14)) + 5 * int(rng.random() * 12)
    legs, said = shuffled(rng, LEGS)[:count], pick(rng, OUTINGS).replace("{a}", clock(now))
    steps = []
    for _ in legs:
        steps.append((now, 5 * (1 + int(rng.random() * 11))))
        now = sum(steps[-1])
    *first, last = (leg.replace("{b}", str(minutes)) for leg, (_, minutes) in zip(legs, steps))
    [name] = draw_people(rng, 1)
    skeleton, prompt = story([f"{', '.join([said, *first])} and {last}."], "What time is it then?", n0=name)
    text = write_times(steps[0][0], [minutes for _, minutes in steps])
    return skeleton, Problem(prompt, text, clock(now), "times", tuple(steps))


def write_times(now, legs, place=None, op="+", shift=0):
    """Leg `place` done with another `op` or a result `shift` minutes off, the later ones worked from there."""
    lines = []
    for i, minutes in enumerate(legs):
        sign = op if i == place else "+"
        after = now + (minutes if sign == "+" else -minutes) + (shift if i == place else 0)
        if clock(after) is None:
            return None
        lines.append(f"{clock(now)} {sign} {minutes} = {clock(after)}")
        now = after
    return write(lines, clock(now))


def times_errors(problem):
    """forgotten_carry: past the hour the minutes start again, the hour stays; wrong_operation; slip; dropped_step."""
    start, legs = problem.steps[0][0], [minutes for _, minutes in problem.steps]
    for place, (now, minutes) in enumerate(problem.steps):
        wrong = [("wrong_operation", "-", 0), *(("arithmetic_slip", "+", shift) for shift in (-10, -5, 5, 10))]
        if now % 60 + minutes >= 60:
            wrong.append(("forgotten_carry", "+", -60))
        for kind, op, shift in wrong:
            if text := write_times(start, legs, place, op, shift):
                yield kind, place, text
        if len(legs) > 1:
            yield "dropped_step", place, write_times(start, legs[:place] + legs[place + 1 :])


# --- quantities -------------------------------------------------------------------------------------------

UNITS = (  # sentence, how many in one, what it may be taken for, question
    ("{n0} buys {a} dozen eggs.", 12, (10, 6), "eggs"),
    ("{n0} has {a} pairs of shoes.", 2, (1, 4), "shoes"),
    ("{n0} has {a} weeks of holiday.", 7, (5, 10), "days"),
    ("{n0} has {a} days for the trip.", 24, (12, 20), "hours"),
    ("{n0} saves for {a} years.", 12, (10, 4), "months"),
    ("{n0} has {a} quartets of players.", 4, (3, 5), "players"),
)
AFTER = {
    "eggs": (("-", "{he} uses {b} eggs."), ("+", "{he} finds {b} eggs.")),
    "shoes": (("-", "{he} loses {b} shoes."), ("+", "{he} finds {b} shoes.")),
    "days": (("-", "{he} uses {b} days."), ("+", "{he} gets {b} more days.")),
    "hours": (("-", "{he} sleeps {b} hours."), ("+", "{he} gets {b} more hours.")),
    "months": (("-", "{he} stops {b} months early."), ("+", "{he} goes on for {b} more months.")),
    "players": (("-", "{b} players leave."), ("+", "{b} more players come.")),
}
ASKED = {
    "eggs": "How many eggs are there now?",
    "shoes": "How many shoes does {he} have then?",
    "days": "How many days are left?",
    "hours": "How many hours are left?",
    "months": "For how many months does {he} save?",
    "players": "How many players are there now?",
}


def draw_quantities(rng):
    """So many of a unit, then some more or fewer: 3 dozen less 4."""
    sentence, each, taken_for, what = pick(rng, UNITS)
    op, change = pick(rng, AFTER[what])
    number = 2 + int(rng.random() * min(8, 98 // each - 1))
    total = number * each
    other = 2 + int(rng.random() * (min(total - 3, 9) if op == "-" else 9))
    steps = ((number, "*", each), (total, op, other))
    [name] = draw_people(rng, 1)
    told = [sentence.replace("{a}", str(number)), "Then " + change.replace("{b}", str(other))]
    skeleton, prompt = story(told, ASKED[what], n0=name, he=NAMES[name][0])
    answer = str(total + other if op == "+" else total - other)
    return skeleton, Problem(prompt, write_sums(steps), answer, "quantities", steps, taken_for)


def write_sums(steps, slips=(0, 0)):
    """Each step after the first starts from the result before it; None where a result is below 1."""
    lines, now = [], steps[0][0]
    for (_, op, b), slip in zip(steps, slips):
        after = {"+": now + b, "-": now - b, "*": now * b}[op] + slip
        if after < 1:
            return None
        lines.append(f"{now} {op} {b} = {after}")
        now = after
    return write(lines, now)


def quantities_errors(problem):
    """wrong_unit: a dozen taken for ten; wrong_operation; arithmetic_slip; dropped_step."""
    (number, _, each), (total, op, other) = steps = problem.steps
    found = [("wrong_unit", 0, write_sums(((number, "*", wrong), steps[1]))) for wrong in problem.facts]
    other_op = "-" if op == "+" else "+"
    found.append(("wrong_operation", 0, write_sums(((number, "+", each), steps[1]))))
    found.append(("wrong_operation", 1, write_sums((steps[0], (total, other_op, other)))))
    slips = (-10, -2, -1, 1, 2, 10)
    found += [("arithmetic_slip", 0, write_sums(steps, (slip, 0))) for slip in slips]
    found += [("arithmetic_slip", 1, write_sums(steps, (0, slip))) for slip in slips]
    found += [("dropped_step", 0, write_sums(((number, op, other),))), ("dropped_step", 1, write_sums(steps[:1]))]
    yield from (each for each in found if each[2])


# --- containment ------------------------------------------------------------------------------------------

SMALL = ("ring", "key", "coin", "letter", "watch", "stamp", "pearl", "ticket")
HOLDERS = ("box", "bag", "basket", "chest", "drawer", "jar", "case", "sack")
ROOMS = ("kitchen", "cellar", "garage", "attic", "garden", "office", "hall", "library")


def filled(chain, names):
    """The chain's blanks, with their names."""
    return tuple(blank.format(**names) for blank in chain)


def draw_containment(rng):
    """Two things in one to three holders each, in two rooms; perhaps a holder is then carried to a third room."""
    depths = [pick(rng, (1, 2, 3)), pick(rng, (1, 2))]
    chains, used = [], 0
    for i, depth in enumerate(depths):
        chains.append([f"{{x{i}}}", *(f"{{h{used + j}}}" for j in range(depth)), f"{{r{i}}}"])
        used += depth
    sentences = shuffled(rng, [f"The {a} is in the {b}." for chain in chains for a, b in zip(chain, chain[1:])])
    moved = pick(rng, (None, 0, 0, 1))  # whose holder is carried away
    now = [list(chain) for chain in chains]
    if moved is not None:
        holder = 1 + int(rng.random() * depths[moved])
        sentences.append(f"Then {{n0}} carries the {chains[moved][holder]} to the {{r2}}.")
        now[moved] = chains[moved][: holder + 1] + ["{r2}"]
    names = blanks(
        x=shuffled(rng, SMALL)[:2], h=shuffled(rng, HOLDERS)[:used], r=shuffled(rng, ROOMS)[:3], n=draw_people(rng, 1)
    )
    skeleton, prompt = story(sentences, "In which room is the {x0} now?", **names)
    before, after, other = (filled(chain, names) for chain in (chains[0], now[0], now[1]))
    steps = tuple(zip(after, after[1:]))
    return skeleton, Problem(prompt, write_links(steps, "in"), after[-1], "containment", steps, (before, other))


def containment_errors(problem):
    """ignored_clue: as if nothing had been carried; wrong_row: a place is read from the other thing's; dropped_step."""
    links, (before, other) = problem.steps, problem.facts
    if (old := tuple(zip(before, before[1:]))) != links:
        yield "ignored_clue", len(links) - 1, write_links(old, "in")
    for place in range(len(links)):
        for j in range(1, len(other)):
            there = ((links[place][0], other[j]), *zip(other[j:], other[j + 1 :]))
            yield "wrong_row", place, write_links((*links[:place], *there), "in")
    if len(links) > 1:
        yield "dropped_step", len(links) - 1, write_links(links[:-1], "in")


# family -> (draw, errors)
PUZZLES = {
    "ordering": (draw_ordering, ordering_errors),
    "constraints": (draw_constraints, constraints_errors),
    "lookup": (draw_lookup, lookup_errors),
    "times": (draw_times, times_errors),
    "quantities": (draw_quantities, quantities_errors),
    "containment": (draw_containment, containment_errors),
}
