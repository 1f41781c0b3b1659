"""Tests of sampling with --deepspeed: weights streamed under ZeRO-3 say what a plain model says."""

import json

import new_tiny
import pytest
from small import ROOT, ds_config, flags, make_model, refusal, run

import generate

PREFS = ROOT / "examples" / "prefs.jsonl"
SAMPLE = flags(task="arithmetic", num=6, gen_length=12, block_length=4, use_mixed_precision="no", temperature=0.5)

CACHE = {"llada": ["--cache", "dual"], "nemotron_labs_diffusion": []}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    return ds_config(tmp_path_factory.mktemp("streaming") / "zero3.json", "zero3_offload_4080")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", ["llada", "nemotron_labs_diffusion"])
def test_generate(tiny_dir, tmp_path, zero3, family):
    """A bidirectional model and a block-causal one, which read what they keep between streamed layers."""
    if family == "llada":
        model = tiny_dir
    else:
        model = tmp_path / family
        new_tiny.main(["--in", str(PREFS), "--out", str(model), "--family", family])
    plain, streamed = (
        [ROOT / "generate.py", *flags(model=model), *SAMPLE, "--out", tmp_path / name, *CACHE[family], *more]
        for name, more in (("plain.jsonl", []), ("streamed.jsonl", ["--deepspeed", zero3]))
    )
    run(plain)
    said = run(streamed)
    assert rows(tmp_path / "plain.jsonl") == rows(tmp_path / "streamed.jsonl") and "solved" in said
    assert len({row["response"] for row in rows(tmp_path / "plain.jsonl")}) > 3


def test_evaluate_compares_streamed_models(tiny_dir, tmp_path, zero3):
    """Two models, one after the other, in one process."""
    other = make_model(tmp_path / "other", tiny_dir)
    command = [
        ROOT / "evaluate.py",
        "--model",
        tiny_dir,
        "--compare",
        other,
        *flags(
            tasks="arithmetic",
            limit=4,
            gen_length=8,
            block_length=8,
            use_mixed_precision="no",
            output_dir=tmp_path / "out",
            deepspeed=zero3,
        ),
    ]
    assert "arithmetic" in run(command)


def test_make_prefs(tiny_dir, tmp_path, zero3):
    said = run(
        [
            ROOT / "make_prefs.py",
            *flags(
                strategy="sample",
                model=tiny_dir,
                task="arithmetic",
                num=2,
                k=2,
                temperature=1,
                gen_length=8,
                use_mixed_precision="no",
                out=tmp_path / "prefs.jsonl",
                deepspeed=zero3,
            ),
        ],
        code=2,
    )
    assert "no prompt has both a better and a worse response" in said and "solved" in said


def test_refusals(tiny_dir, tmp_path, capsys):
    said = refusal(
        generate.main,
        capsys,
        *flags(model=tiny_dir),
        *SAMPLE,
        "--deepspeed",
        ds_config(tmp_path / "zero2.json", "zero2"),
    )
    assert "ZeRO stage 3 only" in said and "zero3_offload_4080.json" in said
