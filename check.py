"""Check the machine before the work begins: card, driver, memory, compiler, disk.

    this machine -> a table, a row each: green, yellow or red; under a row that is not green, what to do
    python check.py
    python check.py ds_configs/zero3_offload_4080.json

`bash launch.sh --check` runs it before any environment exists, so it imports the standard library alone. What only
torch knows is asked of the environment's torch, if there is one. Exit code 0, or 2 if a row is red. With a ds_config,
what that needs and the machine lacks is red too. launch.sh refuses to start on a red row.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROC, CGROUPS, WINDOWS = Path("/proc"), Path("/sys/fs/cgroup"), Path("/mnt/c/Users")
GIB, GB = 2**30, 10**9
# The least driver for a torch built for CUDA 13 or 12: https://docs.nvidia.com/deploy/cuda-compatibility
LEAST_DRIVER = {13: 580, 12: 525}
TORCH, CU126 = '"torch>=2.11,<=2.13.0"', "--index-url https://download.pytorch.org/whl/cu126"
BY_CPU = " (DS_ACCELERATOR=cpu before the command: run on the CPU)"
PINNED = 2 * GIB  # page-locked memory that is tried; LLaDA-8B's streamed weights are 15 GiB of it
QLORA = "take ds_configs/zero0.json with configs/llada_8b_qlora_4080.yaml"
COLOURS = {"green": "32", "yellow": "33", "red": "31"}

# name: of the row. colour: a key of COLOURS. says: what was found. mend: what to do about it.
Row = namedtuple("Row", "name colour says mend", defaults=("",))
Card = namedtuple("Card", "name total free")  # bytes; None where the driver does not say
# version: "" if unknown. cuda: the newest that it runs, or "". cards: [Card]. complaint: nvidia-smi's, or "".
Driver = namedtuple("Driver", "version cuda cards complaint")
# offloads: the optimizer is on the host, so DeepSpeed's CPU Adam is compiled. pins: copies go through locked pages.
# swaps: optimizer states are on an SSD.
Needs = namedtuple("Needs", "path offloads pins swaps", defaults=(False,))


# --- what is asked ----------------------------------------------------------------------------------------


def output(command, text=None, seconds=120):
    """(exit code, what it printed) of a command; (None, why) if it cannot be run."""
    try:
        done = subprocess.run(
            command,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return done.returncode, done.stdout


def last_line(text):
    return (text.strip().splitlines() or [""])[-1]


def ask_driver():
    """The Driver by nvidia-smi; None where there is no such command."""
    fields = "driver_version,name,memory.total,memory.free"
    code, said = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    if code is None:
        return None
    if code:
        return Driver("", "", [], last_line(said))
    rows = [line.split(", ") for line in said.splitlines() if line.count(", ") == 3]
    cuda = re.search(r"CUDA Version\s*:\s*([\d.]+)", output(["nvidia-smi"])[1])
    cards = [Card(name, mebibytes(total), mebibytes(free)) for _, name, total, free in rows]
    return Driver(rows[0][0] if rows else "", cuda[1] if cuda else "", cards, "")


def mebibytes(text):
    """The bytes of nvidia-smi's number of MiB; None for [N/A]."""
    return int(text) * 2**20 if text.strip().isdigit() else None


# What torch says of itself. _cuda_getDeviceCount() asks the CUDA runtime; device_count() asks NVML, which also counts
# cards that the runtime cannot use because the driver is too old.
ASK_TORCH = """
import json, sys, warnings
found = {"pinned": ""}
try:
    import torch
    found.update(version=torch.__version__, cuda=torch.version.cuda or "", hip=torch.version.hip or "")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found["seen"] = torch.cuda.device_count()
        found["usable"] = torch._C._cuda_getDeviceCount() if hasattr(torch._C, "_cuda_getDeviceCount") else 0
    found["complaint"] = " ".join(str(said[-1].message).split())[:200] if said else ""
    if int(sys.argv[1]) and found["usable"]:
        try:
            torch.empty(int(sys.argv[1]), dtype=torch.uint8, pin_memory=True)
            found["pinned"] = "yes"
        except RuntimeError as error:
            found["pinned"] = str(error).splitlines()[0]
except Exception as error:
    found["broken"] = type(error).__name__ + ": " + str(error).splitlines()[0]
print(json.dumps(found))
"""


def ask_torch(python, pinned=0):
    """What ASK_TORCH finds with this Python, as a dict; pinned: bytes of page-locked memory to try."""
    code, said = output([python, "-c", ASK_TORCH, str(pinned)])
    try:
        return json.loads(last_line(said))
    except ValueError:
        return {"broken": last_line(said) or f"exit code {code}"}


