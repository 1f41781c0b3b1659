"""The arguments of plan.py that no other command has."""

import math
from dataclasses import dataclass
from typing import Literal, Optional

from cli.parser import arg
from files import InputError

PURPOSES = ("train", "evaluate", "make_prefs")
ITEMS = {"gsm8k": 1319, "math500": 500}  # of benchmarks that are evaluated whole
PROMPT_TOKENS, LONGER = 99, 127  # GSM8K's test set in a chat template, by Dream's tokenizer: mean, longest minus mean


@dataclass
class MachineArguments:
    purpose: Literal[PURPOSES] = arg(
        "train",
        "what is planned: a run of train_dpo.py, or with the flags of that command an evaluation, or sampled "
        "preferences; with one of these, --help lists their flags",
        "--for",
        heading="What is planned",
    )
    gpu_gib: float = arg(
        0, "the card's memory in GiB; 0: this machine's card, or 16 where there is none", heading="Machine"
    )
    host_gib: float = arg(0, "the host's memory in GiB; 0: this machine's, or what a container or job may use of it")
    tflops: float = arg(
        49,
        "what the card does, 1e12 operations a second; 49 is half of an RTX 4080's peak of 97.5 in "
        "bf16 with float32 sums (NVIDIA Ada GPU Architecture, appendix A), a planning number",
    )
    pcie_gbs: float = arg(25, "the bus's rate in 1e9 bytes a second; 25 is about what PCIe 4.0 x16 gives of 31.5")
    ssd_gbs: float = arg(
        2,
        "the SSD's rate in 1e9 bytes a second, reads and writes together, for optimizer states on it; 2 is a planning "
        "number: consumer drives write 1 to 2 when their cache is full",
    )
    ranks: int = arg(1, "cards, all in this host")


@dataclass
class PlanArguments:
    prompt_tokens: int = arg(0, "tokens of every prompt", heading="Rows")
    response_tokens: int = arg(
        0, "tokens of every response; 0: so many that a prompt and its response have --max_length"
    )
    pairs: int = arg(
        0, "also plan the hours of reference scores and of training for so many pairs (sft: rows); 0: none"
    )


@dataclass
class SamplingPlanArguments:
    problems: Optional[int] = arg(
        None,
        "problems to plan for; default: as many as the command has: --limit for each of --tasks, all of gsm8k, math500 "
        "and --in, 200 of an embedded task, or --num of --task",
        heading="Rows",
    )
    prompt_tokens: Optional[int] = arg(
        None,
        f"tokens of a prompt on average; default: {PROMPT_TOKENS}, of GSM8K's test set in a chat template by Dream's "
        "tokenizer, and about 1400 more for the four examples of --protocol llada and llada-1.5",
    )
    longest_prompt: Optional[int] = arg(
        None, f"tokens of the longest prompt, for which memory is planned; default: {LONGER} more than --prompt_tokens"
    )
    response_tokens: int = arg(0, "tokens of a response before it ends; 0: --gen_length")
    tokens_per_pass: float = arg(
        2.5,
        "tokens that a pass commits with --threshold; 2.5 is by how much a threshold of 0.9 alone sped up LLaDA-8B on "
        "GSM8K at 256 tokens (Fast-dLLM, arXiv 2505.22618, table 1)",
    )
    changed: float = arg(0.15, "evaluate: share of the items that change sides between two models")


def check_machine(args):
    """Refuse numbers of a machine that have no meaning."""
    wanted = {"ranks": "1 or more", "gpu_gib": "0 or more", "host_gib": "0 or more"}
    for name, least in (
        ("gpu_gib", 0),
        ("host_gib", 0),
        ("tflops", 1e-9),
        ("pcie_gbs", 1e-9),
        ("ssd_gbs", 1e-9),
        ("ranks", 1),
    ):
        if not least <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected {wanted.get(name, 'more than 0')}")


def items(tasks, limit, known):
    """Problems of an evaluation of `tasks`, at most `limit` of each; None if a task's number is not known.

    known: {task: its problems}, besides ITEMS.
    """
    counts = [(ITEMS | known).get(task, limit) for task in tasks]
    if None in counts:
        return None
    return sum(counts if limit is None else [min(count, limit) for count in counts])


def check_sampled(args, gen_length, example_tokens=0):
    """Fill in the lengths of SamplingPlanArguments; refuse numbers that have no meaning.

    example_tokens: of what a protocol puts before each question.
    """
    if args.problems is None:
        raise InputError("--for: give the number of problems, such as --problems 1319 for GSM8K's test set")
    if args.prompt_tokens is None:
        args.prompt_tokens = PROMPT_TOKENS + example_tokens
    if args.longest_prompt is None:
        args.longest_prompt = args.prompt_tokens + LONGER
    args.response_tokens = args.response_tokens or gen_length
    for name, least in (
        ("problems", 1),
        ("prompt_tokens", 0),
        ("longest_prompt", 0),
        ("response_tokens", 1),
        ("tokens_per_pass", 1),
    ):
        if not least <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected {least} or more")
    if args.response_tokens > gen_length:
        raise InputError(f"--response_tokens is {args.response_tokens}, expected at most --gen_length {gen_length}")
    if not 0 < args.changed <= 1:
        raise InputError(f"--changed is {args.changed}, expected a share of the items, above 0 and up to 1")
