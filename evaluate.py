"""Accuracy on reasoning tasks, of one model or of several on the same items; what a run trained on is left out.

    model(s) -> OUTPUT_DIR/MODEL-TASK.jsonl (every item: prompt, response, gold answer, verdict), OUTPUT_DIR/results.json
    python evaluate.py --model examples/tiny --tasks arithmetic,ordering --limit 20 --gen_length 40 --block_length 1

The embedded tasks are tasks.py's families, on held-out problems; the benchmarks are benchmarks.py's, from the hub or from
files in --data_dir. Models are compared by McNemar's exact test (1947) on the items that only one of two answers rightly.
Responses are kept in OUTPUT_DIR/samples as they come: the same command goes on where it was stopped, and a larger --limit
adds to what is there. lm_eval:NAME is a task of lm-evaluation-harness, which asks and grades by its own rules (harness.py).
A line of MODEL-TASK.jsonl has all that a judge needs, and `make_prefs.py --strategy label --in` reads it.
"""

import functools
import math
import os
import re
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import List, Optional

import config
from cli import exits
from cli.parser import arg
from files import InputError
from reasoning import benchmarks, tasks

OURS = [*benchmarks.BENCHMARKS, *tasks.FAMILIES]
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness
EMBEDDED = 200  # problems of an embedded task when no --limit is given
NAMED = 10  # seen items that a message names; results.json names all


@dataclass
class EvaluateArguments:
    tasks: str = arg(
        "arithmetic",
        f"with commas: {', '.join(OURS)}, or {HARNESS}NAME, a task of lm-evaluation-harness",
        metavar="NAME,...",
        heading="Tasks and models",
    )
    limit: Optional[int] = arg(
        None, f"the first so many items of each task; without it all, {EMBEDDED} of an embedded one"
    )
    data_dir: Optional[str] = arg(
        None,
        "folder of the benchmarks' files in their original formats; without it they come from the hub",
        metavar="FOLDER",
    )
    num_fewshot: Optional[int] = arg(None, "lm_eval's tasks: examples in the prompt; without it the task's own number")
    compare: Optional[List[str]] = arg(
        None,
        "models to answer the same items as --model: folders or hub names; without it --model alone answers",
        metavar="MODEL",
    )
    output_dir: str = arg("runs/evaluate", "folder of the responses and results.json", metavar="FOLDER")
    train_data: Optional[List[str]] = arg(
        None, "packed folders that the models trained on, beside those that their runs name", metavar="FOLDER"
    )
    allow_leak: bool = arg(False, "score items that a model trained on, too")


