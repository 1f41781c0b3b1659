"""What tests run on: a model of 60,000 parameters, pairs of random ids; and how they run our scripts."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import preloaded
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config
import files
from cli import exits
from models import tokenization
from models.llada import LLaDAConfig, LLaDAModelLM
from preferences import packed
from reasoning import arguments

EOS, MASK, VOCAB = 2, 3, 512
AVX512 = (
    "AVX512" in torch.backends.cpu.get_cpu_capability()
)  # without it torch sums bfloat16 products in another order, and slowly
ENV = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# prompt, chosen, rejected: a response of 1 token beside one of 200, and fewer tokens than denoising steps
LENGTHS = [
    (5, 1, 200),
    (7, 200, 1),
    (4, 12, 9),
    (6, 2, 3),
    (3, 30, 1),
    (9, 5, 40),
    (4, 1, 1),
    (8, 17, 23),
    (5, 3, 2),
    (6, 8, 13),
    (2, 7, 7),
    (5, 25, 4),
    (3, 11, 19),
    (7, 6, 2),
    (4, 9, 10),
    (6, 1, 33),
    (5, 14, 6),
    (8, 4, 21),
    (3, 16, 5),
]


def make_model(folder, tokenizer_dir, seed=0, width=32):
    """A LLaDA folder with the tokenizer of `tokenizer_dir`, weights large enough that predictions differ."""
    torch.manual_seed(seed)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=width,
            n_layers=2,
            n_heads=4,
            mlp_hidden_size=48,
            vocab_size=VOCAB,
            max_sequence_length=512,
            rope_theta=10000.0,
            init_std=0.2,
            mask_token_id=MASK,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )
    model.save_pretrained(folder)
    for path in Path(tokenizer_dir).glob("token*"):
        shutil.copy(path, folder)
    return Path(folder)


def make_pairs(lengths, seed=0):
    """Random ids, the responses ending in eos."""
    rng = np.random.default_rng(seed)

    def ids(n):
        return rng.integers(4, VOCAB, n).tolist()

    return [(ids(p), ids(w - 1) + [EOS], ids(l - 1) + [EOS]) for p, w, l in lengths]


def pack(folder, pairs, model, labels=None):
    """packed/ of `pairs` as data_prep.py writes it; with labels of KTO's rows."""
    tokenizer, lines = tokenization.load_tokenizer(str(model)), np.arange(1, len(pairs) + 1)
    packed.write_packed(
        folder,
        pairs,
        {
            "lines": files.fingerprint(lines),
            "tokenizer": tokenization.tokenizer_fingerprint(tokenizer),
            "source": "prefs.jsonl",
            "model_name_or_path": str(model),
            "end_token_id": EOS,
            "pad_token_id": EOS,
            "mask_token_id": MASK,
            "template": "none",
            **({"task": "kto"} if labels else {}),
        },
        labels,
    )
    files.write_array(Path(folder) / "lines.npy", lines)
    return Path(folder)


ADAPTER_LENGTHS = [(5, 7, 20), (4, 12, 9), (6, 2, 3), (3, 11, 5), (2, 9, 4), (4, 4, 8)]
ADAPTER_RUN = {  # flags of three steps of LoRA
    "use_mixed_precision": "no",
    "eval_fraction": 0.2,
    "learning_rate": 1e-2,
    "warmup_ratio": 0,
    "max_steps": 3,
    "gradient_accumulation_steps": 1,
    "tokens_per_forward": 100,
    "lora_r": 4,
    "lora_alpha": 8,
}


def make_home(folder, tiny_dir, lengths, seed):
    """A folder with a model and packed random pairs of these lengths."""
    model = make_model(folder / "model", tiny_dir)
    return SimpleNamespace(folder=folder, model=model, data=pack(folder / "packed", make_pairs(lengths, seed), model))


def ds_config(path, base, **adam):
    """ds_configs/BASE.json for a tiny model: everything partitioned, torch's AdamW with the parameters `adam`.

    zero2 is zero2_offload_4080 with the optimizer left in place.
    """
    shipped = "zero2_offload_4080" if base == "zero2" else base
    settings = json.loads((ROOT / "ds_configs" / f"{shipped}.json").read_text())
    settings["optimizer"]["params"].update({"torch_adam": True, **adam})
    settings["zero_force_ds_cpu_optimizer"] = False
    if base == "zero2":
        del settings["zero_optimization"]["offload_optimizer"]
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(settings))
    return str(path)


