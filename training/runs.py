"""A run's folder on disk: run.json, log.jsonl, checkpoints/step-N/, final/.

A checkpoint is written under a temporary name and renamed when whole; final/ appears last. A run is finished when
final/ is there; an unfinished one goes on from its newest checkpoint, its log cut back to it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from files import InputError, file_sha256, hold, naming, owner, read_sealed, replacing, sealed, write_json

# These may differ when a run goes on: where things are, how often it speaks and saves, how the work is cut.
FREE = {
    "task",
    "preference_data_path",
    "split",
    "columns",
    "template",
    "on_bad_row",
    "num_proc",
    "max_length",
    "data",
    "output_dir",
    "resume_from_checkpoint",
    "local_rank",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "report_to",
    "run_name",
    "states_per_forward",
    "gradient_checkpointing",
    "deepspeed",
    "model_name_or_path",
    "trust_remote_code",
    "ranks",
}


class Run:
    """Reader and writer of one output_dir."""

    def __init__(self, output_dir):
        self.folder = Path(output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.log_path, self.scores_path, self.skipped_path = (
            self.folder / f"{name}.jsonl" for name in ("log", "scores", "skipped")
        )

    @property
    def final(self):
        return self.folder / "final"

    @property
    def finished(self):
        return any((self.final / name).exists() for name in ("config.json", "adapter_config.json"))

    def saved(self):
        """Complete checkpoints, oldest first: [(step, path)]."""
        found = [
            (int(path.name[5:]), path)
            for path in self.checkpoints.glob("step-*")
            if path.name[5:].isdigit() and (path / "state.json").exists()
        ]
        return sorted(found)

    def start_from(self, wanted):
        """The checkpoint to go on from, or None for a fresh start. `wanted`: None or latest (the newest whole one), or a path."""
        saved = self.saved()
        if wanted in (None, "latest"):
            if wanted and not saved:
                raise InputError(
                    f"--resume_from_checkpoint latest: {self.checkpoints} holds no checkpoint; "
                    "leave the flag out to start the run"
                )
            for _, path in reversed(saved):
                if not (why := torn(path)):
                    return path
                print(f"{path}: {why}; passed over", file=sys.stderr, flush=True)
            if saved:
                raise InputError(
                    f"{self.checkpoints}: none of its {len(saved)} checkpoint(s) is whole; give another --output_dir, or "
                    "remove that folder to begin anew"
                )
            return None
        path = Path(wanted)
        if not (path / "state.json").exists():
            known = ", ".join(str(item) for _, item in saved) or "none"
            raise InputError(f"--resume_from_checkpoint {wanted}: not a checkpoint of this project; there are: {known}")
        if path.resolve().parent != self.checkpoints.resolve():
            raise InputError(
                f"--resume_from_checkpoint {wanted}: a checkpoint holds pickles, which may hold code, and only {self.checkpoints} "
                "is trusted; if you trust this one, copy it there"
            )
        if why := torn(path):
            raise InputError(
                f"--resume_from_checkpoint {wanted}: {why}; name another, or leave the flag out for the newest whole one"
            )
        return path

    def check_same(self, arguments, inputs):
        """Refuse to go on with a run that other arguments or other inputs started. Other ranks may, if a step has as many pairs."""
        if not (self.finished or self.saved()):
            return  # nothing there that could be mixed up
        before = read_sealed(self.folder / "run.json", "another --output_dir")
        steps = "gradient_accumulation_steps"
        (there, ranks), (here, world) = (
            (each.get(steps, 1), each.get("ranks", 1)) for each in (before["arguments"], arguments)
        )
        if ranks != world and there * ranks != here * world:
            more = (
                f"--{steps} {there * ranks // world}"
                if there * ranks % world == 0
                else f"ranks that divide {there * ranks}"
            )
            raise InputError(
                f"{self.folder}: that run has {there} micro-batches a step on each of {ranks} rank(s), this one {here} on "
                f"{world}, which is another batch; give this one {more}"
            )
        free = FREE | ({steps} if ranks != world else set())
        pairs = [
            (name, before["arguments"].get(name), value)
            for name, value in without_home(arguments).items()
            if name not in free
        ]
        pairs += [(name, before["inputs"].get(name), value) for name, value in inputs.items()]
        for name, old, new in pairs:
            if old != new:
                raise InputError(
                    f"{self.folder}: that run has {name} = {old}, this one {new}; "
                    "give this one another --output_dir, or the same value"
                )

    def lock(self):
        """Refuse this folder if another run has it; else it is ours until this process ends, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = hold(self.folder / ".lock")
        if not self.held:
            raise InputError(
                f"{self.folder}: a run is using it ({owner(self.folder / '.lock')}); wait for it, or give another --output_dir"
            )

    def arguments(self):
        """Those that the run began with."""
        return read_sealed(self.folder / "run.json", "another --output_dir")["arguments"]

    def begin(self, arguments, inputs, versions, steps, start=0):
        """Write run.json; everything needed to say what made these weights. What a killed save left goes.

        steps: of the whole run; start: that after which this process goes on, which joins those of the processes before it.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for left in self.checkpoints.glob(".step-*"):
            shutil.rmtree(left)
        starts = read_sealed(self.folder / "run.json", "another --output_dir")["starts"] if start else []
        write_json(
            self.folder / "run.json",
            sealed(
                {
                    "arguments": without_home(arguments),
                    "inputs": inputs,
                    "start_is_folder": os.path.isdir(arguments["model_name_or_path"]),
                    "versions": {"python": platform.python_version(), **versions},
                    "git_commit": git_commit(),
                    "command": without_home(["python", *sys.argv]),
                    "steps": steps,
                    "starts": starts + [{"after_step": start, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}],
                }
            ),
        )

    def cut_log(self, step, pending=False):
        """Keep the lines of log.jsonl, scores.jsonl and skipped.jsonl up to `step`; a torn last line goes too. pending: that step's
        evaluation is still to be made, so that its line, and scores of held-out pairs, are written anew. Later checkpoints go, too."""
        for later, path in self.saved():
            if later > step:  # gone on from, it would leave a gap in the log
                print(f"{path}: of steps that are made anew; removed", flush=True)
                self.drop(path)
        for path in (self.log_path, self.scores_path, self.skipped_path):
            if not path.exists():
                continue
            with replacing(path) as kept, open(path, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        row = json.loads(line)
                        again = (
                            pending and row["step"] == step and (path == self.log_path or row.get("split") == "eval")
                        )
                        if row["step"] <= step and not again:
                            kept.write(line.rstrip("\n") + "\n")
                    except (ValueError, KeyError):
                        break

    def add(self, path, lines):
        """Lines to one of those files."""
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def temporary(self, step):
        """Name under checkpoints/ to write a checkpoint to, before `keep` makes it count."""
        return f".step-{step}.tmp"

    def keep(self, step, state, limit):
        """Make a written checkpoint count, with the digest of each of its files, and drop the oldest beyond `limit`."""
        work = self.checkpoints / self.temporary(step)
        write_json(work / "state.json", sealed(state | {"files": digests(work)}))
        for path in (self.log_path, self.scores_path, self.skipped_path):  # never behind the checkpoint
            if path.exists():
                synchronize(path)
        target = self.checkpoints / f"step-{step}"
        self.drop(target)
        os.replace(work, target)
        for folder in (target, self.checkpoints):
            synchronize(folder)
        for _, old in self.saved()[:-limit] if limit > 0 else []:
            self.drop(old)

    def drop(self, path):
        """Remove a checkpoint: renamed first, so that a half-deleted one is never found."""
        if path.exists():
            gone = path.with_name(f".{path.name}.old")
            if gone.exists():
                shutil.rmtree(gone)
            os.replace(path, gone)
            shutil.rmtree(gone)


def without_home(value):
    """Arguments or a command with the home folder as ~ wherever a path begins with it: a run's folder is shared, its user's name is not."""
    if isinstance(value, dict):
        return {name: without_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_home(each) for each in value]
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![^\s=,:]){re.escape(home)}(?=/|$)", "~", value) if home and isinstance(value, str) else value


def places(run, record, name):
    """Where a folder that run.json names may be: as far from the run's folder as it was, or as it is written there."""
    arguments = record["arguments"]
    path = os.path.expanduser(arguments[name])
    return [run / os.path.relpath(path, os.path.expanduser(arguments["output_dir"])), Path(path)]


def digests(folder):
    """{name: [bytes, sha256]} of all files under `folder` but state.json, each forced to the disk."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "state.json"):
        synchronize(path)
        found[str(path.relative_to(folder))] = [path.stat().st_size, file_sha256(path)]
    return found


def synchronize(path):
    """Force a file, or a folder's list of names, to the disk: a rename alone does not survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def torn(path):
    """What is wrong with a checkpoint, "" if every file is as it was written."""
    try:
        files = read_sealed(path / "state.json", "another checkpoint")["files"]
        for name, (size, digest) in files.items():
            if (
                not (path / name).resolve().is_relative_to(path.resolve())
                or (path / name).stat().st_size != size
                or file_sha256(path / name) != digest
            ):
                return f"{name} is not as it was written"
    except (InputError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"not whole ({' '.join(str(error).split())[:150]})"
    return ""


def git_commit():
    """The commit of the code, "-dirty" if changed; None outside a clone."""
    here = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
        ).stdout
        return commit + ("-dirty" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
