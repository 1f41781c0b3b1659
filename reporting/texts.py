"""The texts of a run's pairs: its tokenizer, found on this machine, and the packed ids."""

import os
from pathlib import Path
from typing import NamedTuple

from files import InputError
from training import runs


def load_tokenizer(run):
    """Set run.tokenizer to the one that packed the arrays: of final/, or of the model at the start.

    Downloads nothing. An adapter's folder is skipped: its tokenizer asks for its base's config, which would be fetched.
    """
    from models import tokenization  # imported here: torch and transformers take longer than the rest of the report

    source = run.packed.meta["model_name_or_path"]
    for name in (run.folder / "final", *runs.places(run.folder, run.record, "model_name_or_path"), source):
        folder = local(str(name))
        if not folder or (Path(folder) / "adapter_config.json").is_file():
            continue
        try:
            tokenizer = tokenization.load_tokenizer(folder)
        except InputError:
            continue
        if tokenization.tokenizer_fingerprint(tokenizer) == run.packed.meta["tokenizer"]:
            run.tokenizer = tokenizer
            return
    run.missing.append(f"The tokenizer of {source} is not on this machine: the pairs' texts cannot be read.")


def local(name):
    """A model's folder on this machine: `name` itself, or its snapshot in the Hub's cache; None if there is none."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name):
        return name
    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):  # not in the cache; not a name of the Hub
        return None


class Texts(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def of_pair(run, pair):
    """The Texts of a pair."""
    return Texts(*(run.tokenizer.decode(ids) for ids in run.packed[pair]))
