"""Accuracy on reasoning tasks, of one model or several on the same items, without items that a model was trained on.

    model(s) -> OUTPUT_DIR/MODEL-TASK.jsonl (each item's prompt, response, answer, verdict), OUTPUT_DIR/results.json
    python evaluate.py --model examples/tiny --tasks arithmetic,ordering --limit 20 --gen_length 40 --block_length 1

Tasks: the families of reasoning/tasks.py, on held-out problems; the benchmarks of reasoning/benchmarks.py, from the Hub
or from files in --data_dir; your own problems, --in; lm_eval:NAME, a task of lm-evaluation-harness, which asks by its
own rules (reasoning/harness.py). `python evaluate.py lm_eval` is that package's own command line with our models.
One reader, reasoning/answers.py, grades them all, and what make_prefs.py samples: a response without a readable answer
is not solved, and is counted apart.
Models are compared by McNemar's exact test on the items that only one of two answers rightly (reasoning/comparison.py).
--k 8 --temperature 1 samples several responses per item: pass@k and majority@k, with intervals.
--protocol llada asks GSM8K as LLaDA's paper does, so that its figure can be compared (reasoning/protocols.py).

Responses are kept in OUTPUT_DIR/samples as they come: the same command resumes; a larger --limit or --k adds to them.
A line of MODEL-TASK.jsonl has all that a judge needs, and `make_prefs.py --strategy label --in` reads it.
"""

import functools
import re
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import List, Literal, Optional

import config
from cli import exits
from cli.parser import arg
from files import InputError
from reasoning import arguments, benchmarks, protocols, tasks

OURS = [*dict.fromkeys([*benchmarks.BENCHMARKS, *tasks.FAMILIES])]
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness
EMBEDDED = 200  # problems of an embedded task when no --limit is given


@dataclass
class EvaluateArguments:
    tasks: Optional[str] = arg(
        None,
        f"one or more, with commas: {', '.join(OURS)}, or {HARNESS}NAME, a task of lm-evaluation-harness; default: "
        "arithmetic, or the problems of --in alone",
        metavar="NAME,...",
        heading="Tasks and models",
    )
    source: Optional[List[str]] = arg(
        None,
        "files of problems of your own, a prompt (or question) and its answer a row; each is a task",
        "--in",
        metavar="FILE",
    )
    columns: Optional[str] = arg(
        None, "--in: names of its columns, such as prompt=q,answer=gold", metavar="NAME=COLUMN,..."
    )
    ignore_columns: Optional[str] = arg(None, f"--in: {config.IGNORE_COLUMNS}", metavar="COLUMN,...")
    limit: Optional[int] = arg(
        None, f"number of items of each task, the first ones; default: all, or {EMBEDDED} of an embedded task"
    )
    data_dir: Optional[str] = arg(
        None,
        "folder with the benchmarks' files in their original formats; default: download them from the Hub, or draw "
        "held-out problems (countdown, sudoku)",
        metavar="FOLDER",
    )
    protocol: Optional[Literal["llada", "llada-1.5", "d1"]] = arg(
        None,
        "prompts and sampler settings by which a paper reports gsm8k and math500: of LLaDA, LLaDA 1.5 (VRPO) or d1, "
        "which has countdown and sudoku, too; flags that you give win over its settings",
        metavar="NAME",
    )
    k: int = arg(1, "responses per item; more than 1 give pass@k and majority@k, and need --temperature")
    num_fewshot: Optional[int] = arg(None, "lm_eval's tasks: examples in the prompt; default: the task's own number")
    compare: Optional[List[str]] = arg(
        None, "models to compare with --model on the same items: folders or Hub names", metavar="MODEL"
    )
    output_dir: str = arg("runs/evaluate", "folder for the responses and results.json", metavar="FOLDER")
    train_data: Optional[List[str]] = arg(
        None, "packed folders that the models were trained on, besides those that their runs name", metavar="FOLDER"
    )
    allow_leak: bool = arg(False, "also score items that a model was trained on")


