"""Which responses to a prompt become a pair of preferences."""

import random
from collections import Counter


class Pairing:
    """Chooses pairs of a better and a worse response, at most `most` a prompt.

    With `balanced`, the lengths of chosen and rejected cancel over all prompts; surplus: the characters that the chosen
    responses have more so far.
    """

    def __init__(self, most, balanced, seed):
        self.most, self.balanced = most, balanced
        self.rng = random.Random(f"pairs {seed}")
        self.surplus = 0

    def choose(self, candidates):
        """Some of one prompt's candidates [(chosen text, rejected text)], which may hold a pair several times.

        One pair after the other: one whose texts are in the fewest pairs so far; of those, with `balanced`, the one
        that brings the surplus nearest to 0; of those, a random one, the likelier the more often it is a candidate.
        """
        self.rng.shuffle(candidates)
        left = list(dict.fromkeys(candidates))  # each once, where it came first: what is frequent comes early
        used = Counter()  # text -> pairs that have it
        chosen = []

        def cost(pair):
            times_used = used[pair[0]] + used[pair[1]]
            return (times_used, abs(self.surplus + excess(pair)) if self.balanced else 0)

        while left and len(chosen) < self.most:
            pair = min(left, key=cost)  # the first of equals
            left.remove(pair)
            chosen.append(pair)
            used.update(pair)
            self.surplus += excess(pair)
        return chosen


def excess(pair):
    """Characters that the chosen text has more than the rejected one."""
    return len(pair[0]) - len(pair[1])
