"""Tests of optimizer states on an SSD: the numbers of states in host memory, a kill, other ranks, what is refused.

bash tests/run.sh tests/training/test_nvme.py
"""

import json
import os
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
from small import ROOT, call, flags, log, make_model, make_pairs, numbers, pack, run, run_jobs, start

import plan
from config import ModelArguments, TrainArguments
from files import InputError
from training import deepspeed_config, nvme

CLOSE = 2e-5  # between the losses of two worlds in float32, which add up in another order
NOISE = flags(diffusion_steps=2, trajectories=2, tokens_per_forward=100)
TRAIN = flags(
    eval_fraction=0.2, learning_rate=1e-3, warmup_ratio=0, max_steps=4, save_steps=2, save_total_limit=0, eval_steps=4
)


def has_libaio():
    try:
        nvme.load_extension()
    except InputError:
        return False
    return True


swaps = pytest.mark.skipif("not has_libaio()", reason="libaio is not installed: apt install libaio-dev")


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    """A model whose matrices have more than 1 MiB, so that states and gradients are swapped; its ds_configs."""
    folder = tmp_path_factory.mktemp("nvme")
    model = make_model(folder / "model", tiny_dir, width=512)
    data = pack(folder / "packed", make_pairs([(5, 7, 20), (4, 12, 9), (6, 2, 3), (3, 11, 5), (2, 9, 4)], 3), model)
    configs = {}
    for name in ("nvme", "offload"):
        config = json.loads((ROOT / "ds_configs" / f"zero3_{name}_4080.json").read_text())
        config["zero_optimization"] |= {"sub_group_size": 600_000, "stage3_param_persistence_threshold": 0}
        configs[name] = folder / f"{name}.json"
        configs[name].write_text(json.dumps(config))
    precisions = ("no", "bf16")
    run_jobs(folder / "out", None, [(each, "score", scoring(data, each)) for each in precisions])
    return SimpleNamespace(folder=folder, data=data, configs=configs)


def scoring(data, precision):
    return ["--data", data, *NOISE, "--use_mixed_precision", precision]


def training(home, name, out, *more, precision="no"):
    """train_dpo.py's arguments under a ds_config of `home`."""
    argv = [*scoring(home.data, precision), *TRAIN, "--deepspeed", home.configs[name], "--output_dir", out, *more]
    return [*argv, *(() if "--gradient_accumulation_steps" in more else ("--gradient_accumulation_steps", 2))]


def forget(folder, after):
    """Take a run back to its checkpoint of the step `after`."""
    shutil.rmtree(folder / "final")
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)


def weights(folder):
    [path] = (folder / "final").glob("*model.safetensors")
    return path.read_bytes()


@swaps
def test_the_numbers_of_states_in_host_memory(home, tmp_path):
    """Losses, evaluations and final weights to the last digit, in float32 and bf16, with adapters, and when resumed
    under the other ds_config; no swap files are left."""
    kinds = {"no": (), "bf16": (), "lora": ("--lora_r", 64)}
    jobs = []
    for kind, more in kinds.items():
        precision = "no" if kind == "lora" else kind
        for name in home.configs:
            out = tmp_path / f"{name}-{kind}"
            jobs.append((out.name, "train_dpo", training(home, name, out, *more, precision=precision)))
    for name, did in run_jobs(tmp_path / "out", None, jobs).items():
        assert did[0]["error"] == "" and len(did[0]["items"]) == 4, (name, did)
    for kind in kinds:
        mine, want = (tmp_path / f"{name}-{kind}" for name in ("nvme", "offload"))
        assert numbers(mine) == numbers(want) and weights(mine) == weights(want), kind
        assert not (mine / "nvme").exists()
    moved = []
    for before, name in (("nvme", "offload"), ("offload", "nvme"), ("nvme", "nvme")):
        out = tmp_path / f"{before}-then-{name}"
        shutil.copytree(tmp_path / f"{before}-no", out)
        forget(out, 2)
        moved.append((out.name, "train_dpo", training(home, name, out)))
    for name, did in run_jobs(tmp_path / "out2", None, moved).items():
        assert did[0]["error"] == "" and sorted(map(int, did[0]["items"])) == [2, 3], (name, did)
        assert numbers(tmp_path / name) == numbers(tmp_path / "offload-no"), name
        assert weights(tmp_path / name) == weights(tmp_path / "offload-no"), name


