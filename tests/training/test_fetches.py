"""Tests of fetches.py: what ZeRO-3 brings over the bus, counted by bench/fetches.py, where DeepSpeed decides as at 8B.

bash tests/run.sh tests/training/test_fetches.py
"""

import json
from types import SimpleNamespace

import pytest
import torch
from small import ROOT, execute
from torch import nn

import config
from models.llada import LLaDAConfig, LLaDAModelLM
from training import fetches, footprint, shapes


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """bench/fetches.py's table by the names of its rows."""
    path = tmp_path_factory.mktemp("fetches") / "table.json"
    done = execute([ROOT / "bench" / "fetches.py", "--blocks", 4, "--json", path])
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["what"]: SimpleNamespace(**row) for row in json.loads(path.read_text())}


EMBEDDING = 0.27  # its share of the weights when there are 4 blocks
WITHOUT_GRAPH = {"one pass": 0, "several passes": 4, "1 state carries": 1}


@pytest.mark.parametrize("what", WITHOUT_GRAPH)
@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_training(rows, kind, what):
    """One model a pass without a graph, two a pass with one, no weight on demand, DeepSpeed's record stays."""
    row = rows[f"{kind}, {what}"]
    assert row.forwards == WITHOUT_GRAPH[what] and row.backwards == max(1, row.forwards)
    assert row.on_demand == 0 and row.lost == 0 and row.gathered_gib < 1.9
    most = row.forwards + 2 * row.backwards
    if kind == "LoRA":
        most -= EMBEDDING * (row.forwards + row.backwards)
    assert row.models <= most < 2 * row.models


def test_scores(rows):
    row = rows["scores of a reference"]
    assert row.backwards == 0 and row.on_demand == 0 and row.lost == 0 and row.models < row.forwards


@pytest.mark.parametrize("lora_r, kind", [(16, "LoRA"), (0, "full")])
def test_the_plan_agrees(rows, lora_r, kind):
    """plan.py's gathered weights, and what it has cross the bus in a pass."""
    [model_args] = config.parse(["--lora_r", str(lora_r)], "", config.ModelArguments)
    eight_b = LLaDAConfig(n_layers=4, mlp_hidden_size=12288, n_kv_heads=32)
    shape, row = shapes.model_shape(eight_b, model_args), rows[f"{kind}, several passes"]
    zero = json.loads((ROOT / "ds_configs" / "zero3_offload_4080.json").read_text())["zero_optimization"]
    gathered = footprint.gathered(shape, zero, 1) - footprint.small(shape, zero)
    assert 2 * gathered / 2**30 == pytest.approx(row.gathered_gib, rel=0.15)
    once, head = footprint.streamed(shape, zero, 1) / shape.elements, shape.head / shape.elements
    assert row.forwards * once + row.backwards * (2 * once - head) == pytest.approx(row.models, rel=0.01)


def partitioned(table, **share):
    """An embedding as ZeRO-3 leaves it, without the rows in `weight`; share: what its part on this rank is not."""
    embedding = nn.Embedding(*table.shape).requires_grad_(False)
    weight = embedding.weight
    weight.data, weight.ds_shape, weight.ds_numel = torch.empty(0), table.shape, table.numel()
    weight.ds_tensor = share.get("tensor", table.flatten())
    weight.ds_tensor.final_location = share.get("location")
    return embedding


def kept(embedding, device="cpu"):
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    fetches.keep_embedding_on_host(model, torch.device(device))
    return isinstance(embedding, fetches.HostEmbedding)


def test_embedding_on_the_host():
    """The table's rows, for ids of any shape; hooks, by which ZeRO-3 would gather it, are not called."""
    table, ids = torch.randn(50, 8), torch.randint(50, (3, 7))
    embedding = partitioned(table)
    embedding.register_forward_pre_hook(lambda *_: pytest.fail("the table is gathered"))
    assert kept(embedding)
    assert embedding(ids).equal(table[ids]) and embedding(ids[0]).equal(table[ids[0]])


def test_where_ids_go():
    """To the host for a LLaDA whose embedding is there, in an engine or not; else to the model's device."""
    model, card = LLaDAModelLM(LLaDAConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=50)), torch.device("meta")
    assert fetches.ids_device(model, card) == card
    model.set_input_embeddings(partitioned(torch.randn(50, 8)))
    assert kept(model.get_input_embeddings())
    assert fetches.ids_device(SimpleNamespace(module=model), card) == torch.device("cpu")


def test_embeddings_that_are_gathered():
    """A share of several ranks, a table on an SSD, one that is trained."""
    table = torch.randn(50, 8)
    assert not kept(partitioned(table, tensor=table[:25].flatten()))
    assert not kept(partitioned(table, location=fetches.OffloadDeviceEnum.nvme))
    assert not kept(partitioned(table).requires_grad_(True))


@pytest.mark.gpu
def test_embedding_for_a_card():
    """Passes of growing and shrinking size share a page-locked buffer; none reads another's rows."""
    table = torch.randn(5000, 64, dtype=torch.bfloat16)
    embedding, want, got = partitioned(table.pin_memory()), [], []
    assert kept(embedding, "cuda")
    for number, length in enumerate((3000, 100, 4000, 4000, 5)):
        ids = torch.randint(5000, (1, length))
        want.append(table[ids])
        got.append(embedding(ids.cuda() if number % 2 else ids))
    assert all(each.is_cuda and each.cpu().equal(rows) for each, rows in zip(got, want))


class Event:
    """In place of torch.cuda.Event: notes what the host does."""

    notes = []

    def record(self):
        self.number = sum("block" in note for note in self.notes)
        self.notes.append(f"record before {self.number}")

    def synchronize(self):
        self.notes.append(f"wait for {self.number}")


class Block(nn.Linear):
    def forward(self, x):
        Event.notes.append("block")
        return super().forward(x)


class TupleBlock(Block):
    """A block that returns two things, as DeBERTa's and RoFormer's."""

    def forward(self, x):
        return super().forward(x[0] if isinstance(x, tuple) else x), None


@pytest.mark.parametrize("kind", [Block, TupleBlock])
def test_run_ahead(kind):
    """Before a block the host waits until the device has begun the one before, in a backward pass, too."""
    Event.notes.clear()
    blocks = nn.Sequential(*(kind(3, 3) for _ in range(3)))
    fetches.bound_run_ahead(blocks, Event)
    result = blocks(torch.ones(2, 3))
    loss = (result[0] if kind is TupleBlock else result).sum()
    forward = [f"record before {number}" for number in range(3)]
    waits = [f"wait for {number}" for number in range(2)]
    assert Event.notes == [forward[0], "block", forward[1], waits[0], "block", forward[2], waits[1], "block"]
    Event.notes.clear()
    loss.backward()
    assert [note.split()[0] for note in Event.notes] == ["record", "wait"] * 3


def test_another_deepspeed(monkeypatch, capsys):
    """Where the coordinator is not the one that is known, it is left alone, and that is said."""
    monkeypatch.setattr(fetches, "IS_KNOWN", False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    engine = SimpleNamespace(module=nn.Linear(2, 2))
    fetches.streamed(engine)
    assert "another way than 0.19.8" in capsys.readouterr().err and not engine.module._forward_pre_hooks