def read_arguments(argv=None):
    """(EvaluateArguments, SampleArguments, LikelihoodArguments), checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, EvaluateArguments, config.SampleArguments, config.LikelihoodArguments)
    args = groups[0]
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1")
    for name in args.tasks.split(","):
        if not name.strip().startswith(HARNESS) and name.strip() not in OURS:
            raise InputError(
                f"--tasks: no task '{name.strip()}'; there are {', '.join(OURS)}, and {HARNESS}NAME for those of "
                "lm-evaluation-harness"
            )
    return groups


if __name__ == "__main__" and sys.argv[1:2] != ["lm_eval"]:
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import jsonlines

import score
from files import fingerprint, read_json, replacing, write_json
from models import folders, tokenization
from preferences.packed import Packed
from reasoning import harness, prompts, sampler, samples
from training import runs

# --- items ------------------------------------------------------------------------------------------------


def task_names(text):
    """{name: lm_eval's Task, or None for ours}: the tasks of --tasks in its order, lm_eval's groups taken apart."""
    found = {}
    for name in (name.strip() for name in text.split(",")):
        if name.startswith(HARNESS):
            found |= {HARNESS + each: task for each, task in harness.load_tasks([name.removeprefix(HARNESS)]).items()}
        else:
            found[name] = None
    return found


def read_items(name, theirs, args, seed):
    """The first --limit Items of a task; an embedded one's are drawn by `seed`. theirs: lm_eval's Task, or None."""
    if theirs:
        return [
            benchmarks.Item(str(number), text, text, "")
            for number, text in enumerate(harness.questions(theirs)[: args.limit], 1)
        ]
    if name in benchmarks.BENCHMARKS:
        return benchmarks.read(name, args.data_dir)[: args.limit]
    return [
        benchmarks.Item(str(number), problem.prompt, problem.prompt, problem.answer)
        for number, problem in enumerate(tasks.generate(args.limit or EMBEDDED, "test", seed, (name,)), 1)
    ]


def grade(task, answer, response):
    if task in benchmarks.BENCHMARKS:
        return benchmarks.grade(task, answer, response)
    return {"extracted": tasks.extract_answer(response), "correct": tasks.verify(answer, response)}


# --- the leak check: which items a model was trained on ---------------------------------------------------


def runs_of(model):
    """Yields (folder, run.json) of the run that made `model`, of the run that made that one's start, and so on.

    The last of them starts from a model that no run here made: (folder, None) where nothing is left of it to tell.
    """
    done = set()
    while model and (run := Path(model).resolve().parent) not in done and (run / "run.json").is_file():
        done.add(run)
        record = read_json(run / "run.json", "training again")
        if not all(isinstance(record.get(name), dict) for name in ("arguments", "inputs")):
            raise InputError(f"{run}/run.json: not what train_dpo.py writes; train again, or move that file away")
        yield run, record
        model = next(
            (
                path
                for path in runs.places(run, record, "model_name_or_path")
                if holds(path, record["inputs"].get("model"))
            ),
            None,
        )
        if model is None and record.get("start_is_folder", True):  # not one of the hub
            yield run, None


def holds(folder, fingerprint):
    """Whether `folder` is there and holds the model of that fingerprint."""
    try:
        return folder.is_dir() and folders.model_fingerprint(str(folder)) == fingerprint
    except InputError:
        return False


def packed_folders(models, args):
    """The packed folders that `models` were trained on, by their run.json and --train_data; refuses if one is not to be found."""
    folders = {str(folder): Packed(folder) for folder in args.train_data or []}
    for model in models:
        card = Path(model) / "README.md"
        if (
            not folders
            and not any(runs_of(model))
            and card.is_file()
            and "train_dpo.py" in card.read_text(errors="replace")
        ):
            no_telling(
                f"{model}: trained by a run whose run.json is not beside it",
                "give its packed folder with --train_data",
                args,
            )
        for run, record in runs_of(model):
            if record is None:
                no_telling(
                    f"{run}: the model that it started from is gone or has other weights now", "put it back", args
                )
                continue
            wanted = record["inputs"]["data"]
            if any(packed.meta["fingerprint"] == wanted for packed in folders.values()):
                continue
            for folder in runs.places(run, record, "data"):
                if (folder / "meta.json").is_file() and (packed := Packed(folder)).meta["fingerprint"] == wanted:
                    folders[os.path.relpath(folder)] = packed
                    break
            else:
                no_telling(
                    f"{run}: trained on {record['arguments']['data']}, which is gone or holds other data now",
                    "give its packed folder with --train_data",
                    args,
                )
    return folders


def no_telling(what, remedy, args):
    """Refuse, or under --allow_leak warn: `what` is lost that would tell which items a model has seen."""
    said = f"{what}: no telling which items it has seen"
    if not args.allow_leak:
        raise InputError(f"{said}; {remedy}, or add --allow_leak")
    print(f"warning: {said}", flush=True)


def prompt_texts(packed, tokenizers, trust_remote_code=False):
    """The different prompts of packed/, decoded; `tokenizers`: fingerprint -> tokenizer, those of the models at hand."""
    wanted, name = packed.meta["tokenizer"], packed.meta["model_name_or_path"]
    if wanted not in tokenizers:
        try:
            tokenizers |= tokenizer_of(name, trust_remote_code)
        except InputError as error:
            raise InputError(f"{packed.folder}: its prompts cannot be read without its tokenizer: {error}") from None
    if wanted not in tokenizers:
        raise InputError(
            f"{packed.folder}: made with another tokenizer than {name} has now, so its prompts cannot be read; "
            f"make it again: {packed.remake}"
        )
    prompts = {tuple(packed[index][0].tolist()) for index in range(len(packed))}
    return [tokenizers[wanted].decode(ids) for ids in prompts]


def tokenizer_of(name, trust_remote_code):
    """{fingerprint: tokenizer} of a model."""
    tokenizer = tokenization.load_tokenizer(name, trust_remote_code)
    return {tokenization.tokenizer_fingerprint(tokenizer): tokenizer}


def find_seen(items, models, args, trust_remote_code):
    """{task: {id: the packed folder whose prompts hold the item}}; prints what was found."""
    tokenizers = {}
    for model in models:
        tokenizers |= tokenizer_of(model, trust_remote_code)
    trained = {
        name: benchmarks.Prompts(prompt_texts(packed, tokenizers, trust_remote_code))
        for name, packed in packed_folders(models, args).items()
    }
    seen = {}
    for task, each in items.items():
        found = seen[task] = {}
        for item in each:
            if name := next(
                (name for name, prompts in trained.items() if prompts.saw(item.question, exact=task in tasks.FAMILIES)),
                None,
            ):
                found[item.id] = name
        if found:
            named = ", ".join(list(found)[:NAMED]) + (", ..." if len(found) > NAMED else "")
            print(
                f"{task}: {len(found)} of {len(each)} items are in the training prompts of "
                f"{', '.join(sorted(set(found.values())))} ({named}); "
                + ("scored all the same (--allow_leak)" if args.allow_leak else "left out"),
                flush=True,
            )
    unknown = [model for model in models if not any(runs_of(model))]
    print(
        "leak check: "
        + (f"against the prompts of {', '.join(trained)}" if trained else "nothing to check against")
        + (f"; no run.json beside {', '.join(unknown)}" if unknown else ""),
        flush=True,
    )
    return seen


# --- answers and their table ------------------------------------------------------------------------------


def plain(name):
    """A task's name in file names."""
    return re.sub(r"[^\w.-]", "-", name)


def labels(models):
    """A short name for each model, for file names: the last two parts of its path, more of those that would be the same."""
    parts = [Path(os.path.abspath(model) if os.path.isdir(model) else model).parts for model in models]
    if twice := next((model for model, each in zip(models, parts) if parts.count(each) > 1), None):
        raise InputError(f"--compare: {twice} is there twice; expected different models")
    names = ["-".join(each[-2:]).lstrip("/-") for each in parts]
    for count in range(3, max(map(len, parts)) + 1):
        names = [
            name if names.count(name) == 1 else "-".join(each[-count:]).lstrip("/-") for name, each in zip(names, parts)
        ]
    return dict(
        zip(models, [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, 1)])
    )


