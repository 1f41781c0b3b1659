"""What evaluate.py asks a model, and the rows that it writes of what the model said."""

from dataclasses import asdict, replace
from typing import NamedTuple

import config
from models import folders
from reasoning import answers, arguments, estimates, protocols, samples


class Task(NamedTuple):
    """A task as every model is asked."""

    name: str
    theirs: object  # lm_eval's Task; None: one of ours
    setting: protocols.Setting | None  # of --protocol
    sample: config.SampleArguments  # as given, over the protocol's
    items: list  # benchmarks.Item


def opening(task):
    """{"opening": text that responses are made to begin with}; {} without one. Responses depend on it."""
    return {"opening": task.setting.opening} if task.setting and task.setting.opening else {}


def asked(task, item):
    """The row of an item for reasoning/samples.py."""
    return {"prompt": item.prompt, "place": f"{task.name}, item {item.id}"} | opening(task)


def sampling(task, model):
    """The checked SampleArguments by which a model is asked a task."""
    sample = replace(task.sample, model_name_or_path=model)
    arguments.check(sample)
    return sample


def judged(task, item, lines, model):
    """The rows of an item: what the model was asked, what it said, and what that is worth.

    lines: of samples.complete(), one a response. Several have their number, "sample", and "vote": the number of the
    first of them with the same answer, null where no answer can be read.
    """
    rows = []
    for line in lines:
        row = {"task": task.name, "id": item.id, "model": model, "prompt": item.prompt, "response": line["text"]}
        row |= {"answer": item.answer, **answers.grade(item.kind, item.answer, line["text"])}
        row |= {"tokens": line["tokens"], "ended": line["ended"], **item.groups}
        if task.setting and task.setting.reads_right:
            row["by_protocol"] = task.setting.reads_right(line["text"], item.answer)
        rows.append(row)
    if len(rows) > 1:
        votes = estimates.votes(item.kind, [row["extracted"] for row in rows])
        rows = [row | {"sample": number, "vote": vote} for number, (row, vote) in enumerate(zip(rows, votes))]
    return rows


def about(task, model):
    """{"base", "adapter", "sampler", "published"} for a line of the table.

    The base is that of an adapter, else the model itself; published are figures by the same protocol.
    lm_eval's tasks may set lengths of their own, so of those the flags are named as they were given.
    """
    folder = folders.model_folder(model)
    is_adapter = folders.read_adapter(folder) is not None
    return {
        "base": folders.base_of(folder)[0] if is_adapter else model,
        "adapter": model if is_adapter else None,
        "sampler": sampler_flags(task.sample if task.theirs else sampling(task, model)),
        "published": task.setting and task.setting.published,
    }


ALWAYS = ("gen_length", "block_length", "steps")  # are named in the table


def sampler_flags(sample):
    """The sampler's flags that responses depend on, as a command line: the lengths, and what is not the default."""
    defaults = asdict(config.SampleArguments())
    named = {
        name: value
        for name, value in asdict(sample).items()
        if value is not None and name not in samples.NO_INFLUENCE and (name in ALWAYS or value != defaults[name])
    }
    return " ".join(f"--{name} {str(value).lower()}" for name, value in named.items())
