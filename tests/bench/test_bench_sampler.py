"""Tests of the sampler's benches: their rules and sheets against the definition, and each at a small size."""

import sys

import pytest
import torch
from small import ROOT
from test_bench import bench

sys.path.insert(0, str(ROOT / "bench"))

import longer_answers
import noise
import sampler

from config import SampleArguments
from models.tokenization import load_tokenizer


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_factor(factor):
    """Fast-dLLM, section 3.3: the largest n with (n + 1)(1 - the nth confidence) < factor, at least one."""
    for seed in range(20):
        confidence = torch.rand(9, generator=torch.Generator().manual_seed(seed)) ** 0.2
        ranked = sorted(confidence.tolist(), reverse=True)
        numbers = [n for n in range(1, 10) if (n + 1) * (1 - ranked[n - 1]) < factor]
        kept = sampler.Factor(factor)(confidence, 1, 0.9)
        assert sorted(confidence[kept].tolist(), reverse=True) == ranked[: max(numbers, default=1)]


def test_schedule():
    rule = sampler.Schedule(0.9, 0.5, 4)
    assert rule(torch.tensor([0.89, 0.91, 0.2, 0.9]), 1, 0.9).tolist() == [False, True, False, True]  # all masked: 0.9
    assert rule(torch.tensor([0.69, 0.71]), 1, 0.9).tolist() == [False, True]  # half: 0.7
    assert rule(torch.tensor([0.3, 0.2]), 1, 0.9).tolist() == [True, False]  # the surest, however unsure


def test_sheets():
    """Every answer of a sheet is right, a wrong one counts alone, and no exercise is in both splits."""
    tokenizer = load_tokenizer(str(ROOT / "examples" / "tiny"))
    train, test = (longer_answers.sheets(12, split, 0, tokenizer) for split in ("train", "test"))
    for sheet in train + test:
        assert longer_answers.grade(sheet, sheet.response) == [True] * longer_answers.EXERCISES
        assert {len(tokenizer(text).input_ids) for text in sheet[:2]} == {240}
    first = test[0]
    wrong = first.response.replace(f"#### {first.answers[0]}\n", "#### 99\n", 1)
    assert longer_answers.grade(first, wrong) == [False] + [True] * 9
    assert longer_answers.grade(first, first.response[:-10]).count(None) == 1
    exercises = [{line for sheet in made for line in sheet.prompt.split("\n") if line} for made in (train, test)]
    assert len(exercises[0]) > 90 and not exercises[0] & exercises[1]


def test_sampler(tmp_path):
    """Plain decoding is compared with itself; a dual cache reads less than a prefix cache, a threshold takes less."""
    found, _ = bench("sampler", tmp_path, "--num", "2", "--turns", "1")
    rows = {(row["cache"], row["commits"]): row for row in found["table"]}
    plain, prefix, dual, sure = (
        rows[key] for key in [("none", "one"), ("prefix", "one"), ("dual", "one"), ("none", "threshold 0.9")]
    )
    assert (plain["ratio"], plain["differ"], plain["lost"], plain["won"]) == (1, 0, 0, 0)
    assert plain["read"] > prefix["read"] > dual["read"] and plain["passes"] > 2 * sure["passes"]
    assert len({row["of"] for row in rows.values()}) == 1 and len(rows) == len(sampler.settings(8))


def test_noise(tmp_path):
    """The old noise draws from the softmax, too; every way takes time."""
    torch.manual_seed(0)
    z = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    tokens, sure = noise.gumbel(z, None, SampleArguments(temperature=0.5), torch.tensor([]))
    torch.testing.assert_close(tokens.bincount() / 20000, (z[0] / 0.5).softmax(0), atol=0.02, rtol=0)
    torch.testing.assert_close(sure, z[0].softmax(0)[tokens])
    found, _ = bench("noise", tmp_path, "--quick", "--turns", "1", "--words", "3000")
    [row] = found["table"]
    assert min(row["seconds"].values()) > 0


def test_mixed_lengths(tmp_path):
    """As many tokens, several lengths, the same responses as one by one."""
    found, _ = bench("mixed_lengths", tmp_path, "--quick", "--turns", "1", "--num", "8")
    [row] = found["table"]
    assert row["is_same"] and row["lengths"] > 4 and min(row["wall"].values()) > 0