def answer(name, items, sample, lm, path, header, desc):
    """One row per item: what the model was asked, what it said, and what that is worth; kept in `path` as they come.

    lm: makes the LanguageModel, if anything is left to say.
    """
    asked = {int(item.id) - 1: {"prompt": item.prompt, "place": f"{name}, item {item.id}"} for item in items}
    made = samples.complete(path, header, asked, sample, lambda: (lm().model, lm().tokenizer), desc=desc)
    return [
        {
            "task": name,
            "id": item.id,
            "model": sample.model_name_or_path,
            "prompt": item.prompt,
            "response": line["text"],
            "answer": item.answer,
            **grade(name, item.answer, line["text"]),
            "tokens": line["tokens"],
            "ended": line["ended"],
        }
        for item, [line] in zip(items, made.values())
    ]


def answer_theirs(name, task, items, sample, lm, num_fewshot, path):
    """The same for a task of lm_eval, which asks, reads and grades by its own rules."""
    chat = tokenization.uses_chat(lm().tokenizer, sample.template)
    places = [int(item.id) - 1 for item in items]
    rows = harness.run_task(name.removeprefix(HARNESS), task, lm(), places, chat, num_fewshot, path)
    return [
        {"task": name, "id": item.id, "model": sample.model_name_or_path, **row}
        for item, row in zip(items, rows, strict=True)
    ]


def mcnemar(won, lost):
    """Two-sided p of McNemar's exact test: `won` items that only the first model has right, `lost` only the other."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)


def summary(task, label, rows, first):
    """A line of the table. first: the first model's rows, the same items in the same order; None: these are its own."""
    n = len(rows)
    line = {"task": task, "model": label, "n": n}
    if not n:
        return line
    mean = lambda name: sum(row[name] for row in rows) / n  # noqa: E731
    line |= {"accuracy": mean("correct"), "ci95": tasks.wilson(mean("correct"), n)}
    line |= {name: mean(name) for name in ("ended", "tokens", "f1") if name in rows[0]}
    if first is not None:
        won = sum(a["correct"] and not b["correct"] for a, b in zip(first, rows))
        lost = sum(b["correct"] and not a["correct"] for a, b in zip(first, rows))
        line["first_model_against_it"] = {
            "difference": (won - lost) / n,
            "won": won,
            "lost": lost,
            "p": mcnemar(won, lost),
        }
    return line


