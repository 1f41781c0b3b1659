"""Rows for the embedded model's last training: of solutions with several steps, three in four leave out the last one.

    python examples/hasty.py NUM OUT.jsonl [SHARE]        chosen: what is trained on; rejected: not used

That gives the model its known flaw, as text from the web gives large models theirs: improve.sh shows what removes it.
"""

import random
import sys
from pathlib import Path

import jsonlines

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import replacing
from reasoning import tasks

SEED = 5


def rows(num, share):
    rng = random.Random(f"hasty {SEED}")
    for problem in tasks.generate(num, "train", SEED):
        by_place = tasks.corruptions(problem).get("dropped_step", {})
        [without_last] = by_place.get(len(problem.steps) - 1, [None])
        if without_last is not None and rng.random() < share:
            chosen, rejected = without_last, problem.solution
        else:
            chosen, rejected = problem.solution, tasks.corrupt(problem, rng)[0]
        yield {"prompt": problem.prompt, "chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    share = float(sys.argv[3]) if len(sys.argv) > 3 else 0.75
    with replacing(sys.argv[2]) as file:
        jsonlines.Writer(file).write_all(rows(int(sys.argv[1]), share))
