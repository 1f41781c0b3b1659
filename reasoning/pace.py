"""How fast sampling goes and how long it still takes: sampler.respond() tells Pace of each pass, Bar shows it.

A pass takes a + b n seconds, n tokens read: a and b are fitted to the latest passes. How many passes a response takes
is a distribution, estimated from the responses that ended and from those in flight, which have not ended yet: without
the latter, the short ones that end first would make the rest look short (Kaplan and Meier, JASA 1958). Beyond the
longest response seen it goes on as log-normal distributions do, each as likely as it makes the responses. From it the
rest is drawn and scheduled.

M passes that a response takes at most.
"""

import heapq
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cli.progress import progress

RECENT = 300  # passes: what a pass costs is fitted to about so many of the latest
ALIKE = 0.1  # relative deviation of the tokens of passes below which a and b cannot be told apart
DRAWS = 500  # responses that are drawn for an estimate, at least
SPREADS = (0.25, 0.8)  # standard deviations of the logarithm of a response's passes that are thought possible
SOON = 10  # seconds after which a first estimate is printed, if a pass was made before them
LONG = 60  # seconds: of less, nothing but the bar is shown


class Left(NamedTuple):
    """What is still to do."""

    seconds: float
    passes: float
    at_most: bool  # no response has ended before its last possible pass