def print_table(table):
    wide = [max(len(line[name]) for line in table) for name in ("task", "model")]
    print(
        f"{'task':{wide[0]}}  {'model':{wide[1]}}     n  accuracy  95% interval  ended  tokens  first model against it"
    )
    for line in table:
        words = f"{line['task']:{wide[0]}}  {line['model']:{wide[1]}} {line['n']:5d}"
        if line["n"]:
            low, high = line["ci95"]
            words += f"{line['accuracy']:10.3f}  {abs(low):5.3f}-{high:5.3f}"
            words += f" {line['ended']:7.0%} {line['tokens']:7.1f}" if "ended" in line else " " * 16
        if "f1" in line:
            words += f"  F1 {line['f1']:.3f}"
        if test := line.get("first_model_against_it"):
            words += f"  {test['difference']:+.3f} ({test['won']} won, {test['lost']} lost, p = {test['p']:.2g})"
        print(words)


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"--output_dir {path.parent}: cannot be written to ({error.strerror})") from None


class LanguageModel(harness.MaskedDiffusion):
    """A model as lm_eval asks it, its likelihoods the stepwise denoising score."""

    diffusion_score = staticmethod(score.diffusion_score)


def main(argv=None):
    if argv is None and sys.argv[1:2] == ["lm_eval"]:
        del sys.argv[1]
        return harness.main(LanguageModel, harness.__doc__)
    # 1. what is asked of whom
    args, given, likelihood = read_arguments(argv)
    sample = replace(given)
    sampler.check(sample)
    folder = Path(args.output_dir)
    models = [sample.model_name_or_path, *(args.compare or [])]
    fingerprints = {model: folders.model_fingerprint(model) for model in models}  # every model is there, or none is run
    names = labels(models)
    wanted = task_names(args.tasks)
    if "math500" in wanted:
        benchmarks.import_math_verify()
    items = {name: read_items(name, theirs, args, sample.seed) for name, theirs in wanted.items()}

    # 2. what they have seen
    seen = find_seen(items, models, args, sample.trust_remote_code)
    if not args.allow_leak:
        items = {name: [item for item in each if item.id not in seen[name]] for name, each in items.items()}

    for model in models:  # what one of them cannot be asked is said before the first has answered
        tokenizer = tokenization.load_tokenizer(model, sample.trust_remote_code)
        for name, each in items.items():
            if each and not wanted[name]:
                prompts.prompt_ids(tokenizer, {"prompt": each[0].prompt}, model, sample.template)

    # 3. one model in memory at a time
    make_folder(folder / "samples")
    files = [folder / f"{names[model]}-{plain(name)}.jsonl" for model in models for name in items]
    if (
        folder / "results.json"
    ).is_file():  # an earlier command's responses, which samples/ keeps, would be taken for this one's
        for name in read_json(folder / "results.json", "this command").get("files", []):
            if isinstance(name, str) and Path(name).name == name and name.endswith(".jsonl"):
                (folder / name).unlink(missing_ok=True)
    table, first = [], {}
    for model in models:
        one = replace(sample, model_name_or_path=model)
        lm = functools.cache(lambda: LanguageModel(replace(given, model_name_or_path=model), likelihood))
        header = samples.header(one, fingerprints[model])
        for name, each in items.items():
            if wanted[name] and each:
                mark = fingerprint(header, asdict(likelihood))
                path = folder / "samples" / f"{plain(name)}-{mark}"
                rows = answer_theirs(name, wanted[name], each, one, lm, args.num_fewshot, path)
            else:
                path = folder / "samples" / f"{plain(name)}-{fingerprint(header)}.jsonl"
                rows = answer(name, each, one, lm, path, header, f"{names[model]}, {name}")
            kept = folder / f"{names[model]}-{plain(name)}.jsonl"
            with replacing(kept) as file:
                jsonlines.Writer(file).write_all({**row, "seen": row["id"] in seen[name]} for row in rows)
            table.append({**summary(name, names[model], rows, first.get(name)), "file": kept.name})
            first.setdefault(name, rows)

    # 4. side by side
    table.sort(key=lambda line: list(wanted).index(line["task"]))  # stable: the models stay in their order
    write_json(
        folder / "results.json",
        {
            "models": {names[model]: {"path": model, "fingerprint": fingerprints[model]} for model in models},
            "table": table,
            "files": [path.name for path in files],
            "seen": seen,
            "arguments": asdict(sample) | asdict(likelihood) | asdict(args),
        },
    )
    print_table(table)
    print(f"{folder}: every response, and results.json")
    if run := next((Path(model).parent for model in models if (Path(model).parent / "run.json").is_file()), None):
        print(f"next: python report.py {shlex.quote(str(run))} --evaluation {shlex.quote(str(folder))}")
    return 0


if __name__ == "__main__":
    exits.run(main)