def settings(**options):
    """SampleArguments on the CPU, checked and filled in."""
    sample = config.SampleArguments(device="cpu", **options)
    arguments.check(sample)
    return sample


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@contextmanager
def alone():
    """One rank in this process: afterwards the next script can start its own."""
    before = {name: os.environ.pop(name, None) for name in LAUNCHER}
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def last_of_each(argv):
    """Words of a command line; of a flag that a test gives again, the last: the commands themselves refuse the second.

    A flag and its value in one word, --name=value, are left alone.
    """
    found, name = {"": []}, ""
    for word in map(str, argv):
        if word.startswith("--"):
            name = word
            found.pop(name, None)
        found.setdefault(name, []).append(word)
    return [word for words in found.values() for word in words]


def call(main, *argv):
    """A script's main() in this process."""
    with alone():
        return main(last_of_each(argv))


def refusal(main, capsys, *argv):
    """The sentence with which a script refuses `argv`, as its command line prints it."""
    capsys.readouterr()
    try:
        exits.run(lambda: call(main, *argv))
    except SystemExit as end:
        assert end.code == 2, end.code
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    return said[said.index("error: ") :].splitlines()[0]


def environment(**more):
    """The variables of a script under test: one rank, one thread, no GPU, no network."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER} | ENV | more


@functools.cache
def server():
    """This process's server of forked scripts (preloaded.py); None outside pytest, and with PRELOAD=0."""
    if "pytest" not in sys.modules or os.environ.get("PRELOAD") == "0":
        return None
    return preloaded.Server(tempfile.mkdtemp(prefix="preloaded-"), environment())


def start(command, world=None, env=None, **options):
    """Start a script of ours (bare, or by torchrun on `world` ranks) in a session of its own.

    env: its environment, by default environment(). options: those of subprocess.Popen; without them stdout and stderr
    share a pipe.
    """
    words, env = last_of_each(command), env or environment()
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    if server() and server().serves(env):
        return preloaded.Process(server(), words, env, world, **options)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world else []
    return subprocess.Popen([sys.executable, *launcher, *words], env=env, start_new_session=True, **options)


def execute(command, timeout=600, **options):
    """Run a script of ours to its end, as subprocess.run does: the result has returncode, stdout and stderr.

    options: those of start().
    """
    process = start(command, stderr=subprocess.PIPE, **options)
    try:
        said, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{command} hangs:\n{process.communicate(timeout=60)}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def run(command, world=None, code=0, timeout=600):
    """Run it to its end, which must be `code`; returns what it printed."""
    process = start(command, world)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which a SIGKILL of it would leave behind
        raise AssertionError(f"{command} hangs:\n{process.communicate(timeout=60)[0][-3000:]}") from None
    assert process.returncode == code, said[-5000:]
    return said


def shell_environment(fresh=False, **more):
    """The variables of a shell in which this Python's environment is active; its `python` and `python3` ask server().

    fresh: they are this Python itself, as they are where a GPU would be used.
    """
    place = f"{sys.prefix}/bin:{os.environ['PATH']}"
    if fresh or torch.cuda.is_available() or not server():
        return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": place} | more
    return environment(VIRTUAL_ENV=sys.prefix, PATH=f"{server().folder}/bin:{place}", **more)


def shell(command, folder, fresh=False, **environment):
    """Run a line as its reader would, with this Python's environment active; returns as subprocess.run does."""
    env = shell_environment(fresh, **environment)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)


def copy_of_the_repository(folder):
    """Copy the files that git tracks, or would if they were added, as they are now."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_jobs(folder, world, jobs, timeout=600):
    """Run `jobs` (name, script, arguments) one after the other in one worker.py per rank; {name: [what each rank did]}.

    One start instead of many: most of a tiny run's time is the start.
    """
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([[name, script, last_of_each(argv)] for name, script, argv in jobs]))
    run([ROOT / "tests" / "worker.py", folder], world, timeout=timeout)
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(world or 1)]
        for name, _, _ in jobs
    }


# Fields of log.jsonl that differ from run to run
VARIES = ("pairs_per_second", "tokens_per_second", "seconds_left", "host_peak_gib", "gpu_peak_gib")


def numbers(output_dir):
    """The lines of log.jsonl without the fields that vary."""
    lines = log(output_dir)
    for line in lines:
        for name in line.keys() & VARIES:
            del line[name]
    return lines


def log(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
