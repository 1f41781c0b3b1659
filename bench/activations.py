"""plan.py's activations against those of torch: peak bytes of a forward and backward pass, on fake tensors.

    python bench/activations.py [--rows 1 4 7 14] [--lengths 300 1024] [--json FILE]      LLaDA-8B's shape
    python bench/activations.py --presets [--rows 14]                                      the shapes of configs/

Fake tensors have shapes and no data, so the full shape runs on any machine. Every storage that an operation makes is
counted until it is freed, but for weights. (torch's MemTracker does the same, but refuses models with frozen weights.)
A weight's gradient is dropped as soon as it is added up, as ZeRO sends it away. What an operation allocates inside
itself is not seen. The attention is that of a CPU, which saves what flash attention saves.

B rows, L length, N = B L tokens.
"""

import argparse
import itertools
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
import files
from models import architecture, lora
from training import deepspeed_config, footprint

LLADA_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "weight_tying": False,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
DREAM_7B = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
SMDM_1B = {
    "model_type": "smdm",
    "d_model": 1792,
    "n_layers": 20,
    "n_heads": 14,
    "mlp_hidden_size": 7168,
    "vocab_size": 32001,
    "head_size": 32000,
    "max_sequence_length": 2048,
    "rope_theta": 10000.0,
}
QWEN_05B = {
    "model_type": "a2d-qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
PRESETS = {
    "llada_8b_lora_4080": LLADA_8B,
    "llada_8b_qlora_4080": LLADA_8B,
    "llada_8b_full_192gb": LLADA_8B,
    "llada_8b_full_nvme_64gb": LLADA_8B,
    "dream_7b_lora_4080": DREAM_7B,
    "smdm_1b_4080": SMDM_1B,
    "qwen_0.5b_4080": QWEN_05B,
}  # the config.json of each one's model
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
    fields: dict  # of its config.json
    lora_r: int
    checkpointing: bool
    precision: str  # of DTYPES

    @property
    def model_config(self):
        return AutoConfig.for_model(**self.fields)

    @property
    def model_args(self):
        switch = str(self.checkpointing).lower()
        flags = ["--use_mixed_precision", self.precision, "--gradient_checkpointing", switch, "--lora_r", self.lora_r]
        return config.parse(list(map(str, flags)), "", config.ModelArguments)[0]


def fake_model(case):
    """A model of fake weights, ready to train. Call it under FakeTensorMode."""
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
            module._buffers[name] = torch.empty(meta.shape, dtype=meta.dtype)
    return model


def drop_gradient(parameter):
    parameter.grad = None


def measured(model, B, L):
    """Peak bytes of a forward and backward pass of B rows of L tokens, all scored. Call it under FakeTensorMode."""
    ids = torch.zeros((B, L), dtype=torch.int64)
    positions, targets = torch.arange(B * L), torch.zeros(B * L, dtype=torch.int64)
    held = Held([*model.parameters(), *model.buffers()])
    with held:
        model(input_ids=ids, positions=positions, targets=targets).sum().backward()
    return held.peak


def planned(case, B, L):
    """plan.py's bytes of the same graph."""
    shape = footprint.model_shape(case.model_config, case.model_args)
    ds, machine = deepspeed_config.read_ds_config(None), footprint.Machine(16, 32)
    return sum(item.size for item in footprint.graph_items(shape, B * L, ds, case.model_args, machine))


def every_case():
    """LLaDA-8B, trained in every way."""
    for lora_r, checkpointing, precision in itertools.product((16, 0), (True, False), DTYPES):
        words = (f"LoRA r {lora_r}" if lora_r else "full", "checkpointed" if checkpointing else "", precision)
        yield Case("{:10}{:13}{}".format(*words), LLADA_8B, lora_r, checkpointing, precision)


def presets():
    """The models of configs/, trained as their preset says. Activations do not depend on the weights' 4 bits."""
    for name, fields in PRESETS.items():
        path = str(ROOT / "configs" / f"{name}.yaml")
        [args] = config.parse(["--config_file", path], "", config.ModelArguments)
        yield Case(name, fields, args.lora_r, args.gradient_checkpointing, args.use_mixed_precision)


def table(cases, counts, lengths):
    """Yields the rows of the table."""
    for case in cases:
        with FakeTensorMode():
            model = fake_model(case)
            for L, B in itertools.product(lengths, counts):
                plan, peak = planned(case, B, L), measured(model, B, L)
                row = {"case": case.name, "rows": B, "length": L}
                yield row | {"planned": plan / GIB, "measured": peak / GIB, "ratio": plan / peak}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 7, 14])
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1024], help="tokens of a row")
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
