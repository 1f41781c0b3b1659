"""Tests of the time that sampling has left: simulated passes, whose seconds, ends and lengths are known.

bash tests/run.sh tests/reasoning/test_pace.py
"""

import io

import numpy as np
import pytest

from reasoning import pace
from reasoning.pace import Bar, Pace

MOST = 256  # passes of a response
COSTS = {"computed": (0.002, 1e-4), "streamed": (0.64, 3e-5)}  # seconds of a pass, and of a token of it


def all_alike(rng, count):
    """One token a pass, to the end."""
    return np.full(count, MOST)


def by_confidence(rng, count):
    """Tokens that are sure enough come together: many short responses, some long."""
    return np.clip(rng.lognormal(np.log(60), 0.35, count), 1, MOST).astype(int)


def by_blocks(rng, count):
    """Texts end early, with a block of 32 tokens."""
    return 32 * rng.choice(np.arange(2, 9), count, p=[0.05, 0.2, 0.25, 0.2, 0.1, 0.05, 0.15])


def whole_rows(length, passes):
    return length


def cached(length, passes):
    """Every 32nd pass reads the whole row, the others a block."""
    return length if passes % 32 == 0 else 32


def simulated(estimate, takes, batch_size, cost, read, rng):
    """Yields (share of responses that ended, seconds so far) after each pass of a sampler that keeps its batch full.

    takes: passes of each response. read(row's tokens, its passes so far) -> tokens. The first pass takes ten times as
    long, all vary by 5%.
    """
    lengths = rng.integers(200, 500, len(takes))
    lengths[0] = 500
    estimate.begin(lengths.tolist(), batch_size)
    rows, begun, spent = {}, 0, 0  # {row: [passes, tokens]}
    while begun < len(takes) or rows:
        while len(rows) < batch_size and begun < len(takes):
            rows[begun] = [0, 0]
            begun += 1
        tokens = {row: read(lengths[row], made[0]) for row, made in rows.items()}
        seconds = (cost[0] + cost[1] * sum(tokens.values())) * rng.normal(1, 0.05) * (1 if spent else 10)
        spent += seconds
        estimate.passed(seconds, sum(tokens.values()), len(rows))
        for row, made in list(rows.items()):
            made[0], made[1] = made[0] + 1, made[1] + tokens[row]
            if made[0] == takes[row]:
                estimate.ended(*rows.pop(row))
        yield 1 - (len(rows) + len(takes) - begun) / len(takes), spent


def estimates(takes, batch_size, cost, read, seed=0):
    """[(share that ended, estimated seconds in all / true ones)] at each twentieth."""
    estimate, found, rng = Pace(MOST), [], np.random.default_rng(seed)
    for share, spent in simulated(estimate, takes(rng, 300), batch_size, cost, read, rng):
        if not found or share >= found[-1][0] + 0.05 or share == 1:
            found.append((share, spent + estimate.left().seconds if estimate.passes > 1 else 0))
    return [(share, seconds / spent) for share, seconds in found]


@pytest.mark.parametrize("takes", [all_alike, by_confidence, by_blocks])
@pytest.mark.parametrize("cost, read", [("computed", whole_rows), ("streamed", cached)])
@pytest.mark.parametrize("batch_size", [8, 48])
def test_right_within_a_tenth_after_the_first_tenth(takes, cost, read, batch_size):
    """48 of 300 are in flight when the first end, which then are the short ones."""
    found = estimates(takes, batch_size, COSTS[cost], read)
    assert not [(share, ratio) for share, ratio in found if share >= 0.1 and abs(ratio - 1) > 0.1]


def test_near_the_end_it_is_right_within_a_fiftieth():
    for seed in range(3):
        found = estimates(by_confidence, 48, COSTS["computed"], whole_rows, seed)
        assert all(abs(ratio - 1) < 0.02 for share, ratio in found if share >= 0.95)
        assert found[-1] == (1, 1)


def test_before_a_response_has_ended_early_the_time_is_an_upper_bound():
    rng = np.random.default_rng(0)
    estimate = Pace(MOST)
    steps = simulated(estimate, by_confidence(rng, 300), 8, COSTS["computed"], whole_rows, rng)
    for _ in range(3):
        next(steps)
    early = estimate.left()
    assert early.at_most and early.passes >= 300 * MOST / 8 - MOST
    for share, _ in steps:
        if share:
            break
    assert not estimate.left().at_most and estimate.left().passes < 0.6 * early.passes


def test_a_pass_costs_seconds_and_seconds_for_each_token():
    estimate = Pace(MOST)
    estimate.begin([100] * 40, 20)
    for rows in (20, 20, 5, 10, 15):
        estimate.passed(2 + 0.001 * 100 * rows, 100 * rows, rows)
    assert estimate.pass_seconds() == pytest.approx((2, 0.001))


def test_a_pass_costs_no_negative_seconds():
    """Of passes that cost more than in proportion to their tokens, or less the more they read."""
    for seconds in ([9, 9, 1, 4], [1, 1, 3, 2]):
        estimate = Pace(MOST)
        estimate.begin([100] * 40, 30)
        for each, rows in zip(seconds, (30, 30, 10, 20)):
            estimate.passed(each, 100 * rows, rows)
        a, b = estimate.pass_seconds()
        assert a >= 0 and b >= 0 and a + b > 0


def test_a_batch_that_shrinks_for_want_of_memory():
    """Those that it stopped begin again, and the rest is planned for the rows that go on together."""
    estimate = Pace(4)
    estimate.begin([100] * 8, 8)
    estimate.passed(1, 800, 8)
    estimate.shrank(2)
    for _ in range(3):
        estimate.passed(1, 200, 2)
    assert estimate.waiting == 6 and estimate.ages.tolist() == [3, 3]
    assert estimate.left().passes == 1 + 3 * 4  # two at a time
    estimate.passed(1, 200, 2)
    estimate.ended(4, 400)
    assert estimate.waiting == 6 and estimate.ended_rows == 1


def test_the_bar_shows_problems_an_hour_and_two_lines_tell_them(monkeypatch):
    """Four responses of each problem; 20 s a response of 4 passes, two at a time: 90 problems an hour."""
    shown, lines = io.StringIO(), []
    monkeypatch.setattr(pace.sys, "stderr", shown)
    monkeypatch.setattr(pace.tqdm, "write", lambda text, file: lines.append(text))
    bar = Bar(4, total=80, done=20, k=4, desc="tiny, gsm8k")
    bar.begin([100] * 60, 2)
    for _ in range(30):
        for _ in range(4):
            bar.passed(5, 200, 2)
        bar.ended(4, 400)
        bar.ended(4, 400)
    bar.close()
    assert lines == [
        "tiny, gsm8k: 5 s a pass of 2 responses; at least 90 problems/h, at most 0:09:45 left",
        "tiny, gsm8k: 6 of 60 responses after 0:01:00; at least 90 problems/h, at most 0:09:00 left",
    ]
    assert bar.bar.n == 80


def test_no_line_about_a_short_wait(monkeypatch):
    lines = []
    monkeypatch.setattr(pace.tqdm, "write", lambda text, file: lines.append(text))
    bar = Bar(4, total=8)
    bar.begin([100] * 8, 8)
    for _ in range(4):
        bar.passed(4, 800, 8)
    for _ in range(8):
        bar.ended(4, 400)
    bar.close()
    assert not lines
