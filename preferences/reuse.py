"""Whether a packed folder is what the same arguments would make again. Imports no torch, so the answer takes no time.

A tokenizer is loaded only if its files are not those that packed the folder.
"""

import os
from pathlib import Path
from typing import NamedTuple

from files import InputError, read_json
from models import folders
from preferences.columns import parse_columns, parse_names
from preferences.forms import roles
from preferences.packed import NOUNS, Packed, command
from preferences.sources import source_sha256

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny"  # the model when none is given


class Tokenizer(NamedTuple):
    """What is known of a tokenizer without its vocabulary."""

    fingerprint: str
    has_chat_template: bool


def known_tokenizer(meta, model, trust_remote_code=False):
    """The Tokenizer of `model`, from the meta.json of a packed folder if the same files packed it, else loaded."""
    if not trust_remote_code and meta.get("tokenizer_files") == folders.tokenizer_files(model):
        return Tokenizer(meta["tokenizer"], meta["has_chat_template"])
    from models import tokenization  # imports transformers, which takes seconds

    return known(tokenization.load_tokenizer(model, trust_remote_code))


def known(tokenizer):
    """The Tokenizer of a loaded tokenizer."""
    from models import tokenization

    return Tokenizer(tokenization.tokenizer_fingerprint(tokenizer), bool(tokenizer.chat_template))


def default_model(folder, reuse):
    """The model when none is given: the one that packed the folder if that is reused, else the embedded one."""
    meta = Path(folder) / "meta.json"
    if reuse and meta.exists():
        return read_json(meta, command(folder, model="M")).get("model_name_or_path")
    return os.path.relpath(EXAMPLE) if EXAMPLE.is_dir() else None


def up_to_date(args, model_args):
    """The Packed of args.data if these arguments would make the same, or, with no source given, if it is complete.

    None if it has to be made. Raises InputError if there is no source to make it of.
    """
    source, model = args.preference_data_path, model_args.model_name_or_path
    if not (Path(args.data) / "meta.json").exists():
        if source:
            return None
        raise InputError(
            f"{args.data}: holds no packed {NOUNS[args.task]}, and --in was not given; "
            f"run: {command(args.data, args.task, model=model)} (the embedded example: --config_file configs/tiny.yaml)"
        )
    try:
        packed = Packed(args.data)
        packed.lines()
    except InputError:
        if source:
            return None
        raise
    tokenizer = known_tokenizer(packed.meta, model, model_args.trust_remote_code)
    if not source:
        check_without_source(packed, args, tokenizer, model)
        return packed
    wanted = depends_on(args, tokenizer)
    for name in ("mask_token_id", "end_token_id"):
        if getattr(model_args, name) is not None:
            wanted[name] = getattr(model_args, name)
    meta = {"ignore_columns": [], "reasoning": "auto"} | packed.meta | {"task": packed.task}
    same = all(meta.get(name) == value for name, value in wanted.items())
    return packed if same and meta.get("source_sha256") == source_sha256(source, args.split) else None


def check_without_source(packed, args, tokenizer, model):
    """Refuse packed arrays that another tokenizer or another task made."""
    if packed.meta["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"{args.data}: made with another tokenizer, that of {packed.meta.get('model_name_or_path')}; "
            f"run: {command(args.data, packed.task, model=model)}"
        )
    if args.task not in ("preferences", packed.task):
        raise InputError(
            f"{args.data}: holds {NOUNS[packed.task]}, and --task {args.task} was given; leave it out, "
            f"or run: {command(args.data, args.task, model=model)}"
        )


def depends_on(args, tokenizer):
    """The entries of meta.json, beside the source and given token ids, that make other arrays if they change."""
    chat = args.template == "chat" or args.template == "auto" and tokenizer.has_chat_template
    return {
        "task": args.task,
        "tokenizer": tokenizer.fingerprint,
        "template": "chat" if chat else "none",
        "columns": parse_columns(args.columns, roles(args.task)),
        "ignore_columns": parse_names(args.ignore_columns),
        "reasoning": args.reasoning,
        "max_length": args.max_length,
    }
