"""Tests of plan.py --for: what passes read against the sampler's own count, operations, hours, the printed plan.

bash tests/run.sh tests/reasoning/test_planning.py
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from small import ROOT, refusal, settings

import config
import plan
from models import architecture
from models.families import Blocks
from reasoning import arguments, blockwise, passes, planning, sampler
from training import costs, deepspeed_config, sampling_costs
from training.footprint import Machine
from training.plan_arguments import items
from training.sampling_costs import Work, pass_of, reads_of, sampling_plan
from training.sampling_memory import sampled_shape

TINY = ROOT / "examples" / "tiny"
LLADA = str(ROOT / "tests" / "configs" / "llada_8b")
STREAMED = str(ROOT / "ds_configs" / "zero3_offload_4080.json")
CARD = Machine(gpu_gib=16, host_gib=32)


def checked(model, **given):
    sample = config.SampleArguments(model_name_or_path=str(model), device="cpu", **given)
    arguments.check(sample)
    return replace(sample, device="cuda")


def shape_of(sample):
    return sampled_shape(architecture.load_config(sample.model_name_or_path), sample)


def planned(sample, work, machine=CARD):
    ds = deepspeed_config.read_ds_config(sample.deepspeed)
    return sampling_plan(shape_of(sample), sample, ds, machine, work)


class Counted:
    """A pace that keeps what it is told."""

    def begin(self, lengths, batch_size):
        self.found = []

    def passed(self, seconds, tokens, rows):
        pass

    def ended(self, passes, tokens):
        self.found.append((passes, tokens))


@pytest.mark.parametrize("more", [{}, {"cache": "prefix"}, {"cache": "dual"}, {"cache": "dual", "refresh": 3}])
def test_passes_read_what_the_sampler_reads(more):
    sample = replace(checked(TINY, gen_length=24, block_length=8, logits_eos_inf=True, **more), device="cpu")
    sample.use_mixed_precision = "no"
    model, tokenizer = sampler.load(sample)
    counted, prompt = Counted(), tokenizer("What is 7 + 5?")["input_ids"]
    sampler.respond(model, tokenizer, [prompt], sample, pace=counted)
    reads = reads_of(shape_of(sample), sample, Work(1, len(prompt), 24, 8))
    assert counted.found == [(sum(each.count for each in reads), sum(each.count * each.tokens for each in reads))]


@pytest.mark.parametrize("first_from_clean", [False, True])
def test_passes_of_a_block_causal_model_read_what_its_sampler_reads(first_from_clean):
    blocks = Blocks(4, first_from_clean=first_from_clean)
    sample, prompt = settings(gen_length=12, block_length=4), torch.arange(10, 18)
    filling = blockwise.fill(prompt, sample, passes.Special(3, torch.tensor([2])), torch.Generator(), blocks)
    made, read = [], next(filling)
    with contextlib.suppress(StopIteration):
        while True:
            made.append(read.stop - read.first)
            read = filling.send((torch.full_like(read.places, 9), torch.zeros(len(read.places))))
    reads = sampling_costs.block_causal_reads(blocks, Work(1, len(prompt), 12, 4))
    assert made == [each.tokens for each in reads for _ in range(each.count)]


def test_a_pass_over_whole_rows_has_the_operations_of_training():
    sample = checked(LLADA, gen_length=256, block_length=32)
    shape, ds = shape_of(sample), deepspeed_config.read_ds_config(None)
    [reads] = {each._replace(count=0) for each in reads_of(shape, sample, Work(1, 144, 256, 32))}
    made = pass_of(shape, sample, ds, CARD, reads, 5)
    assert made.operations == sum(costs.operations_of(shape, [costs.Row(400, reads.predicted)] * 5))


def test_streamed_passes_of_few_tokens_take_as_long_as_the_weights_over_the_bus():
    """All but the embedding, which the host looks up."""
    sample = checked(LLADA, gen_length=256, block_length=32, cache="dual", deepspeed=STREAMED, batch_size=1)
    made = planned(sample, Work(1, 144, 256, 32))
    streamed = 2 * (8_015_581_184 - 126_464 * 4096) / 25e9
    assert made.passes == 256 and made.seconds == pytest.approx(256 * streamed, rel=0.01) and made.limit == "the bus"


def test_full_batches_share_the_bus():
    """Ten times the responses in one batch take hardly longer."""
    sample = checked(LLADA, gen_length=256, block_length=32, cache="dual", deepspeed=STREAMED)
    one, ten = (planned(sample, Work(count, 144, 256, 32)) for count in (1, 10))
    assert ten.rows == 10 and ten.seconds < 1.1 * one.seconds


def test_the_plain_way_takes_hours_and_the_caches_less():
    """1319 problems of GSM8K, 256 tokens: 10 to 13 hours, by the arithmetic of whole rows."""
    sample = checked(LLADA, gen_length=256, block_length=32, load_in_4bit=True)
    work = Work(1319, 144, 256, 32)
    hours = [planned(replace(sample, cache=cache), work).seconds / 3600 for cache in ("none", "prefix", "dual")]
    assert 10 < hours[0] < 13 and hours[1] < hours[0] / 2 and hours[2] < hours[1] / 2


def test_a_threshold_commits_several_tokens_a_pass():
    sampled = planning.Sampled(200, 8, 1, 144, 300, 256, 2.5)
    sample = checked(LLADA, gen_length=256, block_length=32)
    assert sampled.work(sample).passes_of_block == 32 and sampled.work(sample).responses == 1600
    assert sampled.work(replace(sample, steps=64)).passes_of_block == 8
    assert sampled.work(replace(sample, steps=None, threshold=0.9)).passes_of_block == 13
    assert sampled.work(replace(sample, steps=64, threshold=0.9)).passes_of_block == 8


def test_the_command_of_an_evaluation(capsys):
    """evaluate.py's own flags: 200 problems, two models."""
    argv = ["--for", "evaluate", "--model", LLADA, "--compare", LLADA, "--tasks", "gsm8k", "--limit", "200"]
    argv += ["--gen_length", "256", "--block_length", "32", "--cache", "dual", "--threshold", "0.9"]
    argv += ["--load_in_4bit", "true", "--gpu_gib", "16", "--host_gib", "29.8"]
    assert plan.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert "a response of 256 tokens to a prompt of 99: 104 passes, which read 5,912 tokens" in said
    [line] = [each for each in said if each.startswith("planned: ")]
    assert "for 200 problems, a response each, 2 models one after the other (" in line
    ways = [each.split("  ")[1] for each in said if each.startswith("  --")]
    assert ways[-1] == "--cache dual --threshold 0.9" and len(ways) == 5
    assert "with 200 items of which 15% change sides (30), 21 to 9 (+6.0 points)" in said[-2]
    assert said[-1].startswith("FITS: card ")
    assert plan.main([*argv, "--batch_size", "100"]) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT: the card needs" in said and "it fits with: --batch_size auto\n" in said
    assert said.count("  does not fit\n") == 4, "all ways with a cache"