def parse(argv, below=()):
    """[EvaluateArguments, SampleArguments, LikelihoodArguments]; below: flags over which those of argv win."""
    used = EvaluateArguments, config.SampleArguments, config.LikelihoodArguments
    return config.parse(argv, __doc__, *used, below=below)


def read_arguments(argv=None):
    """[EvaluateArguments, SampleArguments, LikelihoodArguments], checked as far as nothing needs to be loaded."""
    groups = parse(argv)
    args, sample, _ = groups
    arguments.check_values(replace(sample))  # a copy: lm_eval's tasks may ask for other lengths than are given
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1")
    check_tasks(args)
    check_samples(args, sample)
    if (args.columns or args.ignore_columns) and not args.source:
        raise InputError("--columns and --ignore_columns name columns of a file of problems: give --in FILE")
    return groups


def check_tasks(args):
    """Refuse names of tasks that do not exist, or of which the protocol says nothing."""
    for name in task_names(args):
        if not name.startswith(HARNESS) and name not in OURS:
            raise InputError(
                f"--tasks: no task '{name}'; there are {', '.join(OURS)}, and {HARNESS}NAME for those of "
                "lm-evaluation-harness"
            )
    for name in [*task_names(args), *own_files(args)]:
        protocols.setting(args.protocol, name)


def check_samples(args, sample):
    """Refuse a number of responses per item that has no meaning."""
    if args.k < 1:
        raise InputError(f"--k is {args.k}; expected at least 1")
    if args.k > 1 and sample.temperature == 0:
        raise InputError(f"--temperature 0 gives the same response {args.k} times; add --temperature 1")
    if args.k > 1 and any(name.startswith(HARNESS) for name in task_names(args)):
        raise InputError(f"--k {args.k}: tasks of lm-evaluation-harness are asked once; leave --k or them out")


def sampling_of(argv, setting):
    """SampleArguments as given, over those of a protocol's Setting, which may be None. Unchecked."""
    _, sample, _ = parse(argv, protocols.flags(setting) if setting else ())
    if setting:
        protocols.fill_in(sample, setting)
    return sample


def task_names(args):
    """The names of --tasks, in its order."""
    text = args.tasks or ("" if args.source else "arithmetic")
    return [name.strip() for name in text.split(",")] if text else []


def own_files(args):
    """{name of the task: path} of --in: a file's name without its ending."""
    found = {}
    for path in args.source or []:
        name = Path(path).stem
        if name in found or name in task_names(args):
            raise InputError(f"--in {path}: there is another task {name}; rename the file")
        found[name] = path
    return found


if __name__ == "__main__" and sys.argv[1:2] != ["lm_eval"]:
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import jsonlines

import score
from files import fingerprint, not_writable, read_json, replacing, write_json
from models import folders, tokenization
from preferences import columns
from reasoning import answers, comparison, harness, leaks, problems, prompts, responses, samples, table

# --- tasks ------------------------------------------------------------------------------------------------


def load_tasks(args):
    """{name: lm_eval's Task, or None for ours}: --tasks in its order, lm_eval's groups taken apart, then --in."""
    found = {}
    for name in task_names(args):
        if name.startswith(HARNESS):
            theirs = harness.load_tasks([name.removeprefix(HARNESS)])
            found |= {HARNESS + each: task for each, task in theirs.items()}
        else:
            found[name] = None
    if "math500" in found:
        answers.import_math_verify()  # which may not be installed
    return found | dict.fromkeys(own_files(args))


def find_task(name, theirs, setting, args, argv):
    """The responses.Task of a name. theirs: lm_eval's Task, or None; setting: the protocols.Setting, or None."""
    sample = sampling_of(argv, setting)
    return responses.Task(name, theirs, setting, sample, read_items(name, theirs, setting, args, sample.seed))


