"""A run's folder on disk: run.json, log.jsonl, checkpoints/step-N/, final/.

A checkpoint is written under a temporary name and renamed when it is complete; final/ appears last. A run is finished
when final/ is there. An unfinished one resumes from its newest checkpoint, its log cut back to it.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import config
import losses
from files import InputError, file_sha256, hold, naming, owner, read_json, read_sealed, replacing, sealed, write_json
from scoring import reference

# Arguments that may differ when a run is resumed: where things are, how often it prints and saves, how work is divided.
FREE = set(
    """
    task preference_data_path split columns ignore_columns reasoning template on_bad_row num_proc max_length data
    output_dir
    resume_from_checkpoint local_rank logging_steps save_steps save_total_limit eval_steps report_to run_name
    tokens_per_forward gradient_checkpointing deepspeed model_name_or_path trust_remote_code ranks
    """.split()
)
STREAMING = "ds_configs/zero3_offload_4080.json"  # keeps the weights on the host
ACCUMULATION = "gradient_accumulation_steps"  # may differ, too, with another number of ranks


def streaming_config(ds_config):
    """The ds_config that streams the weights of a run to one card when the model is sampled; None where all fit.

    ds_config: of the run, a path or None. Under ZeRO-3 without offload_param, several cards held the weights.
    """
    try:
        zero = read_json(ds_config or os.devnull, "")["zero_optimization"]
        if zero["stage"] != 3:
            return None
        return ds_config if zero.get("offload_param") else STREAMING
    except (InputError, KeyError, TypeError):
        return None


class Run:
    """Reader and writer of one output_dir."""

    def __init__(self, output_dir):
        self.folder = Path(output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.log_path = self.folder / "log.jsonl"
        self.scores_path = self.folder / "scores.jsonl"
        self.skipped_path = self.folder / "skipped.jsonl"

    @property
    def final(self):
        return self.folder / "final"

    @property
    def finished(self):
        return any((self.final / name).exists() for name in ("config.json", "adapter_config.json"))

    def saved(self):
        """Complete checkpoints, oldest first: [(step, path)]."""
        found = []
        for path in self.checkpoints.glob("step-*"):
            step = path.name.removeprefix("step-")
            if step.isdigit() and (path / "state.json").exists():
                found.append((int(step), path))
        return sorted(found)

    def start_from(self, wanted):
        """The checkpoint to resume from, or None to start a new run.

        wanted: None or "latest" for the newest complete one, or a path. Raises InputError for one that is damaged.
        """
        if wanted in (None, "latest"):
            return self.newest(required=wanted == "latest")
        path = Path(wanted)
        if not (path / "state.json").exists():
            known = ", ".join(str(path) for _, path in self.saved()) or "none"
            raise InputError(f"--resume_from_checkpoint {wanted}: not a checkpoint of this project; there are: {known}")
        if path.resolve().parent != self.checkpoints.resolve():
            raise InputError(
                f"--resume_from_checkpoint {wanted}: a checkpoint holds pickles, which may hold code, and only "
                f"{self.checkpoints} is trusted; if you trust this one, copy it there"
            )
        if why := torn(path):
            raise InputError(
                f"--resume_from_checkpoint {wanted}: {why}; name another, or leave it out for the newest complete one"
            )
        return path

    def newest(self, required):
        """The newest complete checkpoint, or None if none was saved; required: None is refused, too."""
        saved = self.saved()
        if required and not saved:
            raise InputError(
                f"--resume_from_checkpoint latest: {self.checkpoints} holds no checkpoint; "
                "leave the flag out to start the run"
            )
        for _, path in reversed(saved):
            why = torn(path)
            if not why:
                return path
            print(f"{path}: {why}; trying the one before it", file=sys.stderr, flush=True)
        if saved:
            raise InputError(
                f"{self.checkpoints}: none of its {len(saved)} checkpoint(s) is complete; give another "
                "--output_dir, or remove that folder to start again"
            )
        return None

    def check_same(self, arguments, inputs):
        """Raise InputError if the run in this folder was started with other arguments or other inputs."""
        if not (self.finished or self.saved()):
            return  # there is nothing that could be mixed up
        record = read_sealed(self.folder / "run.json", "another --output_dir")
        self.check_batch(record["arguments"], arguments)
        free = set(FREE)
        if record["arguments"].get("ranks", 1) != arguments.get("ranks", 1):
            free.add(ACCUMULATION)
        fixed = {name: value for name, value in without_home(arguments).items() if name not in free}
        # An argument that is newer than the run had no other value than its default
        defaults = {item.name: item.default for group in config.GROUPS for item in dataclasses.fields(group)}
        for there, here in ((defaults | record["arguments"], fixed), (record["inputs"], inputs)):
            for name, value in here.items():
                if there.get(name) != value:
                    raise InputError(
                        f"{self.folder}: that run has {name} = {there.get(name)}, this one {value}; "
                        "give this one another --output_dir, or the same value"
                    )

    def check_batch(self, there, here):
        """Refuse another number of ranks if a step would have another number of micro-batches in all."""
        accumulated, accumulates = there.get(ACCUMULATION, 1), here.get(ACCUMULATION, 1)
        ranks, world = there.get("ranks", 1), here.get("ranks", 1)
        batches = accumulated * ranks
        if ranks == world or batches == accumulates * world:
            return
        mend = f"--{ACCUMULATION} {batches // world}" if batches % world == 0 else f"ranks that divide {batches}"
        raise InputError(
            f"{self.folder}: that run has {accumulated} micro-batches a step on each of {ranks} rank(s), this one "
            f"{accumulates} on {world}, which is another batch; give this one {mend}"
        )

    def lock(self):
        """Take this folder for this process until it ends. Raises InputError if another run has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / ".lock"
        self.held = hold(lock)
        if not self.held:
            raise InputError(
                f"{self.folder}: a run is using it ({owner(lock)}); wait for it, or give another --output_dir"
            )

    def arguments(self):
        """The arguments that the run was started with."""
        return read_sealed(self.folder / "run.json", "another --output_dir")["arguments"]

    def begin(self, arguments, inputs, versions, steps, start=0):
        """Write run.json, all that is needed to say what made these weights. Removes what a killed save left.

        steps: of the complete run. start: the step that this process resumes after; earlier starts stay listed.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(".step-*"):
            shutil.rmtree(leftover)
        starts = read_sealed(self.folder / "run.json", "another --output_dir")["starts"] if start else []
        starts.append({"after_step": start, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        record = {
            "arguments": without_home(arguments),
            "inputs": inputs,
            "start_is_folder": os.path.isdir(arguments["model_name_or_path"]),
            "versions": {"python": platform.python_version(), **versions},
            "git_commit": git_commit(),
            "command": without_home(["python", *sys.argv]),
            "steps": steps,
            "starts": starts,
        }
        write_json(self.folder / "run.json", sealed(record))

    def cut_log(self, step, pending=False):
        """Keep what log.jsonl, scores.jsonl and skipped.jsonl have up to `step`, and no later checkpoint.

        pending: the evaluation after `step` is still to be made, so its line and its held-out scores are not kept.
        """
        for later, path in self.saved():
            if later > step:  # resuming from it would leave a gap in the log
                print(f"{path}: its steps will be made again; removed", flush=True)
                self.drop(path)

        def is_kept(row, path):
            of_evaluation = path == self.log_path or row.get("split") == "eval"
            return row["step"] <= step and not (pending and row["step"] == step and of_evaluation)

        for path in (self.log_path, self.scores_path, self.skipped_path):
            if path.exists():
                self.keep_lines(path, is_kept)

    def keep_lines(self, path, is_kept):
        """Rewrite a file with the lines for which is_kept(row, path) is true, up to one that is not complete."""
        with replacing(path) as kept, open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    if is_kept(json.loads(line), path):
                        kept.write(line.rstrip("\n") + "\n")
                except (ValueError, KeyError):
                    break

    def add(self, path, lines):
        """Append lines to one of those files."""
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


def arguments_of(given):
    """What run.json has of config.Arguments: {name: value} of all groups, and the number of ranks."""
    arguments = {"ranks": int(os.environ.get("WORLD_SIZE", 1))}
    for group in given:
        arguments |= dataclasses.asdict(group)
    return arguments


def finished(given):
    """What to say if the run of config.Arguments is finished; None if there is something to do. Imports no torch."""
    run = Run(given.train.output_dir)
    if not run.finished:
        return None
    prepared = reference.prepare(given.data, given.model, given.noise, losses.leading(given.train.loss_type).tasks)
    run.check_same(arguments_of(given), prepared.wanted)
    return f"{run.final}: this run is finished; another needs another --output_dir"


def without_home(value):
    """Arguments or a command with ~ for the home folder at the start of a path: it is in files that are shared."""
    if isinstance(value, dict):
        return {name: without_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_home(each) for each in value]
    home = os.path.expanduser("~").rstrip("/")
    if not home or not isinstance(value, str):
        return value
    return re.sub(rf"(?<![^\s=,:]){re.escape(home)}(?=/|$)", "~", value)


def places(run, record, name):
    """Where a folder that run.json names may be: at the same place relative to the run, or at the path it names."""
    arguments = record["arguments"]
    path = os.path.expanduser(arguments[name])
    return [run / os.path.relpath(path, os.path.expanduser(arguments["output_dir"])), Path(path)]


def digests(folder):
    """{name: [bytes, sha256]} of all files under `folder` except state.json, each forced to the disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "state.json":
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
    """What is wrong with a checkpoint, or "" if every file is as it was written."""
    try:
        for name, (size, digest) in read_sealed(path / "state.json", "another checkpoint")["files"].items():
            file = path / name
            inside = file.resolve().is_relative_to(path.resolve())
            if not inside or file.stat().st_size != size or file_sha256(file) != digest:
                return f"{name} is not as it was written"
    except (InputError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"not complete ({' '.join(str(error).split())[:150]})"
    return ""


def git_commit():
    """The commit of the code, "-dirty" if files differ from it; None outside a clone."""
    here = Path(__file__).resolve().parent.parent

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
