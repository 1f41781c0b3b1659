"""The loop of reason.sh: measure, sample, verify, pair, train by DPO and by RFT, choose by validation, measure again.

    MODEL_OR_PRESET -> OUT/plan.json, problems/, round-1/, ..., validation/, test/, stages.jsonl, results.json, report/
    bash examples/reason.sh examples/tiny --task arithmetic
    bash examples/reason.sh llada_8b_qlora_4080 --task gsm8k --hours 10 --dry_run

Every stage is a command of this repository, which is printed, and resumes by its own means. The plan is fixed at the
first start. --method dpo trains on right against wrong responses, rft by SFT on the right ones, both on the same
samples; each goes on from its own model in the next round, which is that round's reference, too. A method ends when no
checkpoint of a round solves more of the validation problems than the round's start. No stage but the two called "test"
reads a test item.
"""

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
from cli import exits
from cli.parser import arg
from files import InputError, read_json, wait_for, write_json
from training.plan_arguments import MachineArguments, check_machine

RFT_RATE = 1e-5  # of d1's SFT with LoRA (arXiv 2504.12216); not tuned here
EMBEDDED_RFT_RATE = 3e-4  # for examples/tiny


@dataclass
class ReasonArguments:
    task: Optional[str] = arg(
        None,
        "gsm8k, math, countdown, sudoku, a family of examples/tiny such as arithmetic, or a file of problems with "
        "their answers; default: gsm8k, or arithmetic for examples/tiny",
        metavar="NAME|FILE",
        heading="The loop",
    )
    hours: float = arg(10.0, "take as many problems as this time has room for, by the plan")
    rounds: int = arg(1, "rounds of sampling and training, each from the model that the one before chose")
    method: Literal["dpo", "rft", "both"] = arg("both", "how to train")
    dry_run: bool = arg(False, "print the plan alone")
    out: Optional[str] = arg(None, "folder of everything; default: runs/reason-MODEL-TASK", metavar="FOLDER")
    model_name_or_path: Optional[str] = arg(
        None, "folder or Hub name, in the place of the preset's", "--model", metavar="MODEL"
    )
    data_dir: Optional[str] = arg(
        None, "folder of the benchmark's files, such as gsm8k/train.jsonl; default: the Hub", metavar="FOLDER"
    )
    test_file: Optional[str] = arg(
        None, "--task FILE: a file of the test items; default: a quarter of FILE", metavar="FILE"
    )
    problems: Optional[int] = arg(None, "problems to sample in a round; default: by --hours", heading="Numbers")
    k: int = arg(8, "responses to each")
    validation: Optional[int] = arg(None, "problems of the training split that choose the checkpoint")
    test: Optional[int] = arg(None, "test items")
    seed: int = arg(1, "seed of problems, noise and order")
    rft_learning_rate: Optional[float] = arg(
        None,
        f"learning rate of --method rft; that of dpo is the preset's; default: {RFT_RATE}, or {EMBEDDED_RFT_RATE} for "
        "examples/tiny",
        heading="Training and sampling",
    )
    gen_length: Optional[int] = arg(
        None, "tokens of a response, at most; default: the task's, as all that follow (evaluate.py explains them)"
    )
    block_length: Optional[int] = arg(None, "tokens in a block")
    steps: Optional[int] = arg(None, "forward passes per response, in the place of --threshold 0.9")
    threshold: Optional[float] = arg(None, "probability at which a pass commits a prediction")
    cache: Optional[Literal["none", "prefix", "dual"]] = arg(None, "of keys and values, of a bidirectional model")


