"""The progress bar of every long job: on a terminal each second, in a log file a line now and then."""

import sys

from tqdm import tqdm


def progress(total, unit, description=None, **settings):
    """tqdm's bar over `total` units; settings: tqdm's."""
    seconds = 1 if sys.stderr.isatty() else 30
    return tqdm(total=total, unit=unit, desc=description, mininterval=seconds, **settings)
