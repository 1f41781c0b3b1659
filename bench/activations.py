"""plan.py's activations against those of torch: peak bytes of a forward and backward pass, on fake tensors.

    python bench/activations.py [--rows 1 4 7 14] [--lengths 300 1024] [--json FILE]      LLaDA-8B's shape
    python bench/activations.py --presets [--rows 14]                                      the models of configs/

Fake tensors have shapes and no data, so the full shape runs on any machine. Every storage that an operation makes is
counted until it is freed, but for weights. (torch's MemTracker does the same, but refuses models with frozen weights.)
A weight's gradient is dropped as soon as it is added up, as ZeRO sends it away. What an operation allocates inside
itself is not seen. The attention is that of a CPU, which saves what flash attention saves.

B rows, L length, N = B L tokens.
"""

import argparse
import contextlib
import itertools
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
import files
from models import architecture, experts, families, lora
from models.attention import BlockRows
from training import deepspeed_config, footprint
from training.activations import Graph
from training.costs import Lengths, Row, states_of
from training.shapes import model_shape

CONFIGS = ROOT / "tests" / "configs"  # config.json of the models of configs/
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # by --use_mixed_precision
GIB = 2**30


class Held(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are not freed yet, but for those of `weights`."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {id(weight.untyped_storage()) for weight in weights}
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        key = id(storage)
        if key not in self.weights and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, key)

    def remove(self, key):
        self.now -= self.sizes.pop(key)


class Case(NamedTuple):
    """A model and how it is trained."""

    name: str
    folder: Path  # of its config.json
    lora_r: int
    checkpointing: bool
    precision: str  # of DTYPES
    block_size: int | str = "auto"

    @property
    def model_config(self):
        found = architecture.load_config(str(self.folder))
        families.settle(found, wanted=self.block_size)
        return found

    @property
    def model_args(self):
        switch = str(self.checkpointing).lower()
        flags = ["--use_mixed_precision", self.precision, "--gradient_checkpointing", switch, "--lora_r", self.lora_r]
        return config.parse(list(map(str, flags)), "", config.ModelArguments)[0]


def model_folder(preset):
    """The folder in tests/configs of a preset's model: the preset's name begins with its name."""
    [folder] = [each for each in CONFIGS.iterdir() if preset.startswith(f"{each.name}_")]
    return folder


def fake_model(case):
    """A model of fake weights, ready to train. Call it under fake()."""
    dtype, default = DTYPES[case.precision], torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # adapters have the model's
    try:
        with no_init_weights(), torch.device("meta"):
            model = architecture.build(case.model_config, dtype, False).train()
            if case.checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            if case.lora_r:
                model = lora.add(model, case.lora_r, 32, "auto", 0, "")[0]
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is not None:
                fake = nn.Parameter(torch.empty(meta.shape, dtype=dtype), requires_grad=meta.requires_grad)
                module._parameters[name] = fake
                if fake.requires_grad:
                    fake.register_post_accumulate_grad_hook(drop_gradient)
        for name, meta in module._buffers.items():
            if meta is not None:
                module._buffers[name] = torch.empty(meta.shape, dtype=meta.dtype)
    return model


@contextlib.contextmanager
def fake():
    """Fake tensors in place of real ones. Each expert gets as many tokens as another."""

    def even_spans(groups):
        """As experts.Groups.spans, which reads numbers that fake tensors do not have."""
        count, pairs = len(groups.ends), len(groups.order)
        ends = [pairs * number // count for number in range(count + 1)]
        return [(expert, slice(*span)) for expert, span in enumerate(itertools.pairwise(ends))]

    original, experts.Groups.spans = experts.Groups.spans, even_spans
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        experts.Groups.spans = original


def drop_gradient(parameter):
    parameter.grad = None


def rows_of(blocks, B, L):
    """[Row] of B rows of L tokens; of a block-causal model one row, of B states of a text of L tokens."""
    if not blocks:
        return [Row(L, L)] * B
    lengths = Lengths(L // 3, L - L // 3)
    masked = np.ones((B, lengths.response), bool)
    states = states_of(lengths, masked, masked, blocks)
    return [Row(states.shared(range(B)), B * lengths.response)]


def measured(model, blocks, B, L):
    """Peak bytes of a forward and backward pass of rows_of(), all scored that can be. Call it under fake()."""
    rows, apart = rows_of(blocks, B, L), {}
    ids = torch.zeros((B, L), dtype=torch.int64)
    if blocks:
        ids = torch.zeros((1, rows[0].tokens), dtype=torch.int64)
        apart = {"rows": BlockRows([rows[0].layout], blocks, "cpu")}
    positions = torch.arange(sum(row.graph.scored for row in rows))
    held = Held([*model.parameters(), *model.buffers()])
    with held:
        model(input_ids=ids, positions=positions, targets=torch.zeros_like(positions), **apart).sum().backward()
    return held.peak


def planned(case, B, L):
    """plan.py's bytes of the same graph, on a CPU."""
    shape = model_shape(case.model_config, case.model_args)
    graph = Graph.of(row.graph for row in rows_of(shape.blocks, B, L))
    ds, machine = deepspeed_config.read_ds_config(None), footprint.Machine(16, 32, one_memory=True)
    return sum(item.size for item in footprint.graph_items(shape, graph, ds, case.model_args, machine))


def every_case():
    """LLaDA-8B, trained in every way."""
    for lora_r, checkpointing, precision in itertools.product((16, 0), (True, False), DTYPES):
        words = (f"LoRA r {lora_r}" if lora_r else "full", "checkpointed" if checkpointing else "", precision)
        yield Case("{:10}{:13}{}".format(*words), CONFIGS / "llada_8b", lora_r, checkpointing, precision)


def presets():
    """The models of configs/, trained as their preset says. Activations do not depend on the weights' 4 bits."""
    for path in sorted(ROOT.glob("configs/*_*.yaml")):  # all but tiny.yaml
        [args] = config.parse(["--config_file", str(path)], "", config.ModelArguments)
        trained = args.lora_r, args.gradient_checkpointing, args.use_mixed_precision, args.block_size
        yield Case(path.stem, model_folder(path.stem), *trained)


def table(cases, counts, lengths):
    """Yields the rows of the table."""
    for case in cases:
        with fake():
            model = fake_model(case)
            blocks = model.blocks
            for L, B in itertools.product(lengths, counts):
                plan, peak = planned(case, B, L), measured(model, blocks, B, L)
                row = {"case": case.name, "rows": B, "length": L}
                yield row | {"planned": plan / GIB, "measured": peak / GIB, "ratio": plan / peak}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 7, 14])
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1024], help="tokens of a text")
    parser.add_argument("--presets", action="store_true", help="the models of configs/ in place of LLaDA-8B")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    print(f"{'':30}{'rows x tokens':>14}{'planned GiB':>13}{'measured':>10}{'ratio':>7}")
    rows = []
    for row in table(presets() if args.presets else every_case(), args.rows, args.lengths):
        rows.append(row)
        print(
            f"{row['case']:30}{row['rows']:6} x {row['length']:5}{row['planned']:13.2f}{row['measured']:10.2f}"
            f"{row['ratio']:7.3f}",
            flush=True,
        )
    ratios = [row["ratio"] for row in rows]
    print(f"planned / measured: {min(ratios):.3f} to {max(ratios):.3f}")
    if args.json:
        files.write_json(args.json, {"table": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