@swaps
def test_a_kill(home, tmp_path):
    """Killed while it trains, the run leaves swap files, and goes on from its checkpoint to the same weights."""
    argv = [ROOT / "train_dpo.py", *training(home, "nvme", tmp_path / "run")]
    process = start(argv)
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "run" / "nvme").rglob("exp_avg_sq-*.swp"))
    said = run(argv)
    assert "resuming after step 2" in said and not (tmp_path / "run" / "nvme").exists(), said
    run([ROOT / "train_dpo.py", *training(home, "offload", tmp_path / "whole")])
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@swaps
@pytest.mark.long
def test_other_ranks(home, tmp_path):
    """Two steps on one rank, one on two, one on one again, two pairs a step: the losses of one rank alone."""

    def job(name, world):
        argv = training(home, "nvme", tmp_path / name, "--gradient_accumulation_steps", 2 // world, "--save_steps", 1)
        [did] = run_jobs(tmp_path / f"out-{name}-{world}", world, [(name, "train_dpo", argv)]).values()
        assert [rank["error"] for rank in did] == [""] * world

    job("alone", 1)
    shutil.copytree(tmp_path / "alone", tmp_path / "moved")
    forget(tmp_path / "moved", 2)
    job("moved", 2)
    forget(tmp_path / "moved", 3)
    job("moved", 1)
    alone, moved = log(tmp_path / "alone"), log(tmp_path / "moved")
    assert [line["step"] for line in moved] == [1, 2, 3, 4]
    for mine, want in zip(moved, alone):
        assert mine["loss"] == pytest.approx(want["loss"], abs=CLOSE)


@swaps
@pytest.mark.parametrize("width, words", [(520, "multiples of 128 elements, which this model's are not")])
def test_a_model_whose_gradients_cannot_be_read_back(home, tiny_dir, tmp_path, width, words):
    """DeepSpeed would not notice, and train on with other gradients."""
    model = make_model(tmp_path / "model", tiny_dir, width=width)
    data = pack(tmp_path / "packed", make_pairs([(5, 7, 20), (4, 12, 9)], 3), model)
    home = SimpleNamespace(data=data, configs=home.configs)
    jobs = [("score", "score", scoring(data, "no"))]
    jobs += [("train", "train_dpo", training(home, "nvme", tmp_path / "run", "--eval_fraction", 0))]
    did = run_jobs(tmp_path / "out", None, jobs)
    assert did["score"][0]["error"] == "" and words in did["train"][0]["error"], did


class TestRefused:
    """What does not fit the machine, before the first step."""

    def test_a_disk_without_room(self, tmp_path, monkeypatch):
        """Also where less than a gigabyte is missing, the two figures differ."""
        with monkeypatch.context() as small:
            small.setattr(nvme.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
            with pytest.raises(InputError, match=r"need 0\.02 GB there and 0\.01 are free"):
                nvme.check_disk(tmp_path, 10**6)
        nvme.check_disk(tmp_path, 10)
        assert not list(tmp_path.iterdir())

    def test_a_file_system_without_direct_input_and_output(self, tmp_path, monkeypatch):
        def writev(*_):
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "writev", writev)
        with pytest.raises(InputError, match="no direct I/O of 1024 bytes .Invalid argument."):
            nvme.check_disk(tmp_path, 10)

    def test_a_machine_without_libaio(self, monkeypatch):
        def load(_):
            raise RuntimeError("Unable to JIT load the async_io op due to it not being compatible")

        monkeypatch.setattr(nvme.AsyncIOBuilder, "load", load)
        with pytest.raises(InputError, match="Unable to JIT load the async_io op.*apt install libaio-dev"):
            nvme.load_extension()

    def test_memory_that_cannot_be_locked(self):
        """In a child without the right to lock more than 64 KiB."""
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, 2**16))
            os.setuid(os.getuid() or 65534)
            try:
                nvme.check_locked_memory(2**15)
                nvme.check_locked_memory(2**30)
            except InputError as error:
                os._exit("1.1 GB of memory cannot be locked" in str(error))
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    @pytest.mark.parametrize(
        "section, words",
        [
            ({"stage": 2}, 'offload_optimizer.device "nvme" needs stage 3, and stage is 2'),
            ({"offload_param": {"device": "nvme"}}, 'offload_param.device "nvme" is not supported; write "cpu"'),
            ({"offload_optimizer": {"device": "nvme", "buffer_count": 3}}, "needs a buffer_count of 4 at least"),
            (
                {"offload_optimizer": {"device": "nvme", "pipeline_read": True}},
                "with pipeline_read or pipeline_write hangs",
            ),
            (
                {"offload_optimizer": {"device": "nvme", "nvme_path": "/ssd"}},
                'is "/ssd", but the run says output_dir/nvme',
            ),
        ],
    )
    def test_a_ds_config(self, tmp_path, section, words):
        config = json.loads((ROOT / "ds_configs" / "zero3_nvme_4080.json").read_text())
        config["zero_optimization"] |= section
        if config["zero_optimization"]["stage"] == 2:
            del config["zero_optimization"]["offload_param"]
        (tmp_path / "ds.json").write_text(json.dumps(config))
        with pytest.raises(InputError) as error:
            read = deepspeed_config.read_ds_config(tmp_path / "ds.json")
            deepspeed_config.training_config(
                read, TrainArguments(output_dir=str(tmp_path)), ModelArguments(), "ds.json"
            )
        assert words in str(error.value)


def test_the_plan(capsys, tmp_path):
    """LLaDA-8B: 16 bytes a parameter on the SSD, and on the host four buffers of the largest sub-group instead."""
    model = {"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32}
    model |= {"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096}
    (tmp_path / "config.json").write_text(json.dumps(model | {"mask_token_id": 126336}))
    argv = ["--config_file", ROOT / "configs" / "llada_8b_full_nvme_64gb.yaml", "--model_name_or_path", tmp_path]
    assert call(plan.main, *argv, "--gpu_gib", 16, "--host_gib", 62) == 0
    said = capsys.readouterr().out
    assert "a step reads 128 GB and writes 128: 128 s at 2 GB/s" in said and "are 4,678 steps" in said, said
    host = said[said.index("host  ") : said.index("parameters, ")]
    assert re.search(r"buffers to swap a sub-group +7\.72\n", host) and "master weights" not in host, host
