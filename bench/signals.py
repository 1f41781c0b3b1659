"""calibrate.py's table for any designs, those of rivals.py included: what share of a pair's gradient other pairs share.

    python bench/signals.py "spread 2x2" "halves 1x2" --data PACKED --model_name_or_path M --pairs 80

A design is an estimator and its T x R; the flags after them are calibrate.py's.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rivals  # noqa: F401  (its estimators join the product's)

import calibrate
from cli import exits
from files import InputError
from scoring import calibration, noise


def design_of(name):
    """ "spread 2x3" -> Design."""
    found = re.fullmatch(r"(\w+) (\d+)x(\d+)", name)
    if not found or found[1] not in noise.ESTIMATORS:
        raise InputError(f"{name!r}: expected T x R and one of {', '.join(noise.ESTIMATORS)}, such as 'spread 2x3'")
    return calibration.Design(found[1], int(found[2]), int(found[3]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    count = next((place for place, each in enumerate(argv) if each.startswith("--")), len(argv))
    if not count:
        raise InputError('no design is given; expected some, such as "spread 2x2"')
    calibration.DESIGNS[:] = map(design_of, argv[:count])  # of bidirectional models
    return calibrate.main(argv[count:])


if __name__ == "__main__":
    exits.run(main)
