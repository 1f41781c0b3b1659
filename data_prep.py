"""Preference rows, or with --task sft SFT rows, to token ids on disk: prefs.jsonl -> packed/.

Input: prefs.jsonl or sft.jsonl. Output: packed/ (tokens.npy, bounds.npy, lines.npy, meta.json, rejects.jsonl; see
preferences/packed.py).

    python data_prep.py --in examples/prefs.jsonl
    python data_prep.py --task sft --in examples/prefs.jsonl --columns response=chosen --out packed-sft

In preferences/, sources.py reads files, forms.py finds which form of rows they hold, rows.py reads a row, encoding.py
makes ids of its texts. Nothing is truncated: a row that cannot be used as it is, is left out and listed with its
reason, so that rows in = pairs kept + rows listed. An SFT row is packed as a pair whose rejected response is empty.
"""

import json
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import config
from cli import exits
from cli.parser import arg, names
from files import InputError
from preferences import packed, reuse, sources

USED = {"model_name_or_path", "trust_remote_code", "mask_token_id", "end_token_id", "block_size"}  # of ModelArguments
UNUSED = names(config.ModelArguments) - USED


@dataclass
class PackArguments:
    reuse: bool = arg(
        False,
        "do nothing if --data is complete and was made from the same file, task, tokenizer, template, columns "
        "and max_length",
        heading="Data",
    )


def read_arguments(argv=None):
    """[DataArguments, ModelArguments, PackArguments], checked as far as is possible without loading anything."""
    groups = config.parse(argv, __doc__, config.DataArguments, config.ModelArguments, PackArguments, hide=UNUSED)
    args, _, own = groups
    if not args.preference_data_path and not own.reuse:
        raise InputError(f"no {packed.NOUNS[args.task]} given; add --in FILE.jsonl")
    if os.path.exists(args.data) and not os.path.isdir(args.data):
        raise InputError(f"{args.data}: expected a folder for the packed arrays, found a file")
    if args.preference_data_path:
        args.preference_data_path = sources.find(args.preference_data_path)
    return groups


def nothing_to_pack(args, model_args, own):
    """Why there is nothing to do with --reuse, else None. Fills in the model."""
    model_args.model_name_or_path = model_args.model_name_or_path or reuse.default_model(args.data, own.reuse)
    there = reuse.up_to_date(args, model_args) if own.reuse else None
    noun = there and ("pairs" if there.task == "preferences" else packed.NOUNS[there.task])
    return there and f"{there.folder}: {len(there)} {noun}, up to date"


