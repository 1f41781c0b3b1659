"""A model's responses to many prompts, on disk as they come: a job that was stopped goes on, but for the batch in hand.

    a header: all that responses depend on but their prompts; then a line per response, in the order in which they were made:
    {"number": 12, "sample": 0, "prompt": "3fa9...", "place": "arithmetic 13", "text": " 7 + 5 = 12\\n#### 12", "tokens": 14, ...}

Each response has noise of its own, keyed by the seed, its prompt's number and its own: made first or last, it is the same.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from files import InputError, fingerprint, replacing
from reasoning import prompts, sampler

APART = ("model_name_or_path", "batch_size", "device", "trust_remote_code", "deepspeed")  # change no response


def header(sampling, model, k=1):
    """What responses depend on but their prompts; sampling: SampleArguments after generate.check(); model: its fingerprint."""
    return {"model": model, "k": k, **{name: value for name, value in asdict(sampling).items() if name not in APART}}


def stored(path, wanted):
    """{(number, sample, prompt's fingerprint): line} of the file; refuses one whose header is not `wanted`."""
    if not path.exists() or not path.stat().st_size:
        return {}
    whole = path.read_bytes().rpartition(b"\n")[0]  # a torn last line is made again
    try:
        first, *lines = [json.loads(line) for line in whole.decode().split("\n")]
        differs = [name for name in wanted if first.get(name, ...) != wanted[name]]
        done = {(line["number"], line["sample"], line["prompt"]): line for line in lines}
        if "model" not in first or not all({"text", "tokens", "ended"} <= set(line) for line in lines):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: expected samples of an earlier run; remove that file to sample anew") from None
    if differs:
        name, was = differs[0], first.get(differs[0])
        said = "from a model with other weights" if name == "model" else f"with {name} = {was}, not {wanted[name]}"
        raise InputError(f"{path}: was sampled {said}; give another --out, or remove that file to sample anew")
    return done


def complete(path, wanted, rows, sampling, load, *, note=lambda number, text: {}, desc="sampling"):
    """{number: [its k lines]} for rows {number: {"prompt", "place"}}; what `path` holds is not made again.

    wanted: header(). load: called for (model, tokenizer) if anything is missing. note: what else a line says of its text,
    looked at anew each time. Raises InputError if the file is of another model or other arguments.
    """
    path, k = Path(path), wanted["k"]
    done = stored(path, wanted)
    names = [(number, j, fingerprint(row["prompt"])) for number, row in rows.items() for j in range(k)]
    todo = [name for name in names if name not in done]
    if todo:
        model, tokenizer = load()
        ids = {
            number: prompts.prompt_ids(tokenizer, rows[number], rows[number]["place"], sampling.template)
            for number in dict.fromkeys(number for number, _, _ in todo)
        }
        if done:
            os.truncate(path, path.read_bytes().rindex(b"\n") + 1)
        else:
            with replacing(path) as file:
                file.write(json.dumps(wanted) + "\n")
        with (
            open(path, "a", encoding="utf-8") as file,
            tqdm(
                total=len(names),
                initial=len(names) - len(todo),
                unit="response",
                desc=desc,
                mininterval=1 if sys.stderr.isatty() else 30,
            ) as bar,
        ):  # a log file gets a line now and then

            def keep(replies):
                for index, reply in replies.items():
                    number, j, mark = todo[index]
                    done[todo[index]] = line = {
                        "number": number,
                        "sample": j,
                        "prompt": mark,
                        "place": rows[number]["place"],
                        **reply._asdict(),
                        **note(number, reply.text),
                    }
                    file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update(len(replies))

            sampler.respond(
                model,
                tokenizer,
                [ids[number] for number, _, _ in todo],
                sampling,
                keys=[number * k + j for number, j, _ in todo],
                finished=keep,
            )
    made = {number: [] for number in rows}
    for name in names:
        made[name[0]].append(done[name] | note(name[0], done[name]["text"]))
    return made
