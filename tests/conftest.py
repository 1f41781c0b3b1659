"""What the tests share: one thread, no network, a tiny model, checkpoints written without our code.

OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q
"""

import json
import os
import shutil
import sys
from pathlib import Path

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # tiny tensors: threads only wait for each other where the machine is busy
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",  # AMX sums bfloat16 products in another order than the original's code did
    "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),  # DeepSpeed's CPU Adam, compiled once
}.items():
    os.environ.setdefault(_name, _value)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
LONGEST = [
    "test_nvme.py",
    "test_full_card.py",
    "test_train.py",
    "test_every_family.py",
    "test_launch.py",
    "test_kills.py",
    "test_world.py",
    "test_harness.py",
    "test_families.py",
]
LONGEST += ["test_full_disk.py", "test_docs.py", "test_bench.py"]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked long, too")


def pytest_collection_modifyitems(config, items):
    """Start with the files that take longest: the other workers share the rest. Skip what cannot or should not run."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("long") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="long: bash tests/run.sh --all runs it"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A model folder made by examples/new_tiny.py: random weights, a tokenizer without a chat template."""
    import jsonlines
    import new_tiny

    from reasoning import tasks

    folder = tmp_path_factory.mktemp("tiny")
    with jsonlines.open(folder / "prefs.jsonl", "w") as writer:
        writer.write_all(tasks.preference_rows(300, "train", 0))
    new_tiny.main(["--in", str(folder / "prefs.jsonl"), "--out", str(folder / "model")])
    return folder / "model"


@pytest.fixture(scope="session")
def chat_dir(tiny_dir, tmp_path_factory):
    """The tiny model, its tokenizer with a chat template."""
    folder = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("chat") / "model")
    path = folder / "tokenizer_config.json"
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def llada_chat_dir(tiny_dir):
    """The tiny model, its tokenizer with LLaDA's template and its special tokens."""
    from prepared import TEMPLATE, with_template

    return with_template(tiny_dir, "llada_chat", TEMPLATE)


@pytest.fixture
def prep(tmp_path, tiny_dir):
    """prep(rows, *flags, model=tiny_dir) -> (Packed, rejects), through main()."""
    from prepared import write_rows

    import data_prep
    from preferences import packed

    def call(rows, *flags, model=tiny_dir, name="prefs.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps(rows)) if name.endswith(".json") else write_rows(path, rows)
        data_prep.main(
            ["--in", str(path), "--out", str(tmp_path / "packed"), "--model_name_or_path", str(model), *flags]
        )
        rejects = [json.loads(line) for line in (tmp_path / "packed" / "rejects.jsonl").read_text().splitlines()]
        got = packed.Packed(tmp_path / "packed")
        assert got.meta["rows"] == got.meta["kept"] + len(rejects) == len(got) + sum(got.meta["dropped"].values())
        return got, rejects

    return call


@pytest.fixture(scope="session")
def hostile(tiny_dir, tmp_path_factory):
    """Packed pairs whose texts are out to break a page."""
    from small import call
    from written import HOSTILE

    import data_prep

    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {"prompt": f"{HOSTILE} {i}", "chosen": f"a\n  {'b ' * (i + 1)}", "rejected": f"{HOSTILE} c"} for i in range(20)
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(data_prep.main, "--in", folder / "prefs.jsonl", "--model_name_or_path", tiny_dir, "--out", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="session")
def shared():
    """Real data that the project does not ship; tests that use it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: real data and the original's logits are not part of the project")
    return folder


ORIGINAL = {  # the fields of LLaDA-8B-Instruct's config.json that shape the forward pass, and some that do not
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "init_fn": "mitchell",
    "precision": "amp_bf16",
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 6,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "vocab_size": 30,
    "embedding_size": 32,
    "max_sequence_length": 16,
    "rope": True,
    "rope_theta": 100.0,
    "rms_norm_eps": 0.01,
    "layer_norm_type": "rms",
    "block_type": "llama",
    "activation_type": "silu",
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "mask_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "use_cache": False,
    "init_device": "meta",
    "transformers_version": "4.46.2",
}


def original_shapes(config):
    """{tensor name: shape} of a LLaDA checkpoint, as the original code names them."""
    D, kv = config["d_model"], config["d_model"] // config["n_heads"] * (config["n_kv_heads"] or config["n_heads"])
    hidden, rows = (
        config["mlp_hidden_size"] or config["mlp_ratio"] * D,
        config["embedding_size"] or config["vocab_size"],
    )
    block = {
        "attn_norm.weight": (D,),
        "ff_norm.weight": (D,),
        "q_proj.weight": (D, D),
        "k_proj.weight": (kv, D),
        "v_proj.weight": (kv, D),
        "attn_out.weight": (D, D),
        "ff_proj.weight": (hidden, D),
        "up_proj.weight": (hidden, D),
        "ff_out.weight": (D, hidden),
    }
    if config["include_qkv_bias"]:
        block |= {"q_proj.bias": (D,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    shapes = {
        f"model.transformer.blocks.{i}.{name}": shape
        for i in range(config["n_layers"])
        for name, shape in block.items()
    }
    shapes |= {"model.transformer.wte.weight": (rows, D), "model.transformer.ln_f.weight": (D,)}
    return shapes if config["weight_tying"] else shapes | {"model.transformer.ff_out.weight": (rows, D)}


@pytest.fixture(scope="session")
def make_llada():
    """make_llada(folder, **fields) -> (config, tensors): a random checkpoint in the original's layout, on disk.

    files {tensor name: file name} shards it, with an index. Weights are large, so that every part of a forward matters.
    """
    from safetensors.torch import save_file

    def make(folder, files=None, **fields):
        config = ORIGINAL | fields
        rng = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(shape, generator=rng) * (1.0 if len(shape) == 1 else 2 / shape[-1] ** 0.5)
            for name, shape in original_shapes(config).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        for file in sorted(set(files.values())) if files else ["model.safetensors"]:
            part = {name: tensor for name, tensor in tensors.items() if not files or files[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        if files:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return config, tensors

    return make