def read_arguments(argv=None):
    """(ReasonArguments with its `start`, the model or preset, MachineArguments)."""
    words = list(sys.argv[1:] if argv is None else argv)
    start = words.pop(0) if words and not words[0].startswith("-") else None
    args, machine = config.parse(words, __doc__, ReasonArguments, MachineArguments, hide={"purpose"})
    if start is None:
        raise InputError(
            "reason.sh needs a model first: a preset of configs/, a folder or a Hub name; --help says more"
        )
    check_machine(machine)
    if not 0 < args.hours < float("inf"):
        raise InputError(f"--hours is {args.hours}, expected more than 0")
    for name in ("rounds", "problems", "validation", "test", "seed"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1")
    if args.rft_learning_rate is not None and not 0 < args.rft_learning_rate < float("inf"):
        raise InputError(f"--rft_learning_rate is {args.rft_learning_rate}, expected more than 0")
    if args.k < 2:
        raise InputError(f"--k is {args.k}; a pair needs two responses to a prompt, expected at least 2")
    args.start = start
    return args, machine


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import reason_problems
import reason_results
from reason_plan import RUNS, Numbers, Planner, here, start_of

import plan
from reasoning import tasks
from training import cards

FREE = ("out", "dry_run")  # arguments that may differ when the loop is resumed


# --- stages -----------------------------------------------------------------------------------------------


class Stages:
    """Runs commands one after the other; what is done stays done. The folder is locked, also by a command left over."""

    def __init__(self, out, hours):
        self.out, self.hours = out, hours
        self.lock = wait_for(out / ".lock", out)
        self.log = reason_results.StageLog(out / "stages.jsonl")
        self.child, self.stopped = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        """Let the running command save what it has; Ctrl-C has reached it already."""
        self.stopped = True
        if self.child and number != signal.SIGINT:
            self.child.send_signal(signal.SIGTERM)

    def do(self, name, kind, made, *command):
        """Run a command unless it is done. made: the file that it ends with. kind: of stage, in the planned hours."""
        if name in self.log.done and made.exists():
            return
        if self.stopped:
            raise KeyboardInterrupt
        words = [str(word) for word in command]
        planned = f" (planned {self.hours[kind]:.2g} h)" if kind else ""
        print(f"{self.log.number(name)}. {name}{planned}: {shlex.join(shown(words))}", flush=True)
        self.log.began(name, self.hours.get(kind))
        began = time.time()
        self.child = subprocess.Popen(words, pass_fds=(self.lock.fileno(),))
        code = self.child.wait()
        if self.stopped:
            print(f"to resume, run: {exits.command()}", flush=True)
            raise KeyboardInterrupt
        if code or not made.exists():
            raise InputError(
                f"{self.out}: the stage '{name}' ended with exit code {code}; its message is above. Then run: "
                f"{exits.command()}"
            )
        self.log.ended(name, time.time() - began)


def shown(words):
    """A command as a reader would type it."""
    return ["python" if word == sys.executable else word for word in words]


class Loop:
    """The stages of one plan."""

    def __init__(self, args, planner, numbers, out):
        self.args, self.planner, self.numbers, self.out = args, planner, numbers, out
        self.start, self.name = planner.start, reason_problems.name_of(args.task)
        self.stages = Stages(out, planner.hours(numbers))
        self.models = [self.start.model]  # measured on the validation slice, in this order
        self.statistics = {}  # {folder of a round: what there is to say of its pairs}

    def script(self, name):
        return [sys.executable, here(name)]

    # 1. measuring

    def measure(self, name, kind, models, *asked):
        """Responses of models to the same items; earlier ones are kept."""
        first, *others = models
        compare = ["--compare", *others] if others else []
        command = [*self.script("evaluate.py"), "--model", first, *compare, *asked, *self.planner.model_flags()]
        command += [*self.planner.sampler_flags(), "--seed", self.args.seed, "--output_dir", self.out / kind]
        self.stages.do(name, kind, self.out / kind / "results.json", *command)
        lines = reason_results.lines_by_model(self.out / kind)
        if not all(line["n"] for line in lines.values()):
            raise InputError(
                f"{self.out / kind}: the leak check left out every item, as its words are those of training prompts; "
                "give --task problems that differ more"
            )
        return lines

    def validate(self, name):
        """{model: share of the validation problems that it solves}. By construction, none of them is trained on."""
        source = self.out / "problems" / "validation" / f"{self.name}.jsonl"
        lines = self.measure(f"validation of {name}", "validation", self.models, "--in", source, "--allow_leak")
        return {model: lines[model]["accuracy"] for model in self.models}

    def test(self, name, models):
        asked = ["--tasks", reason_problems.BENCHMARKS.get(self.args.task, self.args.task)]
        if self.args.task not in (*reason_problems.TRAINING, *tasks.FAMILIES):
            asked = ["--in", self.out / "problems" / "test" / f"{self.name}.jsonl"]
        elif self.args.data_dir and self.args.task in reason_problems.TRAINING:
            asked += ["--data_dir", self.args.data_dir]
        if trained := sorted(path.parent for path in self.out.glob("round-*/**/*packed/meta.json")):
            asked += ["--train_data", *trained]
        return self.measure(f"test of {name}", "test", models, "--limit", self.numbers.test, *asked)

    # 2. a round

    def sample(self, number, folder, model):
        """Responses of `model` to the round's problems, its pairs and right responses."""
        source = self.out / "problems" / f"round-{number}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        command = [*self.script("make_prefs.py"), "--strategy", "sample", "--model", model, "--in", source]
        command += ["--k", self.numbers.k, "--pairs_per_prompt", reason_problems.PER_PROMPT]
        command += [*self.planner.model_flags(), *self.planner.sampler_flags(sampled=True)]
        command += ["--seed", self.args.seed * 1000 + number, "--out", folder / "prefs.jsonl"]
        self.stages.do(f"samples of {folder.relative_to(self.out)}", "sample", folder / "prefs.jsonl", *command)
        if folder not in self.statistics:
            most = self.numbers.most_rows
            self.statistics[folder] = reason_problems.choose(folder, source, most)

    def train(self, folder, run, model):
        """A run of RUNS; the model that it makes."""
        rows, data = ("pairs", "packed") if run.startswith("dpo") else ("right", "right-packed")
        command = ["bash", here("launch.sh"), self.start.ds_config, "--model_name_or_path", model]
        command += ["--in", folder / f"{rows}.jsonl", "--out", folder / data, "--output_dir", folder / run]
        command += self.start.training(*self.planner.run_flags(run, self.numbers))
        command += ["--seed", self.args.seed, "--noise_seed", self.args.seed]
        final = folder / run / "final"
        self.stages.do(f"training {folder.relative_to(self.out)}/{run}", run, final, *command)
        return str(final)

    def merged(self, model, folder):
        """The start of a later round: an adapter merged into its base, any other model as it is."""
        if not self.planner.merges:
            return model
        precision = self.start.arguments().model.use_mixed_precision
        command = [*self.script("merge.py"), model, folder / "start", "--use_mixed_precision", precision]
        if not (folder / "start").is_dir():  # complete or absent, and merge.py refuses one that is there
            self.stages.do(f"merging {model}", None, folder / "start", *command)
        return str(folder / "start")

    # 3. all of it

    def run(self):
        """Every stage. Returns {method: [what is known of each of its rounds]}."""
        start = self.start.model
        self.validate("the start")
        self.test("the start", [start])
        rounds, chosen = {method: [] for method in self.planner.methods}, {}
        for number in range(1, self.args.rounds + 1):
            for method in self.planner.methods:
                if number == 1 or (len(rounds[method]) == number - 1 and rounds[method][-1]["gained"]):
                    rounds[method].append(self.round(number, method, chosen.get(method, start)))
                    chosen[method] = rounds[method][-1]["chosen"]
        return rounds

    def round(self, number, method, model):
        """A round that begins with `model`, which stands among the candidates."""
        folder, before = self.out / f"round-{number}", model
        if number > 1:
            folder /= method
            model = self.merged(model, folder)
        self.sample(number, folder, model)
        made = [self.train(folder, run, model) for run in RUNS[method]]
        self.models += [each for each in (model, *made) if each not in self.models]
        accuracy = self.validate(f"round {number}, {method}")
        candidates = {each: accuracy[each] for each in (before, model, *made)}  # model may be merged, and rounded
        best = best_of(candidates)
        print(f"round {number}, {method}: chosen {best}, of " + reason_results.shares(candidates), flush=True)
        return {"start": model, "candidates": candidates, "chosen": best, "gained": best in made}


def best_of(candidates):
    """The model that solves most; of several the first, which is the start. candidates: {model: share solved}"""
    return max(candidates, key=candidates.get)


# --- the command ------------------------------------------------------------------------------------------


def planned(args, machine_args):
    """(Planner, folder) of the arguments, whose task and rate of RFT are filled in."""
    start = start_of(args, plan.machine_of(machine_args))
    args.task = args.task or ("arithmetic" if start.embedded else "gsm8k")
    args.rft_learning_rate = args.rft_learning_rate or (EMBEDDED_RFT_RATE if start.embedded else RFT_RATE)
    reason_problems.check_task(args.task, args.test_file)
    name = Path(start.preset).stem if start.preset else Path(start.model).name
    out = Path(args.out or f"runs/reason-{name}-{reason_problems.name_of(args.task)}")
    prompt_tokens = reason_problems.prompt_tokens(args)
    return Planner(args, start, reason_problems.available(args), machine_args, prompt_tokens), out


def asked_of(args):
    """{argument: value} of what must be the same when the loop is resumed. args: of planned()."""
    return {name: value for name, value in asdict(args).items() if name not in FREE} | {"start": args.start}


def kept_numbers(out, asked):
    """The Numbers of the loop that has begun in a folder, None if none has. asked: arguments, which must be its own."""
    if not (out / "plan.json").is_file():
        return None
    kept = read_json(out / "plan.json", "another --out")
    for name, value in asked.items():
        if kept["asked"].get(name) != value:
            raise InputError(
                f"{out}/plan.json: that loop has {name} = {kept['asked'].get(name)}, this one {value}; give this one "
                "another --out, or the same value"
            )
    return Numbers(**kept["numbers"])


def begin(args, planner, numbers, out, asked):
    """The Loop in its folder, which is locked; its problems and its plan are written first."""
    out.mkdir(parents=True, exist_ok=True)
    loop = Loop(args, planner, numbers, out)
    if not kept_numbers(out, asked):
        reason_problems.write(out, args, numbers)
        hours = planner.hours(numbers)
        write_json(out / "plan.json", {"asked": asked, "numbers": numbers._asdict(), "hours": hours})
    return loop


def main(argv=None):
    # 1. The plan
    args, machine_args = read_arguments(argv)
    planner, out = planned(args, machine_args)
    asked = asked_of(args)
    numbers = kept_numbers(out, asked) or planner.fitted()
    lines, fits = reason_results.plan_lines(args, planner, numbers, out)
    print("\n".join(lines), flush=True)
    if args.dry_run or (not fits and cards.usable()):
        return 0 if fits else 1

    # 2. The stages
    loop = begin(args, planner, numbers, out, asked)
    rounds = loop.run()

    # 3. The chosen models on the same test items, and the report
    best = reason_results.by_validation(rounds)
    lines = loop.test("the chosen models", list(dict.fromkeys([*best, loop.start.model])))
    reason_results.write(out, loop, rounds, lines)
    return 0


if __name__ == "__main__":
    exits.run(main)
