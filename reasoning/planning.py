"""What plan.py --for prints: memory, and hours of an evaluation or of sampled preferences, by passes and cache.

    config.json + SampleArguments + Sampled -> lines()

The formulas are in training/sampling_costs.py and training/sampling_memory.py.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from reasoning.commits import commits_per_pass
from training import deepspeed_config
from training.advice import ROOT
from training.plan_table import item_lines, judged, model_line
from training.sampling_costs import Work, sampling_plan
from training.sampling_memory import sampled_shape

STREAMING = "ds_configs/zero3_offload_4080.json"
CHANGED = ("batch_size", "load_in_4bit", "deepspeed")  # arguments that a plan which does not fit may change
THRESHOLD = 0.9  # of the ways that are compared, where none is given: Fast-dLLM's


class Sampled(NamedTuple):
    """What is sampled, and what a plan must assume."""

    problems: int
    k: int  # responses of each
    models: int
    prompt_tokens: int
    longest_prompt: int
    response_tokens: int  # before a response ends
    tokens_per_pass: float  # with a threshold

    def work(self, sample):
        """Work of one model."""
        passes = len(commits_per_pass(sample))
        if sample.threshold is not None:
            fewer = math.ceil(sample.block_length / self.tokens_per_pass)
            passes = fewer if sample.steps is None else min(passes, fewer)
        return Work(self.problems * self.k, self.prompt_tokens, self.response_tokens, passes, self.longest_prompt)


def lines(model_config, sample, ds, machine, sampled):
    """(lines of the plan, whether it fits). sample: SampleArguments after arguments.check()."""
    shape = sampled_shape(model_config, sample)
    made = sampling_plan(shape, sample, ds, machine, sampled.work(sample))
    fits, verdict = judged(made.items, machine)
    responses = f"{sampled.k} responses each" if sampled.k > 1 else "a response each"
    models = f", {sampled.models} models one after the other" if sampled.models > 1 else ""
    apart = ""
    if made.copying:
        seconds = sampled.models * (made.computing + made.copying)
        apart = f"; {duration(seconds)} if copies over the bus do not overlap with arithmetic"
    hourly = sampled.problems * 3600 / made.seconds
    if not fits and (words := remedy(model_config, sample, machine, sampled)):
        verdict += f"; it fits with: {words}"
    found = [
        *item_lines(made.items, machine),
        model_line(shape),
        f"batch: {made.rows} rows, the longest of {made.row} tokens",
        f"a response of {sampled.response_tokens} tokens to a prompt of {sampled.prompt_tokens}: {made.passes} passes, "
        f"which read {made.tokens:,} tokens",
        f"planned: {duration(sampled.models * made.seconds)} for {sampled.problems} problems, {responses}{models} "
        f"({hourly:,.0f} problems/h; limited by {made.limit}{apart})",
        f"assumed: {machine.tflops:g} TFLOP/s (--tflops), {machine.pcie_gbs:g} GB/s over the bus (--pcie_gbs); with a "
        f"threshold {sampled.tokens_per_pass:g} tokens a pass (--tokens_per_pass);",
        f"  prompts of {sampled.prompt_tokens} tokens (--prompt_tokens), the longest of {sampled.longest_prompt} "
        "(--longest_prompt)",
        *way_lines(shape, sample, ds, machine, sampled),
        verdict,
    ]
    return found, fits


def duration(seconds):
    """0.70 h; 5.3 min; 12 s"""
    if seconds >= 360:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{max(1, seconds):.0f} s"


def remedy(model_config, sample, machine, sampled):
    """The first change that makes a plan fit, in words; "" if none of them does."""
    bits, streamed = {"load_in_4bit": True, "deepspeed": None}, {"load_in_4bit": False, "deepspeed": STREAMING}
    for change in ({}, bits, streamed):
        one = replace(sample, batch_size="auto", **change)
        ds = deepspeed_config.read_ds_config(one.deepspeed and ROOT / one.deepspeed)
        made = sampling_plan(sampled_shape(model_config, one), one, ds, machine, sampled.work(one))
        if judged(made.items, machine)[0]:
            changed = {name: getattr(one, name) for name in CHANGED if getattr(one, name) != getattr(sample, name)}
            flags = [f"--{name} {'true' if value is True else value}" for name, value in changed.items() if value]
            without = [f"without --{name}" for name, value in changed.items() if not value]
            return ", ".join([" ".join(flags), *without])
    return ""


def ways(shape, sample):
    """{flags: SampleArguments}: the sampler's exact way and its approximations."""
    threshold = sample.threshold or THRESHOLD
    caches = ["none"] if shape.blocks or sample.cfg_scale else ["none", "prefix", "dual"]
    found = {}
    for cache in caches:
        for sure in (None, threshold):
            one = replace(sample, cache=cache, threshold=sure, steps=sample.gen_length if sure is None else None)
            if cache == "none":
                one.refresh = None
            flags = [f"--cache {cache}"] * (cache != "none") + [f"--threshold {sure}"] * (sure is not None)
            found[" ".join(flags) or "neither cache nor threshold"] = one
    return found


def way_lines(shape, sample, ds, machine, sampled):
    """A table: the same problems sampled in other ways."""
    found = [f"{'the same in other ways, for one model':40}{'rows':>6}{'passes':>8}{'tokens read':>13}{'hours':>8}"]
    for flags, one in ways(shape, sample).items():
        made = sampling_plan(shape, one, ds, machine, sampled.work(one))
        fits, _ = judged(made.items, machine)
        hours = f"{made.seconds / 3600:8.2f}" if fits else "  does not fit"
        found.append(f"  {flags:38}{made.rows:6}{made.passes:8}{made.tokens:13,}{hours}")
    return found
