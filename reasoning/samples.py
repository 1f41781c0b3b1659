"""A model's responses to many prompts, kept on disk batch by batch: the same command resumes where it was stopped.

    a header: all that responses depend on but their prompts; then a line per response, in the order of their making:
    {"number": 12, "sample": 0, "prompt": "3fa9...", "place": "arithmetic 13", "text": " 7 + 5 = 12\\n#### 12", ...}

Each response has noise of its own, keyed by the seed, its prompt's number and its own, whenever it is made. So more
prompts, or more responses to each, add to what is there.
"""

import contextlib
import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from files import InputError, fingerprint, naming, replacing, wait_for
from reasoning import pace, prompts, sampler

NO_INFLUENCE = ("model_name_or_path", "batch_size", "device", "trust_remote_code", "deepspeed")  # on any response


class Key(NamedTuple):
    """What identifies a response in the file."""

    number: int  # of its row
    sample: int  # 0..k-1
    prompt: str  # fingerprint of its prompt

    @property
    def noise(self):
        """What keys the noise of this response: of the first to a prompt, the number alone."""
        return f"{self.number}.{self.sample}" if self.sample else self.number


def header(sampling, model):
    """What responses depend on but their prompts. sampling: checked SampleArguments; model: its fingerprint."""
    return {"model": model} | {name: value for name, value in asdict(sampling).items() if name not in NO_INFLUENCE}


def stored(path, wanted):
    """{Key: line} of the file. Raises InputError if its header is not `wanted`."""
    if not path.exists() or not path.stat().st_size:
        return {}
    complete_lines = path.read_bytes().rpartition(b"\n")[0]  # a torn last line is made again
    try:
        first, *lines = [json.loads(line) for line in complete_lines.decode().split("\n")]
        differs = [name for name in wanted if first.get(name, ...) != wanted[name]]
        done = {Key(line["number"], line["sample"], line["prompt"]): line for line in lines}
        if "model" not in first or not all({"text", "tokens", "ended"} <= set(line) for line in lines):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: expected samples of an earlier run; remove that file to sample again") from None
    if done and differs:
        name, was = differs[0], first.get(differs[0])
        how = "from a model with other weights" if name == "model" else f"with {name} = {was}, not {wanted[name]}"
        raise InputError(f"{path}: was sampled {how}; give another --out, or remove that file to sample again")
    return done


def start_file(path, wanted, resumes):
    """Write the header, or cut off a torn last line; before any work, so that a full disk shows at once."""
    if not resumes:
        with replacing(path) as file:
            file.write(json.dumps(wanted) + "\n")
    else:
        with open(path, "r+b") as file:
            file.truncate(file.read().rindex(b"\n") + 1)


def prompt_ids(tokenizer, numbers, rows, template):
    """The ids of the prompts of rows `numbers`, in that order, each made once."""
    ids = {
        number: prompts.prompt_ids(tokenizer, rows[number], rows[number]["place"], template) for number in set(numbers)
    }
    return [ids[number] for number in numbers]


def longest_passes(model, ids, sampling):
    """Passes that a response to one of the prompts `ids` takes at most."""
    one_of_each_length = {len(prompt): prompt for prompt in ids}.values()
    return max(sampler.most_passes(model, [prompt], sampling, 1) for prompt in one_of_each_length)


def no_note(number, text):
    return {}


def complete(path, wanted, rows, sampling, load, *, k=1, note=no_note, desc="sampling"):
    """{number: [its k lines]} for rows {number: {"prompt", "place"}}; what `path` holds is not made again.

    wanted: header(). load: called for (model, tokenizer) if anything is missing. note(number, text): more fields of a
    line, made anew at each call. Raises InputError if the file is of another model or other arguments. While another
    process adds to the file, this one waits.
    """
    path = Path(path)
    keys = [Key(number, j, fingerprint(row["prompt"])) for number, row in rows.items() for j in range(k)]
    done = stored(path, wanted)
    if not done.keys() >= set(keys):
        with wait_for(path.with_name(f".{path.name}.lock"), f"the same samples, {path}"):
            done = stored(path, wanted)  # a process that this one waited for may have made them
            if missing := [key for key in keys if key not in done]:
                start_file(path, wanted, resumes=bool(done))
                bar = functools.partial(pace.Bar, total=len(keys), done=len(done.keys() & set(keys)), k=k, desc=desc)
                done |= make(path, missing, rows, sampling, load(), note, bar)
    made = {number: [] for number in rows}
    for key in keys:
        made[key.number].append(done[key] | note(key.number, done[key]["text"]))
    return made


def make(path, missing, rows, sampling, loaded, note, bar):
    """{Key: line} of the responses `missing`, added to the file as they end.

    loaded: (model, tokenizer). bar: called with the passes that a response takes at most, for a pace.Bar. The others
    are complete()'s.
    """
    (model, tokenizer), made = loaded, {}
    ids = prompt_ids(tokenizer, [key.number for key in missing], rows, sampling.template)
    sampling = replace(sampling, batch_size=sampler.batch_size(model, ids, sampling))  # "auto" is settled once
    passes = sampler.most_passes(model, ids, sampling, sampling.batch_size)
    shown = bar(longest_passes(model, ids, sampling))
    print(f"{shown.desc}: {len(missing)} responses, at most {passes} forward passes", file=sys.stderr, flush=True)
    with naming(path), open(path, "a", encoding="utf-8") as file, contextlib.closing(shown):

        def keep(replies):
            for index, reply in replies.items():
                number, j, prompt = key = missing[index]
                line = {"number": number, "sample": j, "prompt": prompt, "place": rows[number]["place"]}
                made[key] = line | reply._asdict() | note(number, reply.text)
                file.write(json.dumps(made[key]) + "\n")
            file.flush()

        seeds = [key.noise for key in missing]
        sampler.respond(model, tokenizer, ids, sampling, keys=seeds, finished=keep, pace=shown)
    return made