@pytest.mark.parametrize(
    "flags, host, words",
    [
        (["--batch_size", "9"], "29.8", "--batch_size auto --load_in_4bit true"),
        (["--deepspeed", STREAMED], "9", "--load_in_4bit true, without --deepspeed"),
        ([], "3", None),
    ],
)
def test_what_makes_it_fit(capsys, flags, host, words):
    argv = ["--for", "evaluate", "--model", LLADA, "--limit", "200", "--gen_length", "256", "--block_length", "32"]
    assert plan.main([*argv, "--cache", "dual", "--gpu_gib", "15.8", "--host_gib", host, *flags]) == 1
    [verdict] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DOES NOT FIT: ")]
    assert verdict.endswith(f"; it fits with: {words}") if words else "fits with" not in verdict


def test_the_problems_that_a_command_has(capsys, tmp_path):
    """Of an embedded task without --limit, and of a file."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "7 + 5?", "answer": 12}\n' * 3, encoding="utf-8")
    plan.main(["--for", "evaluate", "--model", LLADA, "--tasks", "arithmetic", "--in", str(tmp_path / "mine.jsonl")])
    assert "for 203 problems, a response each (" in capsys.readouterr().out
    argv = ["--for", "make_prefs", "--model", LLADA, "--in", str(tmp_path / "mine.jsonl"), "--temperature", "1"]
    plan.main(argv)
    assert "for 3 problems, 8 responses each (" in capsys.readouterr().out


@pytest.mark.parametrize("seconds, words", [(0.01, "1 s"), (59, "59 s"), (90, "1.5 min"), (2520, "0.70 h")])
def test_a_duration(seconds, words):
    assert planning.duration(seconds) == words


def test_the_problems_of_an_evaluation():
    assert items(["gsm8k"], None, {}) == 1319 and items(["gsm8k", "math500", "logiqa"], 600, {}) == 1700
    assert items(["gsm8k", "logiqa"], None, {}) is None and items(["gsm8k", "mine"], None, {"mine": 3}) == 1322


def test_a_protocol_sets_lengths_and_passes(capsys):
    """LLaDA's: four examples, 256 tokens, blocks of 8, one token a pass; what is given wins."""
    argv = ["--for", "evaluate", "--model", LLADA, "--protocol", "llada", "--tasks", "gsm8k", "--limit", "200"]
    argv += ["--load_in_4bit", "true", "--gpu_gib", "16", "--host_gib", "29.8"]
    plan.main([*argv])
    said = capsys.readouterr().out
    assert "a response of 256 tokens to a prompt of 1499: 256 passes, which read 449,280 tokens" in said
    plan.main([*argv, "--gen_length", "128", "--prompt_tokens", "99"])
    assert "a response of 128 tokens to a prompt of 99: 128 passes" in capsys.readouterr().out


