"""The arrays of packed/ on disk. Each file is written under a temporary name and renamed.

tokens.npy      uint32 (tokens,): all pairs, prompt, chosen, rejected
bounds.npy      int64 (pairs, 4): start, prompt end, chosen end, rejected end; the rejected of an SFT row is empty
labels.npy      bool (rows,), of KTO data alone: whether the response, which is in the place of the chosen one, is
                desirable; in the place of the rejected one is a response of another prompt
lines.npy       int64 (pairs,): the line of its file that a pair came from, or its place in the list of a .json
meta.json       what they were made of
rejects.jsonl   the rows left out, with reasons

scoring/reference.py has the reference's noise and scores, in packed/ref-<key>/.
"""

import shlex
from pathlib import Path

import numpy as np

from files import InputError, fingerprint, open_array, read_json, sealed, unharmed, write_array, write_json
from losses import LOSSES

FORMAT = 2
# By task: what its rows are called, and a file of them
NOUNS = {"preferences": "preferences", "sft": "SFT rows", "kto": "judged responses"}
EXAMPLES = {"preferences": "prefs.jsonl", "sft": "sft.jsonl", "kto": "judged.jsonl"}


def command(folder, task="preferences", sources=(), model=None):
    """The command that packs `sources` into `folder`."""
    words = ["python", "data_prep.py", *([] if task == "preferences" else ["--task", task])]
    words += ["--in", *(sources or [EXAMPLES[task]]), "--out", folder]
    return shlex.join(map(str, words + (["--model_name_or_path", model] if model else [])))


def write_packed(folder, pairs, meta, labels=None):
    """Write the arrays of `pairs`, an iterable of (prompt, chosen, rejected) id sequences; meta.json comes last.

    labels: of KTO data, whether each response is desirable.

    The old meta.json is removed first, so that a job killed half-way leaves a folder that no one takes for finished.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    chunks, bounds, end = [], [], 0
    for parts in pairs:
        row = [end]
        for ids in parts:
            chunks.append(np.asarray(ids, dtype=np.uint32))
            row.append(row[-1] + len(ids))
        bounds.append(row)
        end = row[-1]
    tokens = np.concatenate(chunks) if chunks else np.zeros(0, np.uint32)
    bounds = np.asarray(bounds, np.int64).reshape(-1, 4)
    write_array(folder / "tokens.npy", tokens)
    write_array(folder / "bounds.npy", bounds)
    if labels is not None:
        labels = np.asarray(labels, bool)
        write_array(folder / "labels.npy", labels)
        meta = meta | {"labels": fingerprint(labels)}
    data = content_fingerprint(tokens, bounds, meta)
    write_json(folder / "meta.json", sealed({"format": FORMAT, "fingerprint": data, "pairs": len(bounds), **meta}))


def content_fingerprint(tokens, bounds, meta):
    """What scores and runs are keyed by: the tokens, and what they mean; not where they came from."""
    labels = [meta["labels"]] if "labels" in meta else []
    return fingerprint(tokens, bounds, meta["tokenizer"], meta["end_token_id"], *labels)


class Packed:
    """Memory-mapped reader of a packed/ folder. packed[i] -> (prompt, chosen, rejected), uint32 arrays."""

    def __init__(self, folder):
        self.folder = Path(folder)
        mend = command(folder)
        self.meta = read_json(self.folder / "meta.json", mend)
        if self.meta.get("format") != FORMAT:
            raise InputError(f"{folder}/meta.json: format {self.meta.get('format')}, expected {FORMAT}; run: {mend}")
        unharmed(self.meta, self.folder / "meta.json", mend)
        mend = command(folder, self.task)
        self.tokens, self.bounds = (open_array(self.folder / f"{name}.npy", mend) for name in ("tokens", "bounds"))
        if self.bounds.shape != (self.meta["pairs"], 4) or len(self.bounds) and self.bounds[-1, 3] != len(self.tokens):
            raise InputError(f"{folder}: tokens.npy, bounds.npy and meta.json disagree; run: {mend}")
        if content_fingerprint(self.tokens, self.bounds, self.meta) != self.meta["fingerprint"]:
            raise InputError(f"{folder}: tokens.npy or bounds.npy is not as it was written; run: {mend}")
        if not len(self.bounds):
            raise InputError(f"{folder}: holds no pair; run: {mend}")
        # (pairs, 3) where in noise-k.npy a pair's chosen starts, its rejected starts, and both end
        lengths = np.diff(self.bounds[:, 1:], axis=1)  # (pairs, 2) response tokens
        self.noise_bounds = np.concatenate(([0], lengths.cumsum()))[2 * np.arange(len(lengths))[:, None] + np.arange(3)]

    @property
    def task(self):
        """The task, a name of NOUNS; a folder that does not name one holds preferences."""
        return self.meta.get("task", "preferences")

    @property
    def remake(self):
        """The command that packs the same source again."""
        return command(self.folder, self.task, list(self.files))

    @property
    def files(self):
        """{file: pairs kept of it}, in the order of the pairs. meta.json lists the files if there are several."""
        return self.meta.get("files") or {self.meta["source"]: self.meta["pairs"]}

    def file_of(self, index):
        """The file that a pair came from."""
        ends = np.cumsum(list(self.files.values()))
        return list(self.files)[np.searchsorted(ends, index, side="right")]

    def need(self, *tasks):
        """Refuse data of another task than `tasks`."""
        if self.task not in tasks:
            loss = next(name for name, loss in LOSSES.items() if loss.tasks[0] == self.task)
            raise InputError(
                f"{self.folder}: holds {NOUNS[self.task]}, expected {NOUNS[tasks[0]]}; pack those into another folder "
                f"({command(f'{self.folder}-{tasks[0]}', tasks[0])}), or give --loss_type {loss}"
            )

    def lines(self):
        """(pairs,) int64: each pair's line in the source."""
        return self.column("lines")

    def labels(self):
        """(rows,) bool: whether each response of KTO data is desirable."""
        return self.column("labels")

    def column(self, name):
        """The array in NAME.npy, of which meta.json has the fingerprint."""
        path = self.folder / f"{name}.npy"
        column = open_array(path, self.remake)
        if fingerprint(column) != self.meta.get(name):
            raise InputError(f"{path}: is not as it was written; run: {self.remake}")
        return column

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, index):
        start, *ends = self.bounds[index]
        return tuple(self.tokens[a:b] for a, b in zip((start, *ends), ends))

    def content(self, index):
        """All ids of a pair, which its noise is keyed by."""
        return self.tokens[self.bounds[index, 0] : self.bounds[index, 3]]


def longest(packed):
    """(index, side) of the longest prompt and response; side 0 is chosen, 1 rejected."""
    lengths = np.diff(packed.bounds, axis=1)  # (pairs, 3)
    return divmod(int((lengths[:, :1] + lengths[:, 1:]).argmax()), 2)