def environment_python():
    """The Python of the environment that launch.sh uses; None before there is one."""
    for python, package in ((sys.executable, "deepspeed"), (str(HERE / ".venv" / "bin" / "python"), "torch")):
        if output([python, "-c", f"from importlib.metadata import version; version('{package}')"])[0] == 0:
            return python
    return None


def needs_of(path):
    """The Needs of a ds_config; None for what is not known, without one or if it cannot be read (training says why)."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        zero, adam = config.get("zero_optimization", {}), config.get("optimizer", {}).get("params", {})
        offloads = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        places = [each.get("device", "none") for each in offloads]
        pins = any(each.get("pin_memory") and place == "cpu" for each, place in zip(offloads, places))
        return Needs(path, places[0] != "none" and not adam.get("torch_adam"), pins, "nvme" in places)
    except (OSError, TypeError, ValueError, AttributeError):
        return Needs(path, None, None)


def is_wsl():
    return "microsoft" in read(PROC / "version").lower()


def read(path):
    """The text of a file; "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- rows -------------------------------------------------------------------------------------------------


def python_row(python):
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):
        return Row("Python", "red", version, "install Python 3.11 or newer, or activate an environment that has it")
    if not python:
        return Row("Python", "green", f"{version}; no environment yet: bash launch.sh --setup makes .venv")
    return Row("Python", "green", f"{version}; environment: {shown(Path(python).parent.parent)}")


def shown(path):
    """A path as a reader names it: from this folder, or from the home folder."""
    for start, name in ((HERE, "."), (Path(os.path.expanduser("~")), "~")):
        if start == path or start in Path(path).parents:
            return str(Path(name) / Path(path).relative_to(start))
    return str(path)


def hidden():
    """Whether the user has asked for the CPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"


def driver_row(driver):
    if driver and driver.complaint:
        mend = "restart the machine, or install the driver again"
        return Row("driver", "yellow", f"nvidia-smi: {driver.complaint}", mend)
    if not driver or not driver.version:
        return Row("driver", "yellow", "no NVIDIA driver (nvidia-smi)", "nothing, if this machine has no card")
    return Row("driver", "green", f"{driver.version}, for CUDA up to {driver.cuda or 'an unknown version'}")


def card_rows(driver):
    """A row for each card; one row where there is none."""
    if not driver or not driver.cards:
        mend = "models of some ten million parameters run on it; larger ones need a card"
        return [Row("card", "yellow", "none: everything runs on the CPU", mend)]
    rows = []
    for number, card in enumerate(driver.cards):
        if not card.total:
            rows.append(Row("card", "green", f"{number}: {card.name}, its memory is not known"))
            continue
        taken, free = card.total - (card.free or 0), (card.free or 0) / GIB
        says = f"{number}: {card.name}, {card.total / GIB:.1f} GiB, {free:.1f} free"
        mend = f"other programs hold {taken / GIB:.1f} GiB: close those that nvidia-smi lists"
        rows.append(Row("card", "yellow", says, mend) if taken > 2 * GIB else Row("card", "green", says))
    return rows


def torch_row(torch, driver, pip):
    """Whether torch can use the card. torch: of ask_torch(), None before an environment exists."""
    cards = len(driver.cards) if driver and not hidden() else 0
    version = major(driver.version) if cards else 0  # 0: not known
    is_old = 0 < version < LEAST_DRIVER[13]
    if torch is None and is_old:
        says, install = (
            "not installed, and PyPI's is built for CUDA 13",
            "python3 -m venv .venv && .venv/bin/pip install",
        )
        return old_driver_row(says, driver, LEAST_DRIVER[13], install)
    if torch is None:
        return Row("torch", "green", "not installed yet")
    if "broken" in torch:
        mend = "install it again, run: rm -r .venv; bash launch.sh --setup"
        return Row("torch", "red", f"cannot be imported ({torch['broken']})", mend)
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPUs"
    says, seen = f"{torch['version']}, built for {build}", 0 if hidden() else max(cards, torch["seen"])
    if not seen or torch["usable"]:
        return Row("torch", "green", f"{says}, uses {torch['usable']} card(s)" if seen else says)
    says, swap = f"{says}, can use none of {seen} card(s)", f"{pip} uninstall -y torch && {pip} install"
    least = LEAST_DRIVER.get(major(torch["cuda"]), 0)
    if 0 < version < least:
        return old_driver_row(says, driver, least, swap)
    if build == "CPUs":
        index = f" {CU126}" if is_old else ""
        mend = f"install a torch for CUDA, run: {swap} {TORCH}{index}{BY_CPU}"
    else:
        mend = f"torch says: {torch['complaint'] or 'no CUDA device'}; restart the machine and run: nvidia-smi{BY_CPU}"
    return Row("torch", "red", says, mend)


def major(version):
    """The number before the first point of a version; 0 if there is none."""
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else 0


def old_driver_row(says, driver, least, install):
    """The row of a torch that needs driver `least`. install: the command before the name of a package."""
    mend = f"NVIDIA's driver {driver.version} is too old for it: install driver {least} or newer"
    if major(driver.version) >= LEAST_DRIVER[12]:
        mend += f", or take torch built for CUDA 12.6, run: {install} {TORCH} {CU126}"
    return Row("torch", "red", says, mend + BY_CPU)


def pinned_row(torch, needs):
    """The page-locked buffer that was tried. Refused, it is red for a ds_config that pins."""
    name, size = "page-locked memory", f"{PINNED // GIB} GiB"
    if not torch or not torch.get("pinned"):
        return Row(name, "green", "not tried: it takes a card that torch can use")
    if torch["pinned"] == "yes":
        return Row(name, "green", f"{size} granted")
    where = " by WSL2" if is_wsl() else ""
    which = needs.path if needs.pins else "a ds_config that has it"
    mend = f'{QLORA}, or write "pin_memory": false in a copy of {which}'
    return Row(name, "red" if needs.pins else "yellow", f"{size} refused{where} ({torch['pinned']})", mend)


def memory_row():
    """The host's memory, a container's limit, and the share of it that WSL2 has."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", read(PROC / "meminfo"), re.M))
    total, free = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    says, limit = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free", memory_limit()
    if limit and limit < total:
        says, free = f"{says}; this container or job may use {limit / GIB:.1f}", min(free, limit)
    mend = f"streamed from here, an 8B model's weights alone take 15 GiB: with less, {QLORA}"
    if is_wsl():
        share = wsl_memory()
        says += f"; WSL2's share ({'memory=' + share if share else 'half of the machine, by default'})"
        mend += "; WSL2 gets more by memory=28GB under [wsl2] in C:\\Users\\NAME\\.wslconfig, then: wsl --shutdown"
    return Row("host memory", "green", says) if free >= 18 * GIB else Row("host memory", "yellow", says, mend)