def early():
    """Read the arguments; end the process if the packed arrays are there already."""
    exits.end_if(nothing_to_pack(*read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and "up to date" before the imports below, which take seconds

import numpy as np

import files
from models import architecture, families, folders, tokenization
from preferences import columns, forms, rows, several, summary, unpaired
from preferences.encoding import encode_rows, make_encoder, refuse_ids_beyond
from preferences.sources import LeftOut

DS_CONFIG = "ds_configs/zero3_offload_4080.json"  # of the command that is printed when none is given
NAMED = 10  # malformed rows that a refusal names


def main(argv=None):
    args, model_args, own = read_arguments(argv)
    if reason := nothing_to_pack(args, model_args, own):
        return print(reason)

    # 1. What the arrays depend on
    paths, folder, name = args.preference_data_path, Path(args.data), model_args.model_name_or_path
    tokenizer_files = folders.tokenizer_files(name)  # before they are read: they may change meanwhile
    tokenizer = tokenization.load_tokenizer(name, model_args.trust_remote_code)
    attention = families.attention_line(folders.plain_config(name), model_args.block_size)
    meta = reuse.depends_on(args, reuse.known(tokenizer))
    meta["source_sha256"] = sources.source_sha256(paths, args.split)  # likewise

    # 2. Rows to ids
    encoder = make_encoder(args, model_args, tokenizer)
    table, form, about_columns = prepare(args, encoder)
    kept, left_out = [row for row in table if not row.reason], [row for row in table if row.reason]
    dropped = dict(Counter(row.reason for row in left_out).most_common())
    if not kept:
        raise no_usable_row(sources.described(paths), left_out, dropped)
    refuse_ids_beyond(architecture.load_config(name, model_args.trust_remote_code), encoder, kept, name)

    # 3. Ids to disk, by one process at a time
    meta |= {
        "source": sources.described(paths),
        "tokenizer_files": tokenizer_files,
        "has_chat_template": bool(tokenizer.chat_template),
        "model_name_or_path": name,
        "form": form,
        "rows": len(table),
        "kept": len(kept),
        "dropped": dropped,
        "end_token_id": encoder.end,
        "pad_token_id": tokenizer.eos_token_id,
        "mask_token_id": encoder.mask,
    }
    if len(paths) > 1:
        kept_of = Counter(row.source for row in kept)
        meta["files"] = {path: kept_of[path] for path in paths}
    folder.mkdir(parents=True, exist_ok=True)
    with files.wait_for(folder / ".lock", f"{folder}"):
        if reason := nothing_to_pack(args, model_args, own):  # the process that we waited for has made the same
            return print(reason)
        write(folder, kept, left_out, meta)

    # 4. What was made
    mask, end = (summary.token(tokenizer, number) for number in (encoder.mask, encoder.end))
    print("\n".join([f"form: {form}", *about_columns]))
    print(f"template: {encoder.template}; mask: {mask}; end of a response: {end}\n{attention}")
    if encoder.turn and encoder.turn.opening:
        print(f"the template begins every response with {encoder.turn.opening!r}")
    if encoder.max_length < args.max_length:
        print(f"{name} reads at most {encoder.max_length} tokens, less than --max_length {args.max_length}")
    print("\n".join(summary.summary(args, kept, left_out, tokenizer)))
    if not own.reuse:  # a script goes on by itself
        print(f"next: {next_command(args, model_args, sys.argv[1:] if argv is None else argv)}")


# --- rows to ids ---


def prepare(args, encoder):
    """(rows, form, lines to print): all rows of the source, each with its ids or with the reason to leave it out."""
    stop = args.on_bad_row == "stop"
    table, form, lines = read(args, encoder)
    usable = [row for row in table if not row.reason]
    if stop and any(row.reason == "malformed" for row in table):
        for row in usable:
            judge(row, encoder, *row.parts)  # the chat template may refuse more rows, which are counted too
    elif usable:
        encode_rows(encoder, usable, args.num_proc)
    if stop:
        refuse_malformed(table, sources.described(args.preference_data_path))
    leave_out_duplicates(table)
    if args.task == "kto":
        unpaired.add_mismatched([row for row in table if not row.reason], encoder.max_length)
    return table, form, lines


def read(args, encoder):
    """(rows, form, lines to print): all rows, each with its texts or the reason to leave it out; what is not read."""
    # 1. Columns
    paths, names = args.preference_data_path, columns.parse_names(args.ignore_columns)
    given = columns.parse_columns(args.columns, forms.roles(args.task))
    source, table = sources.described(paths), sources.read_rows(paths, args.split)
    columns.leave_out(table, names, source)
    found, form = forms.find_columns(args.task, table, given, source)
    of_a_pair = found
    if "response" not in found:
        count = len(table)
        table, of_a_pair = several.one_pair_each(table, found)
        form += f" ({count} rows hold {len(table)} pairs)" if len(table) > count else ""

    # 2. Texts
    texts_of = rows.demonstration if "response" in found else rows.preference
    no_template = "this tokenizer has none" if args.template != "none" else "--template none was given"
    for row in table:
        if not row.reason:
            row.parts = judge(row, texts_of, row.value, of_a_pair, encoder.template == "chat", args.reasoning)
        if not row.reason and encoder.template == "none" and isinstance(row.parts[0], list):
            row.leave_out("malformed", f"conversational rows need a chat template, and {no_template}")

    # 3. What is not read
    reasoning = columns.REASONING
    if args.reasoning == "auto":
        reasoning = tokenization.rendered_fields(encoder.tokenizer, reasoning) if encoder.turn else []
    read_fields = {*forms.TEXTS, "rank", *reasoning}
    others = columns.refuse_unread(table, found | of_a_pair, given, read_fields, source)
    if args.task == "kto":
        table = unpaired.labelled(table, found)
    return table, form, columns.lines(found, [*names, *others])


def judge(row, function, *arguments):
    """What the function returns. If it raises LeftOut, the row gets the reason."""
    try:
        return function(*arguments)
    except LeftOut as left_out:
        row.leave_out(*left_out.args)


def refuse_malformed(table, source):
    """Refuse malformed rows: count all of them, name the first ten. source: what messages call the files."""
    malformed = [row for row in table if row.reason == "malformed"]
    skip = "(--on_bad_row skip leaves such rows out)"
    if len(malformed) == 1:
        raise InputError(f"{malformed[0].place}: {malformed[0].detail} {skip}")
    if malformed:
        sentence = f"{source}: {len(malformed)} rows are malformed {skip}; the first {min(len(malformed), NAMED)}:"
        is_one_file = len({row.source for row in table}) == 1
        named = [f"{row.spot if is_one_file else row.place}: {row.detail}" for row in malformed[:NAMED]]
        raise InputError("\n  ".join([sentence, *named]))


def leave_out_duplicates(table):
    """Keep the first of the rows that have the same ids and label."""
    seen = {}
    for row in table:
        if not row.reason:
            first = seen.setdefault((files.fingerprint(*row.ids), row.label), row)
            if first is not row:
                row.leave_out("duplicate", f"of {first.number if first.source == row.source else first.place}")


def no_usable_row(path, left_out, dropped):
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    first = next((f"; the first, {row.place}: {row.detail}" for row in left_out if row.detail), "")
    return InputError(f"{path}: holds no row that can be used ({why or 'it is empty'}){first}")


# --- ids to disk ---


def write(folder, kept, left_out, meta):
    """Write packed/. meta.json is removed first and written last, so that a half-written folder is never used."""
    (folder / "meta.json").unlink(missing_ok=True)
    lines = np.array([row.number for row in kept], np.int64)
    files.write_array(folder / "lines.npy", lines)
    with files.replacing(folder / "rejects.jsonl") as file:
        for row in left_out:
            text = row.value if isinstance(row.value, str) else sources.as_text(row.value)
            reject = {"file": row.source, "line": row.number, "reason": row.reason, "detail": row.detail}
            reject["text"] = files.shorten(text, 500)
            file.write(json.dumps(reject) + "\n")
    labels = [row.label for row in kept] if meta["task"] == "kto" else None
    packed.write_packed(folder, (row.ids for row in kept), {**meta, "lines": files.fingerprint(lines)}, labels)


def next_command(args, model_args, argv):
    """launch.sh with the arguments of this command: it finds the arrays up to date, and scores and trains with them."""
    loss = [] if args.task == "preferences" or "--loss_type" in argv else ["--loss_type", args.task]
    before = [None, *argv]  # launch.sh takes the ds_config as its first word, not as a flag
    words = [word for word, last in zip(argv, before) if "--deepspeed" not in (last, word.split("=")[0])]
    return shlex.join(["bash", "launch.sh", model_args.deepspeed or DS_CONFIG, *loss, *words])


if __name__ == "__main__":
    exits.run(main)
