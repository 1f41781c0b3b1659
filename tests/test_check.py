"""Tests of check.py and of what launch.sh refuses, with stand-ins for the driver, torch, the compiler and WSL2.

bash tests/run.sh tests/test_check.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT

import check
from files import InputError
from training import cards, engine

DS = "ds_configs/zero3_offload_4080.json"
GPU = "550.54.14, NVIDIA GeForce RTX 4080, 16376, 15012"
OLD = check.Driver("550.54.14", "12.4", [check.Card("RTX 4080", 16 * check.GIB, 15 * check.GIB)], "")
NEW = OLD._replace(version="580.95.05", cuda="13.0")
CUDA_13 = {"version": "2.13.0+cu130", "cuda": "13.0", "hip": "", "seen": 1, "usable": 0, "complaint": "", "pinned": ""}
WSL = "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@x) #1 SMP"
# What torch answers whose CUDA is newer than the driver: NVML counts a card, the runtime none.
TORCH = """
import types, warnings
__version__, version = "2.13.0+cu130", types.SimpleNamespace(cuda="13.0", hip=None)
def runtime():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 12040).")
    return {usable}
def empty(size, dtype, pin_memory):
    raise RuntimeError("CUDA error: out of memory\\nCompile with TORCH_USE_CUDA_DSA")