def memory_limit():
    """The least memory.max of this process's control groups, in bytes; None without one."""
    group = re.search(r"^0::(/.*)$", read(PROC / "self" / "cgroup"), re.M)
    folder = CGROUPS / group[1].lstrip("/") if group else CGROUPS
    limits = [read(each / "memory.max").strip() for each in (folder, *folder.parents)]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def wsl_memory():
    """What memory= in a .wslconfig of Windows says; None without one."""
    try:
        texts = [read(path) for path in WINDOWS.glob("*/.wslconfig")]
    except OSError:
        return None
    found = re.search(r"^\s*memory\s*=\s*(\S+)", "\n".join(texts), re.M | re.I)
    return found[1] if found else None


def compiler_row(python, needs):
    """Whether a C++ file that includes Python.h compiles, as DeepSpeed's CPU Adam does, the one extension in use."""
    name, colour = "C++ and Python.h", "yellow" if needs.offloads is None else "red"
    if needs.offloads is False:
        return Row(name, "green", "not needed: this ds_config does not offload the optimizer")
    compiler = os.environ.get("CXX") or "c++"
    include = output([python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"])[1].strip()
    command, source = (
        [*compiler.split(), "-fsyntax-only", f"-I{include}", "-x", "c++", "-"],
        "#include <Python.h>\n#include <cmath>\n",
    )
    code, said = output(command, source)
    if code == 0:
        version = output([*compiler.split(), "--version"])[1].splitlines()[0]
        return Row(name, "green", f"{version}, {shown(include)}/Python.h")
    if code is None:
        says, package = f"no C++ compiler ({compiler})", "g++"
    elif "Python.h" in said:
        says, package = f"no Python.h in {include}", "python3-dev"
    else:
        says, package = f"{compiler} fails ({last_line(said)})", "g++"
    mend = (
        f"install {package}, on Ubuntu by: sudo apt install g++ python3-dev; ds_configs that offload the optimizer "
        "compile DeepSpeed's CPU Adam with it (zero0.json, for QLoRA, does not)"
    )
    return Row(name, colour, says, mend)


def ssd_rows(needs):
    """What swapping to an SSD needs: libaio's header, and the right to lock memory. No rows if nothing is swapped."""
    if not needs.swaps:
        return []
    compiler = [*(os.environ.get("CXX") or "c++").split(), "-fsyntax-only", "-x", "c++", "-"]
    rows = [Row("libaio", "green", "libaio.h is there")]
    if output(compiler, "#include <libaio.h>\n")[0] != 0:
        mend = "install libaio-dev, on Ubuntu by: sudo apt install libaio-dev; this ds_config swaps to an SSD with it"
        rows = [Row("libaio", "red", "no libaio.h", mend)]
    limit, name = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], "locked memory"
    if os.geteuid() == 0 or limit == resource.RLIM_INFINITY:
        return [*rows, Row(name, "green", "no limit")]
    says = f"at most {limit / GB:.1f} GB (ulimit -l)"
    mend = "an 8B model's swap buffers take 8.3 GB: raise memlock in /etc/security/limits.conf, and log in again"
    return [*rows, Row(name, "green", says) if limit > 8.3 * GB else Row(name, "yellow", says, mend)]


def disk_row(name, folder, least, mend):
    """Free disk space where `folder` is or will be; less than `least` bytes is yellow."""
    place = folder.absolute()
    while not os.path.exists(place):  # or it may not be seen
        place = place.parent
    free = shutil.disk_usage(place).free
    says = f"{free / GB:.0f} GB free for {shown(folder)}"
    return Row(name, "green", says) if free >= least else Row(name, "yellow", says, mend)


def hub_cache():
    """Where huggingface_hub puts what it downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


# --- the table --------------------------------------------------------------------------------------------


def may_have_card(driver):
    """Whether to ask torch, whose import takes seconds, for cards."""
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        return True
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg"), *Path("/dev").glob("kfd")]
    return not hidden() and bool(devices or driver and driver.cards)


def card_and_torch(python, needs, starting):
    """(rows of driver, cards, torch and page-locked memory, what torch said). starting: for launch.sh."""
    driver, torch = ask_driver(), None
    if python and (may_have_card(driver) or not starting):
        try_pinned = needs.pins and is_wsl() if starting else may_have_card(driver)
        torch = ask_torch(python, PINNED if try_pinned else 0)
    pip = ".venv/bin/pip" if python == str(HERE / ".venv" / "bin" / "python") else "pip"
    asked = torch_row(torch, driver, pip) if torch or not python else Row("torch", "green", "not asked")
    return [driver_row(driver), *card_rows(driver), asked, pinned_row(torch, needs)], torch


def is_compiled(python):
    """Whether the environment holds a compiled CPU Adam."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(python or "/").parent.parent / "torch_extensions"
    return (Path(folder) / "cpu_adam" / "cpu_adam.so").exists()


def print_table(rows):
    width = max(len(row.name) for row in rows)
    for row in rows:
        word = f"{row.colour:6}"
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            word = f"\033[{COLOURS[row.colour]}m{word}\033[0m"
        print(f"{row.name:{width}}  {word}  {row.says}")
        if row.mend:
            print(f"{'':{width}}          {row.mend}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"error: {message}; --help lists the arguments", file=sys.stderr)
        sys.exit(2)


def read_arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("ds_config", nargs="?", help="a ds_config: what it needs and this machine lacks is red")
    parser.add_argument(
        "--starting",
        action="store_true",
        help="for launch.sh: say red rows alone; print the number of cards, whether torch is 2.13 or newer, and "
        "whether to compile DeepSpeed's CPU Adam",
    )
    return parser.parse_args(argv)


def start(python, needs):
    """What launch.sh asks before the work: errors for red rows, or three numbers. Returns the exit code."""
    rows, torch = card_and_torch(python, needs, starting=True)
    rows += ssd_rows(needs)
    compile_adam = needs.offloads is not False
    if compile_adam and not is_compiled(python):
        row = compiler_row(python or sys.executable, needs)
        rows.append(row)
        compile_adam = row.colour != "yellow"
        if python and not compile_adam:
            print(f"setup: DeepSpeed's CPU Adam is not compiled: {row.says}; {row.mend}", file=sys.stderr)
    red = [row for row in rows if row.colour == "red"]
    for row in red:
        print(f"error: {row.name}: {row.says}; {row.mend}", file=sys.stderr)
    version = re.findall(r"\d+", torch["version"])[:2] if torch and not red else []
    print(torch["usable"] if version else 0, int(list(map(int, version)) >= [2, 13]), int(compile_adam))
    return 2 if red else 0


def main(argv=None):
    args = read_arguments(argv)
    python, needs = environment_python(), needs_of(args.ds_config or "")
    if args.starting:
        return start(python, needs)
    rows = [python_row(python), *card_and_torch(python, needs, starting=False)[0], memory_row()]
    rows += [compiler_row(python or sys.executable, needs), *ssd_rows(needs)]
    room = "free some: the environment takes 1.5 GB on a CPU and more with CUDA"
    rows.append(disk_row("disk, here", HERE, 20 * GB, room))
    room = "free some, or name another folder in HF_HOME: LLaDA-8B takes 16 GB"
    rows.append(disk_row("disk, the Hub's cache", hub_cache(), 20 * GB, room))
    print_table(rows)
    return 2 if any(row.colour == "red" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