def read_items(name, theirs, setting, args, seed):
    """The first --limit Items of a task; an embedded one's are drawn by `seed`. theirs, setting: find_task()'s."""
    if theirs:
        questions = harness.questions(theirs)[: args.limit]
        return [benchmarks.Item(str(number), text, text, "", "") for number, text in enumerate(questions, 1)]
    if path := own_files(args).get(name):
        return [
            benchmarks.Item(str(number), own.text, own.prompt, own.answer, own.kind)
            for number, own in enumerate(read_own(path, args)[: args.limit], 1)
        ]
    if name in benchmarks.BENCHMARKS and (args.data_dir or name not in tasks.FAMILIES):
        prompt = setting.prompts(args.data_dir) if setting and setting.prompts else None
        return benchmarks.read(name, args.data_dir, prompt)[: args.limit]
    drawn = tasks.generate(args.limit or EMBEDDED, "test", seed, (name,))
    return [
        benchmarks.Item(str(number), problem.prompt, problem.prompt, problem.answer, answers.gold(problem.answer).kind)
        for number, problem in enumerate(drawn, 1)
    ]


def read_own(path, args):
    """[problems.Own] of a file of --in."""
    given = columns.parse_columns(args.columns, problems.ROLES)
    return problems.read(path, given, columns.parse_names(args.ignore_columns))


def check_models(models, found):
    """Refuse a model that cannot be asked as the tasks are, before any model has answered."""
    for model in models:
        for task in found:
            sample = responses.sampling(task, model)
            if task.items and not task.theirs:
                tokenizer = tokenization.load_tokenizer(model, sample.trust_remote_code)
                prompts.prompt_ids(tokenizer, responses.asked(task, task.items[0]), model, sample.template)


# --- the answers of one model -----------------------------------------------------------------------------


class LanguageModel(harness.MaskedDiffusion):
    """A model as lm_eval asks it, its likelihoods the stepwise denoising score."""

    diffusion_score = staticmethod(score.diffusion_score)


class Answers:
    """The responses of one model and what they are worth; it is loaded when the first one is missing in `folder`."""

    def __init__(self, given, likelihood, model_fingerprint, label, folder):
        """given: SampleArguments that name the model, before arguments.check(), as a task may ask for other lengths."""
        self.given, self.likelihood, self.fingerprint = given, likelihood, model_fingerprint
        self.label, self.folder = label, folder

    @functools.cached_property
    def model(self):
        return LanguageModel(self.given, self.likelihood)

    def load(self):
        return self.model.model, self.model.tokenizer

    def rows(self, task, args):
        """The rows of a task, of lm_eval or of ours."""
        if task.theirs and task.items:
            return self.to_theirs(task, args.num_fewshot)
        return self.to(task, args.k)

    def to(self, task, k):
        """k rows per item of a task of ours: what the model was asked, what it said, and what that is worth."""
        sample = responses.sampling(task, self.given.model_name_or_path)
        header = samples.header(sample, self.fingerprint) | responses.opening(task)
        path = self.folder / f"{file_name(task.name)}-{fingerprint(header)}.jsonl"
        wanted = {int(item.id) - 1: responses.asked(task, item) for item in task.items}
        made = samples.complete(path, header, wanted, sample, self.load, k=k, desc=f"{self.label}, {task.name}")
        model = sample.model_name_or_path
        return [
            row for item, lines in zip(task.items, made.values()) for row in responses.judged(task, item, lines, model)
        ]

    def to_theirs(self, task, num_fewshot):
        """One row per item of a task of lm_eval, which asks, reads and grades by its own rules."""
        header = samples.header(responses.sampling(task, self.given.model_name_or_path), self.fingerprint)
        cache = self.folder / f"{file_name(task.name)}-{fingerprint(header, asdict(self.likelihood))}"
        chat = tokenization.uses_chat(self.model.tokenizer, self.given.template)
        places = [int(item.id) - 1 for item in task.items]
        name = task.name.removeprefix(HARNESS)
        rows = harness.run_task(name, task.theirs, self.model, places, chat, num_fewshot, cache)
        about = [{"task": task.name, "id": item.id, "model": self.given.model_name_or_path} for item in task.items]
        return [each | row for each, row in zip(about, rows, strict=True)]


