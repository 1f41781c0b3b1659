"""Whole runs of every family of models: rows, packed arrays, reference scores, three steps, a stop, the saved model.

    bash tests/run.sh tests/training/test_every_family.py

Each family's tiny checkpoint has its makers' tensor names and fields (examples/new_tiny.py), and is trained under
ZeRO-3 with weights and optimizer offloaded, every weight in float32 and LoRA in bfloat16. The runs of all families are
made in one process per rank, one after the other.
"""

import json
import math
import re
import shutil
from types import SimpleNamespace

import new_tiny
import pytest
import torch
from prepared import write_rows
from safetensors.torch import load_file
from small import call, ds_config, flags, log, numbers, run_jobs

import data_prep
from models import checkpoint, families, folders, tokenization
from preferences import packed
from reasoning import tasks

FAMILIES = list(new_tiny.FIELDS)
FEW = ["sdar", "llada2_moe"]
SETS = {"1-rank": (1, FAMILIES), "2-ranks": (2, FEW), "2-ranks-others": (2, [f for f in FAMILIES if f not in FEW])}
CASES = [
    pytest.param(name, family, marks=[pytest.mark.long] * (name != "2-ranks"))
    for name, (_, members) in SETS.items()
    for family in members
]
MORE = {"a2d-qwen3": ["--block_size", 8]}  # nothing in its files says how its attention runs
RUN = flags(
    max_steps=3,
    save_steps=1,
    learning_rate=1e-2,
    warmup_ratio=0,
    eval_fraction=0,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    tokens_per_forward=600,
)
KINDS = {"full": flags(use_mixed_precision="no"), "lora": flags(use_mixed_precision="bf16", lora_r=4)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with preferences and a ds_config; the runs that were made in it."""
    folder = tmp_path_factory.mktemp("families")
    write_rows(folder / "prefs.jsonl", tasks.preference_rows(12, "train", 0))
    return SimpleNamespace(folder=folder, ds=ds_config(folder / "zero3.json", "zero3_offload_4080"), made={})


def make_model(home, family):
    """A tiny model and packed arrays of a family, unless they are there."""
    rows, model = home.folder / "prefs.jsonl", home.folder / family
    if not model.exists():
        new_tiny.main([*flags(out=model, family=family), "--in", str(rows)])
        given = flags(model_name_or_path=model, out=home.folder / f"{family}-packed")
        call(data_prep.main, "--in", rows, *given, *MORE.get(family, []))


@pytest.fixture
def runs(request, home):
    """The runs of a set of families, made when the first test asks for them."""
    if request.param not in home.made:
        home.made[request.param] = make_runs(home, home.folder / request.param, *SETS[request.param])
    return home.made[request.param]


def make_runs(home, folder, world, members):
    """Full and LoRA runs of each family, and "again" of each, which goes on from a copy of its step 2."""
    first, again = [], []
    for family in members:
        make_model(home, family)
        base = [*flags(data=home.folder / f"{family}-packed", model_name_or_path=home.folder / family)]
        base += map(str, MORE.get(family, []))
        for kind, more in KINDS.items():
            first.append((f"{family}-{kind}-score", "score", [*base, *more[:2]]))
            argv = [*base, *RUN, *more, "--deepspeed", home.ds, "--output_dir"]
            first.append((f"{family}-{kind}", "train_dpo", [*argv, folder / f"{family}-{kind}"]))
            again.append((f"{family}-{kind}", "train_dpo", [*argv, folder / f"{family}-{kind}-again"]))
    did = run_jobs(folder, world, first)
    for name, _, argv in again:
        shutil.copytree(folder / name, argv[-1], ignore=shutil.ignore_patterns("final", "step-3"))
    did |= {f"{name}-again": ranks for name, ranks in run_jobs(folder / "again", world, again).items()}
    return SimpleNamespace(world=world, folder=folder, did=did)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runs, family", CASES, indirect=["runs"])
def test_a_run_and_its_resumption(runs, family, kind):
    """Three steps from ln 2; a stop after the second changes no bit of what follows."""
    name = f"{family}-{kind}"
    for each in (f"{name}-score", name, f"{name}-again"):
        assert [rank["error"] for rank in runs.did[each]] == [""] * runs.world, each
    first, *others = log(runs.folder / name)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=2e-5)
    assert [line["step"] for line in others] == [2, 3] and all(line["loss"] != first["loss"] for line in others)
    assert [list(rank["items"]) for rank in runs.did[f"{name}-again"]] == [["2"]] * runs.world  # the third alone
    again = runs.folder / f"{name}-again"
    assert numbers(again) == numbers(runs.folder / name)
    for path in (runs.folder / name / "final").glob("*.safetensors"):
        assert (again / "final" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("runs, family", CASES, indirect=["runs"])
def test_the_saved_model_has_its_makers_layout(runs, home, family):
    """The same names and shapes, the same fields; every tensor was trained; it loads strictly as what was trained."""
    source, final = home.folder / family, runs.folder / f"{family}-full" / "final"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, final))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: tensor.shape for n, tensor in before.items()}
    same = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    experts = [name for name in after if ".experts." in name]
    assert all(".experts." in name or name.endswith("expert_bias") for name in same), same
    assert not experts or set(experts) - set(same)  # some are chosen by no token of three steps
    was, fields = (json.loads((folder / "config.json").read_text()) for folder in (source, final))
    assert was.items() <= fields.items()
    assert fields["mask_token_id"] == packed.Packed(home.folder / f"{family}-packed").meta["mask_token_id"]
    model = checkpoint.load_model(str(final), torch.float32)  # no flag: its config.json says how attention runs
    size = families.block_size(folders.plain_config(str(final)))
    assert (model.blocks.size if model.blocks else 0) == size
    last = torch.load(runs.folder / f"{family}-full.step-3.pt")
    assert all(torch.equal(parameter, last[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("runs, family", CASES, indirect=["runs"])
def test_an_adapter_beside_its_base(runs, home, family):
    """Embeddings, routers and their experts are not adapted; with the adapter the logits are others than the base's."""
    final = runs.folder / f"{family}-lora" / "final"
    names = load_file(final / "adapter_model.safetensors").keys()
    assert names and not [name for name in names if re.search(r"\.experts\.|mlp\.gate\.|embed|lm_head", name)]
    tokenizer = tokenization.load_tokenizer(str(final))
    ids = torch.tensor([tokenization.encode(tokenizer, "Question: 7 + 5?")])
    size = families.block_size(folders.plain_config(str(final)))  # the adapter notes its base's
    block_size = size if family in MORE else "auto"
    with torch.no_grad():
        adapted = checkpoint.load_model(str(final), torch.float32)(ids).logits
        base = checkpoint.load_model(str(home.folder / family), torch.float32, block_size=block_size)(ids).logits
    assert adapted.shape == base.shape and float((adapted - base).abs().max()) > 1e-3
