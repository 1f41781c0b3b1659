"""The leak check: which items of a task were in the prompts that a model was trained on.

    find_seen({"gsm8k": items}, ["runs/mine/final"], Check()) -> {"gsm8k": {"12": "packed"}}: item 12 is in packed/

A run's run.json names its packed folder and the model that it started from, which may be of another run, and so on.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from files import InputError, read_json
from models import folders, tokenization
from preferences.packed import Packed
from reasoning import tasks
from training import runs

# --- which questions a training set has shown -------------------------------------------------------------

WINDOW = 8  # words
SHARE = 0.75  # of a question's windows


def words(text):
    """Its words, numbers and operators in lower case; spacing, punctuation and markup around them do not count."""
    return re.findall(r"[a-z]+|[0-9]+|[^\W_]|[-+*/=<>^]", unicodedata.normalize("NFKC", text).lower())


def windows(asked):
    """Hashes of all runs of WINDOW words: a fifth of the memory of the words themselves."""
    return {hash(tuple(asked[i : i + WINDOW])) for i in range(len(asked) - WINDOW + 1)}


class Prompts:
    """The prompts of a training set: does one of them hold a question, whatever stands around it?

    A question counts as seen when SHARE of its runs of WINDOW words occur in the prompts. Measured: all 917 GSM8K test
    questions of two preference sets reach 1.0 in them; the others at most 0.52, GSM8K's 7473 training questions 0.67
    (the same story with other numbers), MATH-500, LogiQA and HotpotQA 0. A question of fewer words, or one written from
    a template (`exact`), must occur in one prompt as a whole.
    """

    def __init__(self, texts):
        by_prompt = [words(text) for text in texts]
        self.text = "\n".join(f" {' '.join(each)} " for each in by_prompt)
        self.windows = set()
        for each in by_prompt:
            self.windows |= windows(each)

    def saw(self, question, exact=False):
        asked = words(question)
        if exact or len(asked) < WINDOW:
            return f" {' '.join(asked)} " in self.text
        runs_of_words = windows(asked)
        return len(runs_of_words & self.windows) >= SHARE * len(runs_of_words)


# --- what a model was trained on --------------------------------------------------------------------------


class Check(NamedTuple):
    """What the user says about the check."""

    train_data: tuple = ()  # packed folders beside those that the runs name
    allow_leak: bool = False  # warn where the check would refuse
    trust_remote_code: bool = False


class Ancestor(NamedTuple):
    folder: Path  # of a run
    record: dict | None  # its run.json; None: the model that it started from cannot be found


def ancestors(model):
    """Yields the Ancestor that made `model`, the one that made that one's start, and so on.

    The last one starts from a model of the Hub or from a folder that no run of ours made.
    """
    done = set()
    while model and (run := Path(model).resolve().parent) not in done and (run / "run.json").is_file():
        done.add(run)
        record = read_json(run / "run.json", "training again")
        if not all(isinstance(record.get(name), dict) for name in ("arguments", "inputs")):
            raise InputError(f"{run}/run.json: not what train_dpo.py writes; train again, or move that file away")
        yield Ancestor(run, record)
        places = runs.places(run, record, "model_name_or_path")
        model = next((path for path in places if holds(path, record["inputs"].get("model"))), None)
        if model is None and record.get("start_is_folder", True):  # not one of the Hub
            yield Ancestor(run, None)


def holds(folder, fingerprint):
    """Whether `folder` exists and holds the model of that fingerprint."""
    try:
        return folder.is_dir() and folders.model_fingerprint(str(folder)) == fingerprint
    except InputError:
        return False


def packed_folders(models, check):
    """{name: Packed} of all data that `models` were trained on. Raises InputError if some of it cannot be found."""
    found = {str(folder): Packed(folder) for folder in check.train_data}
    for model in models:
        lineage = list(ancestors(model))
        if not lineage and not found and is_trained_here(model):
            cannot_check(
                f"{model}: trained by a run whose run.json is not beside it",
                "give its packed folder with --train_data",
                check,
            )
        for run, record in lineage:
            if record is None:
                cannot_check(
                    f"{run}: the model that it started from is gone or has other weights now", "put it back", check
                )
            elif all(packed.meta["fingerprint"] != record["inputs"]["data"] for packed in found.values()):
                packed = packed_of(run, record)
                if packed:
                    found[os.path.relpath(packed.folder)] = packed
                else:
                    cannot_check(
                        f"{run}: trained on {record['arguments']['data']}, which is gone or holds other data now",
                        "give its packed folder with --train_data",
                        check,
                    )
    return found


def is_trained_here(model):
    """Whether train_dpo.py wrote the model card."""
    card = Path(model) / "README.md"
    return card.is_file() and "train_dpo.py" in card.read_text(errors="replace")


def packed_of(run, record):
    """The Packed that a run was trained on, if it still holds the same data; else None."""
    for folder in runs.places(run, record, "data"):
        if (folder / "meta.json").is_file():
            packed = Packed(folder)
            if packed.meta["fingerprint"] == record["inputs"]["data"]:
                return packed
    return None


def cannot_check(what, remedy, check):
    """Refuse, or warn with --allow_leak: `what` is missing, so a model may have seen any item."""
    if not check.allow_leak:
        raise InputError(f"{what}: it is unknown which items it has seen; {remedy}, or add --allow_leak")
    print(f"warning: {what}: it is unknown which items it has seen", flush=True)


# --- the check --------------------------------------------------------------------------------------------


def prompt_texts(packed, tokenizers, trust_remote_code=False):
    """The different prompts of packed/, decoded. tokenizers: {fingerprint: tokenizer} of the models at hand."""
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


def find_seen(items, models, check):
    """{task: {id: packed folder whose prompts hold the item}} for items {task: [Item]}; prints what it finds."""
    tokenizers = {}
    for model in models:
        tokenizers |= tokenizer_of(model, check.trust_remote_code)
    trained = {
        name: Prompts(prompt_texts(packed, tokenizers, check.trust_remote_code))
        for name, packed in packed_folders(models, check).items()
    }
    seen = {task: seen_items(each, trained, exact=task in tasks.FAMILIES) for task, each in items.items()}
    for task, found in seen.items():
        if found:
            print_seen(task, found, len(items[task]), check.allow_leak)
    against = f"against the prompts of {', '.join(trained)}" if trained else "nothing to check against"
    unknown = [model for model in models if not any(ancestors(model))]
    print(f"leak check: {against}" + (f"; no run.json beside {', '.join(unknown)}" if unknown else ""), flush=True)
    return seen


def seen_items(items, trained, exact):
    """{id: name of the first of `trained` {name: Prompts} that holds the item}."""
    found = {}
    for item in items:
        name = next((name for name, prompts in trained.items() if prompts.saw(item.question, exact)), None)
        if name:
            found[item.id] = name
    return found


NAMED = 10  # seen items that the message names; results.json names all


def print_seen(task, found, count, allow_leak):
    named = ", ".join(list(found)[:NAMED]) + (", ..." if len(found) > NAMED else "")
    where = ", ".join(sorted(set(found.values())))
    result = "scored all the same (--allow_leak)" if allow_leak else "left out"
    print(
        f"{task}: {len(found)} of {count} items are in the training prompts of {where} ({named}); {result}", flush=True
    )