def file_name(task):
    """A task's name in file names."""
    return re.sub(r"[^\w.-]", "-", task)


# --- the folder of the results ----------------------------------------------------------------------------


def make_folder(path):
    """Make the folder of the samples; refuse one that cannot be written to, before any work."""
    if why := not_writable(path, path, make=True):
        raise InputError(f"--output_dir {path.parent}: cannot be written to ({why})")


def remove_earlier(folder):
    """Remove the responses of an earlier command, which would be taken for this one's; samples/ keeps them."""
    if (folder / "results.json").is_file():
        for name in read_json(folder / "results.json", "this command").get("files", []):
            if isinstance(name, str) and Path(name).name == name and name.endswith(".jsonl"):
                (folder / name).unlink(missing_ok=True)


def main(argv=None):
    if argv is None and sys.argv[1:2] == ["lm_eval"]:
        return harness.main(LanguageModel, harness.__doc__, sys.argv[2:])
    # 1. Find every model, task and item, before any work.
    args, given, likelihood = read_arguments(argv)
    theirs = load_tasks(args)
    settings = {name: protocols.setting(args.protocol, name) for name in theirs}
    given = sampling_of(argv, next(iter(settings.values())))
    sample = replace(given)
    arguments.check(sample)
    folder = Path(args.output_dir)
    models = [sample.model_name_or_path, *(args.compare or [])]
    fingerprints = {model: folders.model_fingerprint(model) for model in models}
    names = comparison.labels(models)
    found = [find_task(name, theirs[name], settings[name], args, argv) for name in theirs]

    # 2. Leave out what the models were trained on.
    check = leaks.Check(tuple(args.train_data or ()), args.allow_leak, sample.trust_remote_code)
    seen = leaks.find_seen({task.name: task.items for task in found}, models, check)
    if not args.allow_leak:
        found = [task._replace(items=[item for item in task.items if item.id not in seen[task.name]]) for task in found]
    check_models(models, found)

    # 3. Let the models answer, one in memory at a time.
    make_folder(folder / "samples")
    remove_earlier(folder)
    lines, paths, first = [], [], {}
    for model in models:
        one = replace(given, model_name_or_path=model)
        model_answers = Answers(one, likelihood, fingerprints[model], names[model], folder / "samples")
        for task in found:
            rows = model_answers.rows(task, args)
            paths.append(folder / f"{names[model]}-{file_name(task.name)}.jsonl")
            with replacing(paths[-1]) as file:
                jsonlines.Writer(file).write_all(row | {"seen": row["id"] in seen[task.name]} for row in rows)
            line = comparison.summary(task.name, names[model], rows, first.get(task.name))
            lines.append(line | responses.about(task, model) | {"protocol": args.protocol, "file": paths[-1].name})
            first.setdefault(task.name, rows)

    # 4. Compare them.
    order = [task.name for task in found]
    lines.sort(key=lambda line: order.index(line["task"]))  # stable: the models stay in their order
    results = {
        "models": {names[model]: {"path": model, "fingerprint": fingerprints[model]} for model in models},
        "table": lines,
        "files": [path.name for path in paths],
        "seen": seen,
        "arguments": asdict(sample) | asdict(likelihood) | asdict(args),
    }
    write_json(folder / "results.json", results)
    table.print_table(lines)
    print_next(folder, models)
    return 0


def print_next(folder, models):
    """Say where the results are, and which report shows them."""
    print(f"{folder}: every response, and results.json")
    runs = [Path(model).parent for model in models if (Path(model).parent / "run.json").is_file()]
    if runs:
        print(f"next: python report.py {shlex.quote(str(runs[0]))} --evaluation {shlex.quote(str(folder))}")


if __name__ == "__main__":
    exits.run(main)
