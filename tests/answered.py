"""What the tests of evaluate.py and of its leak check share: a call on the embedded model, and what it wrote."""

import json

from small import ROOT, call, flags

import evaluate

TINY = ROOT / "examples" / "tiny"
SAMPLE = flags(use_mixed_precision="no", device="cpu", gen_length=24, block_length=8)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(out, *argv):
    """(results.json, {file stem: rows}) of a call."""
    assert call(evaluate.main, *argv, *SAMPLE, "--output_dir", out) == 0
    return json.loads((out / "results.json").read_text()), {path.stem: read(path) for path in out.glob("*.jsonl")}