uint8, _C = None, types.SimpleNamespace(_cuda_getDeviceCount=runtime)
cuda = types.SimpleNamespace(device_count=lambda: 1)
"""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """Neither the CPU nor a card was asked for."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder of commands before all others on the path, and /proc, /sys/fs/cgroup and /mnt/c/Users of our own."""
    for name in ("bin", "proc", "groups", "users"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, folder in (("PROC", "proc"), ("CGROUPS", "groups"), ("WINDOWS", "users")):
        monkeypatch.setattr(check, name, tmp_path / folder)
    return tmp_path


def command(folder, name, script):
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvidia_smi(folder, rows=GPU, code=0):
    header = "| NVIDIA-SMI 550.54.14    Driver Version: 550.54.14    CUDA Version: 12.4 |"
    command(folder, "nvidia-smi", f"case $1 in --query*) echo '{rows}' ;; *) echo '{header}' ;; esac; exit {code}")


def stub_torch(folder, usable):
    (folder / "stub").mkdir()
    (folder / "stub" / "torch.py").write_text(TORCH.format(usable=usable))
    return str(folder / "stub")


def launch(folder, *words, **environment):
    """launch.sh with the stand-ins of `machine`, this Python's environment active."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    env |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{folder / 'bin'}:{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(ROOT / "launch.sh"), *words], cwd=folder, env=env, capture_output=True, text=True
    )


# --- the driver and torch ---------------------------------------------------------------------------------


def test_driver(machine):
    nvidia_smi(machine)
    driver = check.ask_driver()
    assert driver == ("550.54.14", "12.4", [("NVIDIA GeForce RTX 4080", 16376 * 2**20, 15012 * 2**20)], "")
    assert check.driver_row(driver).says == "550.54.14, for CUDA up to 12.4"
    nvidia_smi(machine, f"{GPU}\n580.1, NVIDIA GB10, [N/A], [N/A]")
    rows = check.card_rows(check.ask_driver())
    assert [row.colour for row in rows] == ["green", "green"] and "not known" in rows[1].says
    nvidia_smi(machine, "550.54.14, RTX 4080, 16376, 9000")
    [row] = check.card_rows(check.ask_driver())
    assert row.colour == "yellow" and "7.2 GiB" in row.mend
    nvidia_smi(machine, "Failed to initialize NVML: Driver/library version mismatch", code=18)
    row = check.driver_row(check.ask_driver())
    assert row.colour == "yellow" and "version mismatch" in row.says


@pytest.mark.parametrize(
    "torch_says, driver, colour, words",
    [
        (CUDA_13, OLD, "red", ("install driver 580 or newer", "pip uninstall -y torch && pip install", "/whl/cu126")),
        (None, OLD, "red", ("install driver 580 or newer", "python3 -m venv .venv", "/whl/cu126")),
        (CUDA_13, OLD._replace(version="470.1"), "red", ("install driver 580 or newer (DS_ACCELERATOR=cpu",)),
        (CUDA_13 | {"complaint": "no such thing"}, NEW, "red", ("torch says: no such thing",)),
        (CUDA_13 | {"version": "2.13.0+cpu", "cuda": "", "seen": 0}, NEW, "red", ('2.13.0" (DS_ACCELERATOR=cpu',)),
        (CUDA_13 | {"version": "2.13.0+cpu", "cuda": "", "seen": 0}, OLD, "red", ("/whl/cu126",)),
        ({"broken": "OSError: libcudart.so.13"}, NEW, "red", ("rm -r .venv",)),
        (CUDA_13 | {"usable": 1}, NEW, "green", ()),
        (CUDA_13 | {"cuda": "12.6", "usable": 1}, OLD, "green", ()),
        (CUDA_13 | {"seen": 0}, None, "green", ()),
        (None, NEW, "green", ()),
        (None, None, "green", ()),
    ],
)
def test_torch_and_driver(torch_says, driver, colour, words):
    row = check.torch_row(torch_says, driver, "pip")
    assert row.colour == colour and all(word in row.mend for word in words), row


def test_a_card_that_the_user_hides_is_not_missed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert check.torch_row(CUDA_13, OLD, "pip").colour == "green"
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.torch_row(None, OLD, "pip").colour == "green"


def test_launch_refuses_a_driver_older_than_torch(machine):
    """In one sentence, before anything runs; --check shows the same as a red row, and the CPU may be asked for."""
    nvidia_smi(machine)
    stub = stub_torch(machine, usable=0)
    done = launch(machine, f"{ROOT}/{DS}", PYTHONPATH=stub)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "built for CUDA 13.0, can use none of 1 card(s); NVIDIA's driver 550.54.14 is too old" in done.stderr
    table = launch(machine, "--check", PYTHONPATH=stub)
    assert table.returncode == 2 and "install driver 580 or newer" in table.stdout
    done = launch(machine, f"{ROOT}/{DS}", "--num_gpus", "0", PYTHONPATH=stub, DS_ACCELERATOR="cpu")
    assert "error: --num_gpus is '0'" in done.stderr and "driver" not in done.stderr


def test_a_command_by_itself_refuses_it_too(monkeypatch):
    """score.py without launch.sh, and generate.py with the device chosen for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the CUDA runtime's
    with pytest.raises(InputError, match=r"can use none of the 1 card\(s\) here; to see why, run: bash launch.sh --ch"):
        cards.usable()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(InputError, match="can use none"):
        engine.start()


def test_deepspeed_does_not_change_what_is_available():
    """Its import would have torch.cuda.is_available() ask NVML."""
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"


# --- WSL2 -------------------------------------------------------------------------------------------------


def test_page_locked_memory_on_wsl(machine, monkeypatch):
    """Refused, it is red for a ds_config that pins and for no other."""
    (machine / "proc" / "version").write_text(WSL)
    monkeypatch.setenv("PYTHONPATH", stub_torch(machine, usable=1))
    said = check.ask_torch(sys.executable, check.PINNED)
    assert said["usable"] == 1 and said["pinned"] == "CUDA error: out of memory"
    row = check.pinned_row(said, check.needs_of(ROOT / DS))
    assert row.colour == "red" and "refused by WSL2 (CUDA error: out of memory)" in row.says
    assert "llada_8b_qlora_4080.yaml" in row.mend and f'"pin_memory": false in a copy of {ROOT / DS}' in row.mend
    assert check.pinned_row(said, check.needs_of(ROOT / "ds_configs/zero0.json")).colour == "yellow"
    assert check.pinned_row(said | {"pinned": "yes"}, check.needs_of(ROOT / DS)).colour == "green"


@pytest.mark.parametrize("version, ds_config, code", [(WSL, DS, 2), (WSL, "ds_configs/zero0.json", 0), ("", DS, 0)])
def test_a_start_tries_page_locked_memory_on_wsl_alone(machine, monkeypatch, capsys, version, ds_config, code):
    nvidia_smi(machine, GPU.replace("550.54.14", "580.95"))
    (machine / "proc" / "version").write_text(version)
    monkeypatch.setenv("PYTHONPATH", stub_torch(machine, usable=1))
    monkeypatch.setattr(check, "is_compiled", lambda _: True)
    assert check.main([str(ROOT / ds_config), "--starting"]) == code
    said = capsys.readouterr()
    assert said.err.count("error: page-locked memory: 2 GiB refused by WSL2") == code // 2
    assert code or said.out.split()[0] == "1"  # card


def test_host_memory(machine):
    """On WSL2 with its share, and in a container with its limit."""
    (machine / "proc" / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 31457280 kB\n")
    (machine / "proc" / "version").write_text("Linux version 6.8.0-generic")
    row = check.memory_row()
    assert (row.colour, row.says) == ("green", "32.0 GiB, 30.0 free")
    (machine / "proc" / "self").mkdir()
    (machine / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    (machine / "groups" / "job" / "step").mkdir(parents=True)
    (machine / "groups" / "job" / "memory.max").write_text(f"{8 * 2**30}\n")
    (machine / "groups" / "job" / "step" / "memory.max").write_text("max\n")
    row = check.memory_row()
    assert row.colour == "yellow" and row.says.endswith("this container or job may use 8.0")
    (machine / "groups" / "job" / "memory.max").unlink()
    (machine / "proc" / "version").write_text(WSL)
    (machine / "proc" / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 15728640 kB\n")
    row = check.memory_row()
    assert row.colour == "yellow" and "half of the machine, by default" in row.says and ".wslconfig" in row.mend
    (machine / "users" / "me").mkdir()
    (machine / "users" / "me" / ".wslconfig").write_text("[wsl2]\n  memory = 12GB\n")
    assert "WSL2's share (memory=12GB)" in check.memory_row().says


# --- the compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offloads, colour", [(True, "red"), (None, "yellow"), (False, "green")])
@pytest.mark.parametrize(
    "script, says, mend",
    [
        ("echo '<stdin>:1:10: fatal error: Python.h: No such file' >&2; exit 1", "no Python.h in", "python3-dev"),
        ("echo 'fatal error: cmath: No such file' >&2; exit 1", "fails (fatal error: cmath", "install g++,"),
        (None, "no C++ compiler", "apt install g++ python3-dev"),
    ],
)
def test_compiler(machine, monkeypatch, script, says, mend, offloads, colour):
    monkeypatch.setenv("CXX", str(command(machine, "cxx", script) if script else machine / "nothing"))
    row = check.compiler_row(sys.executable, check.Needs("x.json", offloads, False))
    assert row.colour == colour
    assert colour == "green" or says in row.says and mend in row.mend and "toolkit" not in row.mend


def test_this_compiler():
    row = check.compiler_row(sys.executable, check.Needs("x.json", True, False))
    assert row.colour == "green" and "Python.h" in row.says


@pytest.mark.parametrize("header, colour", [(0, "green"), (1, "red")])
def test_ssd(monkeypatch, header, colour):
    """libaio's header and locked memory, of a ds_config that swaps alone."""
    monkeypatch.setattr(check, "output", lambda *_: (header, "fatal error: libaio.h: No such file or directory"))
    monkeypatch.setattr(check.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(check.resource, "getrlimit", lambda _: (8 * 2**20, 8 * 2**20))
    needs = check.needs_of(ROOT / "ds_configs" / "zero3_nvme_4080.json")
    libaio, locked = check.ssd_rows(needs)
    assert libaio.colour == colour and locked.colour == "yellow" and "memlock" in locked.mend
    assert check.ssd_rows(check.needs_of(ROOT / "ds_configs" / "zero3_offload_4080.json")) == []


def test_what_a_ds_config_needs(tmp_path):
    """CPU Adam is compiled where the optimizer is offloaded, and not by QLoRA's."""
    found = {path.stem: check.needs_of(path)[1:3] for path in (ROOT / "ds_configs").glob("*.json")}
    assert found["zero0"] == found["zero3"] == (False, False)
    assert found["zero3_offload_4080"] == found["zero2_offload_4080"] == (True, True)
    config = json.loads((ROOT / DS).read_text())
    config["optimizer"]["params"]["torch_adam"] = True
    (tmp_path / "a.json").write_text(json.dumps(config))
    assert check.needs_of(tmp_path / "a.json")[1:3] == (False, True)
    (tmp_path / "a.json").write_text("[]")
    assert check.needs_of(tmp_path / "a.json")[1:3] == check.needs_of("nowhere")[1:3] == (None, None)


def test_launch_without_a_compiler(machine):
    """An offloaded optimizer is refused before the work; zero0.json starts; --setup says what is missing."""
    env = {"CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(machine / "extensions"), "DS_ACCELERATOR": "cpu"}
    done = launch(machine, f"{ROOT}/{DS}", **env)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "error: C++ and Python.h: no C++ compiler (no-compiler)" in done.stderr
    done = launch(machine, f"{ROOT}/ds_configs/zero0.json", "--num_gpus", "none", **env)
    assert done.stderr == "error: --num_gpus is 'none', expected a number from 1\n"
    done = launch(machine, "--setup", **env)
    assert done.returncode == 0 and "setup: ready" in done.stdout
    assert "setup: DeepSpeed's CPU Adam is not compiled: no C++ compiler (no-compiler)" in done.stderr


def test_launch_with_a_compiler_that_fails_later(machine):
    """One that takes Python.h and then does not compile the extension."""
    real = check.output(["sh", "-c", "command -v c++"])[1].strip()
    script = f'case "$*" in *-fsyntax-only*) exec {real} "$@" ;; *) echo broken >&2; exit 1 ;; esac'
    env = {"CXX": str(command(machine, "cxx", script)), "DS_ACCELERATOR": "cpu"}
    env["TORCH_EXTENSIONS_DIR"] = str(machine / "extensions")
    done = launch(machine, f"{ROOT}/{DS}", **env)
    assert done.returncode == 2 and "error: DeepSpeed's CPU Adam did not compile, and this ds_config" in done.stderr
    assert "bin/cxx" in (machine / "extensions" / "build.log").read_text()


def test_a_start_compiles_nothing_for_distributed_calls():
    """deepspeed_shm_comm serves tensor parallelism alone, and needs a compiler."""
    assert sys.modules["deepspeed.comm.torch"].build_shm_op() is None


def test_an_answer_in_another_encoding(machine):
    """What a command says need not be UTF-8."""
    command(machine, "nvidia-smi", r"printf '580.95.05, RTX \351 4080, 16376, 15012\n'")
    assert check.ask_driver().cards[0].total == 16376 * 2**20


# --- the table --------------------------------------------------------------------------------------------


def test_table(machine, capsys, monkeypatch):
    """Of a machine without a card and without an environment: no row is red, and no colour codes in a pipe."""
    monkeypatch.setattr(check, "environment_python", lambda: None)
    (machine / "proc" / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 31457280 kB\n")
    command(machine, "nvidia-smi", "exit 0")
    assert check.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:21].strip() for line in lines if line[:1] != " "]
    assert names == [
        *("Python", "driver", "card", "torch", "page-locked memory", "host memory", "C++ and Python.h"),
        *("disk, here", "disk, the Hub's cache"),
    ]
    assert "\033" not in "".join(lines)
    assert lines[0].split()[1] == "green" and "no environment yet: bash launch.sh --setup" in lines[0]


def test_disk(tmp_path):
    assert check.disk_row("disk", tmp_path / "not" / "yet", 0, "free some").colour == "green"
    row = check.disk_row("disk", tmp_path, 10**18, "free some")
    assert row.colour == "yellow" and row.mend == "free some"


def test_a_user_without_a_home(tmp_path):
    """A container's user number has no home folder, and another user's cannot be looked into."""
    closed = tmp_path / "closed"
    closed.mkdir()
    for home in ({}, {"HOME": str(closed)}):
        script = (  # as a user without an entry in /etc/passwd
            f"import os, pwd, sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True; import check; "
            f"os.chmod({str(closed)!r}, 0); os.geteuid() or os.seteuid(12345); pwd.getpwuid = {{}}.__getitem__; "
            "place = check.hub_cache(); print(check.shown(place), check.disk_row('disk', place, 0, '').colour)"
        )
        hidden = ("HOME", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
        env = {name: value for name, value in os.environ.items() if name not in hidden} | home
        done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == "~/.cache/huggingface/hub green\n", done.stderr
        closed.chmod(0o755)


def test_hub_cache(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert check.hub_cache() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert check.hub_cache() == Path("/data/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert check.hub_cache() == Path("/cache")