def test_the_command_of_preferences(capsys):
    """A block-causal model: its cache is exact, and there is no other way but a threshold."""
    argv = ["--for=make_prefs", "--model", str(ROOT / "tests" / "configs" / "sdar_4b"), "--task", "arithmetic"]
    argv += ["--num", "50", "--k", "8", "--temperature", "1", "--gen_length", "128", "--host_gib", "29.8"]
    assert plan.main([*argv, "--gpu_gib", "16"]) == 0
    said = capsys.readouterr().out
    assert "for 50 problems, 8 responses each (" in said and "change sides" not in said and "--cache" not in said


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--tasks", "gsm8k,hotpotqa"], "--for: give the number of problems"),
        (["--tasks", "gsm8k,math500", "--protocol", "llada"], "plan one at a time: --tasks gsm8k"),
        (["--problems", "0"], "--problems is 0, expected 1 or more"),
        (["--limit", "5", "--response_tokens", "65"], "expected at most --gen_length 64"),
        (["--limit", "5", "--tokens_per_pass", "0.5"], "--tokens_per_pass is 0.5, expected 1 or more"),
        (["--limit", "5", "--changed", "2"], "--changed is 2.0, expected a share"),
        (["--limit", "5", "--gpu_gib", "-1"], "--gpu_gib is -1.0"),
        (["--limit", "5", "--deepspeed", str(ROOT / "ds_configs" / "zero2_offload_4080.json")], "stage 3 only"),
        (["--limit", "5", "--beta", "0.1"], "unknown argument --beta"),
        (["--config_file", str(ROOT / "configs" / "tiny.yaml")], "is an argument of the training commands"),
    ],
)
def test_refusals(capsys, argv, words):
    assert words in refusal(plan.main, capsys, "--for", "evaluate", "--model", LLADA, *argv)


def test_corrupted_preferences_are_not_sampled(capsys):
    argv = ["--for", "make_prefs", "--strategy", "corrupt", "--task", "arithmetic"]
    assert "--strategy corrupt samples nothing" in refusal(plan.main, capsys, *argv)


def test_another_purpose(capsys):
    assert "--for: invalid choice: 'tea'" in refusal(plan.main, capsys, "--for", "tea")