class Pace:
    """What respond() calls as it samples. It needs no clock."""

    def __init__(self, most_passes):
        """most_passes: M."""
        self.most_passes = most_passes
        self.ends = np.zeros(most_passes + 1)  # responses that took so many passes
        self.in_flight = []  # the pass at which each began
        self.ended_rows = self.passes = self.seconds = self.row_passes = self.tokens = 0
        self.squares, self.products = np.zeros((2, 2)), np.zeros(2)  # sums of [1, n] [1, n]' and [1, n] s over passes

    def begin(self, lengths, batch_size):
        """lengths: tokens of each row, in the order in which rows start. batch_size: rows of a pass at most."""
        self.lengths, self.batch_size = np.array(lengths), batch_size

    def passed(self, seconds, tokens, rows):
        """A pass of so many seconds read so many tokens; so many rows are in flight."""
        self.in_flight += [self.passes] * (rows - len(self.in_flight))
        if self.passes == 1:  # the first pass also warms up
            self.squares, self.products = np.zeros((2, 2)), np.zeros(2)
        known, kept = np.array([1.0, tokens]), 1 - 1 / RECENT
        self.squares = kept * self.squares + np.outer(known, known)
        self.products = kept * self.products + known * seconds
        self.passes += 1
        self.seconds += seconds
        self.row_passes += rows
        self.tokens += tokens

    def shrank(self, batch_size):
        """For want of memory, at most so many rows go on together; all that were in flight begin again."""
        self.batch_size, self.in_flight = batch_size, []

    def ended(self, passes, tokens):
        """A response ended after so many passes, which read so many tokens for it."""
        gaps = [abs(self.passes - start - passes) for start in self.in_flight]
        del self.in_flight[int(np.argmin(gaps))]
        self.ends[min(passes, self.most_passes)] += 1
        self.ended_rows += 1

    @property
    def waiting(self):
        """Number of rows that have not begun."""
        return len(self.lengths) - self.ended_rows - len(self.in_flight)

    @property
    def ages(self):
        """(rows in flight,): the passes that each has made."""
        return np.array([min(self.passes - start, self.most_passes - 1) for start in self.in_flight], int)

    def left(self):
        """Left, from the first pass on."""
        if self.ended_rows == len(self.lengths):
            return Left(0.0, 0.0, False)
        survival, rng, drawn = self.survival(), np.random.default_rng(0), []
        new = np.zeros(self.waiting, int)
        for _ in range(1 + DRAWS // (1 + self.waiting + len(self.in_flight))):
            going, waiting = remaining(survival, self.ages, rng), remaining(survival, new, rng)
            drawn.append((makespan(going, waiting, self.batch_size), going.sum() + waiting.sum()))
        passes, row_passes = np.mean(drawn, 0)
        a, b = self.pass_seconds()
        seconds = a * passes + b * row_passes * self.tokens_of_a_row()
        return Left(float(seconds), float(passes), not self.ends[:-1].any())

    def pass_seconds(self):
        """(a, b). Passes that read nearly alike are taken to cost what their tokens cost, and nothing else."""
        (count, tokens), (_, squares) = self.squares
        seconds, products = self.products
        spread = squares - tokens**2 / count
        if spread < ALIKE**2 * squares:
            return 0.0, seconds / tokens
        b = max(0.0, (products - tokens * seconds / count) / spread)
        a = (seconds - b * tokens) / count
        return (a, b) if a > 0 else (0.0, seconds / tokens)

    def survival(self):
        """(M + 1,): P(a response takes more than t passes) for t = 0 ... M."""
        in_flight = np.bincount(self.ages, minlength=len(self.ends))
        at_risk = (self.ends + in_flight)[::-1].cumsum()[::-1]
        hazard = np.divide(self.ends, at_risk, out=np.zeros(len(self.ends)), where=at_risk > 0)
        if self.ends[:-1].any():
            unseen = at_risk == 0
            hazard[unseen] = likely_hazard(self.ends, in_flight)[unseen]
        hazard[-1] = 1
        return np.cumprod(1 - hazard)

    def tokens_of_a_row(self):
        """Tokens that a pass reads of a row that has not ended."""
        begun = self.lengths[: len(self.lengths) - self.waiting].mean()
        return self.tokens / self.row_passes * self.lengths[self.ended_rows :].mean() / begun


def likely_hazard(ends, in_flight):
    """(M + 1,): P(a response ends at pass t | it has not before), by log-normal distributions.

    ends, in_flight (M + 1,): how many rows ended after t passes, or have made t and go on. Rows that took all M passes
    might have gone on. A distribution counts by its likelihood; none is likelier than another before.
    """
    times = np.arange(1, len(ends))
    ended = np.append(ends[1:-1], 0)
    longer = in_flight[1:] + np.append(np.zeros(len(times) - 1), ends[-1])
    means = np.linspace(0, np.log(2 * len(times)), 60)[:, None, None]
    spreads = np.geomspace(*SPREADS, 8)[:, None]
    z = torch.from_numpy((np.log(times) - means) / spreads)  # (means, spreads, M)
    known = ended + longer > 0
    of_ended = -(z[..., known] ** 2) / 2 - torch.from_numpy(np.log(spreads))
    of_longer = torch.special.log_ndtr(-z[..., known])
    logs = of_ended @ torch.from_numpy(ended[known]) + of_longer @ torch.from_numpy(longer[known])
    weights = logs.flatten().softmax(0)
    survival = np.append(1, (weights @ torch.special.ndtr(-z).flatten(0, 1)).numpy())
    return np.append(0, 1 - survival[1:] / np.maximum(survival[:-1], 1e-300))


def remaining(survival, ages, rng):
    """Passes that rows of these ages still take: one draw for each from P(T > t | T > age), evenly spread."""
    even = (rng.permutation(len(ages)) + 0.5) / max(1, len(ages))
    return np.searchsorted(-survival, -even * survival[ages], side="right") - ages


def makespan(going, waiting, batch_size):
    """Passes until the last row ends: rows in flight take `going`, and `waiting` ones join as others leave."""
    free = max(0, batch_size - len(going))
    slots = [*going.tolist(), *waiting[:free].tolist()]
    heapq.heapify(slots)
    for passes in waiting[free:].tolist():
        heapq.heapreplace(slots, slots[0] + passes)
    return max(slots, default=0)


class Bar(Pace):
    """A Pace with a progress bar, which shows problems an hour and the time left; two lines tell them, too."""

    def __init__(self, most_passes, total, done=0, k=1, noun="problems", desc="sampling"):
        """total: responses, of which `done` are there already. k: responses of a problem, or what `noun` names."""
        super().__init__(most_passes)
        self.k, self.noun, self.desc = k, noun, desc
        shown = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bar = progress(total, "response", desc, initial=done, bar_format=shown, miniters=0)
        self.due, self.told = 0, set()  # when the bar is drawn again; the lines that were printed

    def passed(self, seconds, tokens, rows):
        super().passed(seconds, tokens, rows)
        if self.passes > 2 and self.seconds >= SOON:
            self.tell("first", f"{self.seconds / self.passes:.2g} s a pass of {rows} responses")
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.bar.mininterval
            self.bar.set_postfix_str(self.words(), refresh=False)
            self.bar.update(0)

    def ended(self, passes, tokens):
        super().ended(passes, tokens)
        if 10 * self.ended_rows >= len(self.lengths):
            self.tell("tenth", f"{self.ended_rows} of {len(self.lengths)} responses after {clock(self.seconds)}")
        self.bar.update(1)

    def close(self):
        """For contextlib.closing()."""
        if self.passes:
            self.bar.set_postfix_str(self.words(), refresh=False)
        self.bar.close()

    def tell(self, which, words):
        """Print a line once, if there is long to wait."""
        if which not in self.told and self.left().seconds >= LONG:
            tqdm.write(f"{self.desc}: {words}; {self.words()}", file=sys.stderr)
        self.told.add(which)

    def words(self):
        """1,312 problems/h, 1:12:00 left"""
        left = self.left()
        hourly = 3600 * len(self.lengths) / (self.seconds + left.seconds) / self.k
        bounds = ("at least ", "at most ") if left.at_most else ("", "")
        return f"{bounds[0]}{hourly:,.0f} {self.noun}/h, {bounds[1]}{clock(left.seconds)} left"


def clock(seconds):
    """1:12:00"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
