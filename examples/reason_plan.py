"""What reason.py does in a night, and how many hours each stage takes: problems, samples, pairs, rows, held-out items.

start_of(args) -> Start        the model, and the flags by which it is trained and sampled
Planner(args, start, found).fitted() -> Numbers          as many problems as --hours has room for
Planner.hours(numbers) -> {stage: hours}                 by the formulas of plan.py, from config.json alone
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import config
import plan
from cli.parser import names
from files import InputError
from models import architecture, families, folders
from reasoning import arguments, planning, tasks
from training import deepspeed_config, plan_table, sampling_costs
from training.costs import Lengths
from training.plan_arguments import MachineArguments, SamplingPlanArguments
from training.sampling_memory import sampled_shape

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"dpo": {"dpo": 1}, "rft": {"rft-1": 1, "rft-3": 3}}  # {method: {run: epochs}}: what validation chooses from
PER_PROBLEM = 2  # pairs, and rows, for each problem that is sampled, at most: so the hours hold
HELD_OUT = 0.125  # of the prompts of pairs and rows, scored while training
LEAST = 32  # problems of a round
ITEMS = 300  # of validation
BATCH = 16  # pairs, or rows, of a step
SAMPLER = ("steps", "threshold", "cache")  # arguments that win over what is chosen here
WAYS = (  # of training a model that has no preset, the first that fits is taken: ds_config, flags
    ("zero2_offload_4080", ["--learning_rate", "1e-6"]),
    ("zero0", ["--learning_rate", "5e-6", "--lora_r", "16"]),
    ("zero0", ["--learning_rate", "5e-6", "--lora_r", "16", "--load_in_4bit", "true"]),
)


class Lines(NamedTuple):
    """How long prompts and responses are, in tokens. Planning numbers, but for gen_length."""

    gen_length: int
    block_length: int  # of a bidirectional model
    prompt: int  # on average
    longest_prompt: int
    response: int  # of a pair


TASKS = {
    "gsm8k": Lines(256, 32, 99, 226, 201),
    "math": Lines(512, 32, 110, 800, 400),
    "countdown": Lines(256, 32, 240, 260, 256),
    "sudoku": Lines(256, 32, 320, 340, 256),
}
OTHERS = TASKS["gsm8k"]
EMBEDDED = Lines(40, 8, 64, 110, 24)  # tasks.EMBEDDED, for examples/tiny
TINY = "configs/tiny.yaml"
TINY_FLAGS = ["--learning_rate", "1e-4", "--gradient_accumulation_steps", "16", "--tokens_per_forward", "4096"]
TINY_NUMBERS = {"problems": 200, "validation": 150, "test": 300}


class Start(NamedTuple):
    """The model that the loop begins with, and how it is trained and sampled."""

    model: str
    preset: str | None  # a file of configs/
    flags: list  # of launch.sh, beside the preset
    ds_config: str

    @property
    def embedded(self):
        return self.preset is not None and Path(self.preset) == here(TINY)

    def training(self, *flags):
        """Flags of a run that say nothing of its files, with further ones, which win."""
        given = dict(pairs_of(self.flags)) | dict(pairs_of(flags))
        chosen = ["--config_file", str(self.preset)] if self.preset else []
        return [*chosen, *(word for pair in given.items() for word in pair)]

    def arguments(self, *flags):
        """config.Arguments of a run with further flags, which win."""
        files = ["--model_name_or_path", plan.config_folder(self.model), "--deepspeed", self.ds_config]
        return config.Arguments(*config.parse([*self.training(*flags), *files], "", *config.GROUPS))


def pairs_of(flags):
    return zip(flags[::2], flags[1::2])


def here(path):
    """A file of this repository, as it is named from the current folder."""
    return Path(os.path.relpath(ROOT / path))


def start_of(args, machine):
    """The Start of ReasonArguments: a preset's, else the first of WAYS that fits the Machine."""
    name = args.start
    preset = here(f"configs/{name}.yaml") if "/" not in name else None
    if name.endswith(".yaml"):
        preset = Path(name)
    if name.rstrip("/").endswith("examples/tiny"):
        preset = here(TINY)
    if preset is None or not preset.is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        if "/" not in name and not os.path.isdir(name):
            raise InputError(f"{name}: neither a preset nor a folder; give a folder, a Hub name or one of {known}")
        return first_way(args.model_name_or_path or name, machine)
    given = config.Arguments(*config.parse(["--config_file", str(preset)], "", *config.GROUPS)).model
    model = args.model_name_or_path or given.model_name_or_path
    if not os.path.isdir(model) and (ROOT / model).is_dir():
        model = str(here(model))
    if preset == here(TINY):
        return Start(model, str(preset), TINY_FLAGS, str(here("ds_configs/zero0.json")))
    return Start(model, str(preset), [], str(here(given.deepspeed or "ds_configs/zero0.json")))


def first_way(model, machine):
    """The Start of a model without a preset."""
    model_config = architecture.load_config(plan.config_folder(model))
    for ds_config, flags in WAYS:
        shared = ["--gradient_accumulation_steps", str(BATCH), "--save_steps", "10"]
        start = Start(model, None, [*flags, *shared], str(here(f"ds_configs/{ds_config}.json")))
        ds = deepspeed_config.read_ds_config(start.ds_config)
        made = plan.plan(model_config, *start.arguments(), ds, machine, advise=False)
        if made.fits:
            return start
    raise InputError(f"{model}: no way of training it fits this machine; python plan.py says what it needs")


class Numbers(NamedTuple):
    """What is fixed when the loop begins."""

    problems: int  # of a round, from the training split
    k: int  # responses to each
    validation: int  # problems of the training split that are never sampled
    test: int

    @property
    def most_rows(self):
        """Pairs, and rows of right responses, of a round at most."""
        return PER_PROBLEM * self.problems

    def steps(self, epochs):
        return math.ceil(epochs * (self.most_rows - math.ceil(HELD_OUT * self.most_rows)) / BATCH)


class Planner:
    """Hours and memory of every stage, on a Machine."""

    def __init__(self, args, start, available, machine_args, prompt_tokens=None):
        """args: ReasonArguments. available: (problems of the training split, test items).

        prompt_tokens: (on average, of the longest prompt) of a file; None: those of TASKS.
        """
        self.args, self.start = args, start
        self.machine, self.lines = plan.machine_of(machine_args), TASKS.get(args.task, OTHERS)
        if args.task in tasks.EMBEDDED:
            self.lines = EMBEDDED
        if prompt_tokens:
            mean, longest = prompt_tokens
            self.lines = self.lines._replace(prompt=mean, longest_prompt=longest)
        if args.gen_length:
            self.lines = self.lines._replace(
                gen_length=args.gen_length, response=min(self.lines.response, args.gen_length)
            )
        if args.block_length:
            self.lines = self.lines._replace(block_length=args.block_length)
        machine_flags = config.flags(names(MachineArguments) - {"purpose"}, machine_args)
        self.machine_flags = machine_flags.split()
        self.in_training, self.in_test = available
        self.folder = plan.config_folder(start.model)
        self.config = architecture.load_config(self.folder)
        given = start.arguments().model
        self.blocks = families.blocks(folders.plain_config(self.folder), given.block_size, given.shift_logits)
        self.samples = {sampled: self.sample(sampled) for sampled in (False, True)}  # config.SampleArguments
        self.shape = sampled_shape(self.config, self.samples[False])
        self.made = {run: self.plan_run(run) for method in self.methods for run in RUNS[method]}

    @property
    def methods(self):
        return list(RUNS) if self.args.method == "both" else [self.args.method]

    # --- flags ---

    def model_flags(self):
        """Flags of make_prefs.py and evaluate.py that describe the model."""
        model, found = self.start.arguments().model, []
        for name in ("use_mixed_precision", "load_in_4bit", "block_size", "shift_logits"):
            value = getattr(model, name)
            if value != getattr(config.SampleArguments(), name):
                found += [f"--{name}", str(value).lower()]
        if deepspeed_config.read_ds_config(self.start.ds_config)["zero_optimization"]["stage"] == 3:
            found += ["--deepspeed", self.start.ds_config]
        return found

    def sampler_flags(self, sampled=False):
        """Flags of the sampler. sampled: for responses at temperature 1, of which pairs are made."""
        found = {"gen_length": self.lines.gen_length}
        if self.blocks is None or self.args.block_length:
            found["block_length"] = self.lines.block_length
        if self.start.embedded:
            # Token by token for pairs: blocks, where the most confident tokens come first, decide the rest.
            found |= {"block_length": 1 if sampled else self.lines.block_length, "batch_size": 64}
        elif self.blocks is None:
            found["cache"] = "dual"
        if not self.start.embedded and not self.args.steps:
            found["threshold"] = 0.9
        found |= {name: value for name in SAMPLER if (value := getattr(self.args, name)) is not None}
        if sampled:
            found["temperature"] = 1
        return [word for name, value in found.items() for word in (f"--{name}", str(value))]

    def run_flags(self, run, numbers):
        """Flags of a run that say nothing of its files."""
        epochs = {name: each for runs in RUNS.values() for name, each in runs.items()}[run]
        steps = str(max(1, numbers.steps(epochs) // 4))
        found = ["--num_train_epochs", str(epochs), "--eval_fraction", str(HELD_OUT), "--eval_steps", steps]
        if run.startswith("dpo"):
            return found + ["--save_steps", steps]
        rate = self.args.rft_learning_rate
        rows = BATCH if self.start.embedded else min(BATCH, self.start.arguments().train.per_device_train_batch_size)
        found += ["--save_steps", steps, "--task", "sft", "--loss_type", "sft", "--beta", "0.1", "--sft_weight", "0"]
        found += ["--learning_rate", f"{rate:g}", "--per_device_train_batch_size", str(rows)]
        found += ["--gradient_accumulation_steps", str(BATCH // rows)]
        return found + ([] if self.blocks else ["--sft_pad_to", str(self.lines.gen_length)])

    # --- hours ---

    def sample(self, sampled):
        """SampleArguments, as a plan for a card needs them."""
        flags = ["--model", self.folder, "--device", "cpu", *self.model_flags(), *self.sampler_flags(sampled)]
        [sample] = config.parse(flags, "", config.SampleArguments)
        arguments.check(sample)
        return replace(sample, device="cuda")

    def plan_run(self, run):
        """The plan.Plan of a run."""
        given = self.start.arguments(*self.run_flags(run, Numbers(LEAST, 2, 1, 1)))
        ds = deepspeed_config.read_ds_config(self.start.ds_config)
        lengths = Lengths(self.lines.prompt, self.lines.response)
        return plan.plan(self.config, *given, ds, self.machine, lengths, advise=False)

    def run_hours(self, run, numbers):
        given = self.start.arguments(*self.run_flags(run, numbers))
        found = plan_table.spent(self.made[run], numbers.most_rows, given.train, given.noise.noise_sets)
        return (found.scoring + found.training) / 3600

    def sampling(self, problems, k=1):
        """The SamplingPlan of one model's responses."""
        sample = self.samples[k > 1]
        ds = deepspeed_config.read_ds_config(sample.deepspeed)
        sampled = planning.Sampled(
            problems=problems,
            k=k,
            models=1,
            prompt_tokens=self.lines.prompt,
            longest_prompt=self.lines.longest_prompt,
            response_tokens=self.lines.gen_length,
            tokens_per_pass=SamplingPlanArguments.tokens_per_pass,
        )
        return sampling_costs.sampling_plan(self.shape, sample, ds, self.machine, sampled.work(sample))

    def hours(self, numbers):
        """{stage: hours of one time}."""
        found = {
            "validation": self.sampling(numbers.validation).seconds / 3600,
            "test": self.sampling(numbers.test).seconds / 3600,
            "sample": self.sampling(numbers.problems, numbers.k).seconds / 3600,
        }
        return found | {run: self.run_hours(run, numbers) for run in self.made}

    def times(self):
        """{stage: how often it is done, at most}."""
        rounds, methods = self.args.rounds, len(self.methods)
        found = {"validation": 1 + rounds * len(self.made), "test": 1 + methods}
        found["sample"] = 1 + (rounds - 1) * methods
        if self.merges:  # the round's start is measured, too: merging rounds
            found["validation"] += (rounds - 1) * methods
        return found | dict.fromkeys(self.made, rounds)

    @property
    def merges(self):
        """Whether a round's start is an adapter merged into its base."""
        return self.start.arguments().model.lora_r > 0

    def total(self, numbers):
        times = self.times()
        return sum(times[stage] * hours for stage, hours in self.hours(numbers).items())

    def disk(self):
        """Bytes, at most: the model, every run's final/ and checkpoints, merged starts."""
        [made, *_] = self.made.values()
        trained, elements = sum(made.shape.trained), made.shape.elements
        weight = 2 if self.start.arguments().model.use_mixed_precision == "bf16" else 4
        saved = trained * weight + 2 * trained * (weight + 12)  # final/, and two checkpoints with float32 masters
        runs = self.args.rounds * len(self.made)
        merged = (self.args.rounds - 1) * len(self.methods) * self.merges
        return elements * weight * (1 + merged) + runs * saved

    # --- numbers ---

    def numbers(self, problems):
        """Numbers of so many problems a round; what --validation, --test and --k say stands."""
        args = self.args
        validation = min(ITEMS, max(50, problems // 2), self.in_training // 3)
        test = min(self.in_test, max(100, 2 * problems))
        if self.start.embedded:
            validation, test = TINY_NUMBERS["validation"], TINY_NUMBERS["test"]
        return Numbers(problems, args.k, args.validation or validation, args.test or test)

    def fitted(self):
        """The Numbers of --problems, or of as many as --hours has room for."""
        args = self.args
        if args.problems or self.start.embedded:
            return self.checked(self.numbers(args.problems or TINY_NUMBERS["problems"]))
        low, high = LEAST, max(LEAST, self.in_training - self.numbers(self.in_training).validation)
        if (least := self.total(self.numbers(low))) > args.hours:
            raise InputError(
                f"--hours {args.hours:g}: {low} problems, the fewest, take {least:.2g} h as planned; give more hours, "
                "fewer --rounds or one --method"
            )
        while low < high:
            middle = (low + high + 1) // 2
            if self.total(self.numbers(middle)) <= args.hours:
                low = middle
            else:
                high = middle - 1
        return self.checked(self.numbers(low))

    def checked(self, numbers):
        for name, wanted, there in (
            ("problems and --validation", numbers.problems + numbers.validation, self.in_training),
            ("test", numbers.test, self.in_test),
        ):
            if wanted > there:
                raise InputError(f"--{name}: {wanted} are asked for, and {self.args.task} has {there}; give fewer")
        return numbers
