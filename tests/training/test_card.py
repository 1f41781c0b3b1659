"""Tests of training/card.py and of what is beside the card in final/: the Hub's metadata, the original's code.

bash tests/run.sh tests/training/test_card.py
"""

import dataclasses
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from small import EOS, ROOT

import config
from models import checkpoint, folders, tokenization
from training import card

ARGUMENTS = {name: value for group in config.GROUPS for name, value in dataclasses.asdict(group()).items()}
EVALUATION = {"eval_loss": 0.36251, "eval_rewards/accuracies": 0.87, "eval_rewards/accuracies_ci95": [0.79, 0.922]}
COUNTS = {"trained on": 300, "held out": 100, "steps": 75, "pairs a step": 8}


def write(source, data="prefs.jsonl", model_type="llada", **arguments):
    packed = SimpleNamespace(meta={"fingerprint": "f00d"}, files={data: 400})
    return card.text(
        "night-1", ARGUMENTS | {"model_name_or_path": str(source)} | arguments, packed, COUNTS, EVALUATION, model_type
    )


def metadata(text):
    """As the Hub's client reads it, which refuses what it does not know."""
    read = huggingface_hub.ModelCard(text)
    return read.data.to_dict()


@pytest.fixture
def base(make_llada, tmp_path):
    make_llada(tmp_path / "base")
    return tmp_path / "base"


def say(base, **front):
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# Base\n")


def test_hub_metadata(base, monkeypatch):
    say(base, license="mit", language=["en"], base_model="org/older", tags=["x"])
    found = metadata(write(base))
    assert found["license"] == "mit" and found["language"] == ["en"] and found["library_name"] == "transformers"
    assert found["base_model"] == "org/older" and found["base_model_relation"] == "finetune" and "dpo" in found["tags"]
    assert found["pipeline_tag"] == "text-generation" and "datasets" not in found
    assert "datasets" not in metadata(write(base, data="data/prefs.jsonl"))  # a file that is gone, not a data set
    found = metadata(write(base, data="org/prefs", lora_r=16))
    assert found["datasets"] == ["org/prefs"] and found["library_name"] == "peft"
    assert found["base_model_relation"] == "adapter"
    monkeypatch.setattr(folders, "model_folder", lambda name: base)
    found = metadata(write("GSAI-ML/LLaDA-8B-Instruct"))
    assert found["base_model"] == "GSAI-ML/LLaDA-8B-Instruct" and found["license"] == "mit"


@pytest.mark.parametrize("readme", [None, "", "# no metadata", "---\n[1, 2]\n---\n", "---\n: :\n\t- x\n---\n"])
def test_a_base_that_says_nothing(base, readme):
    """The card makes up no licence and names no folder of this machine."""
    if readme is not None:
        (base / "README.md").write_text(readme)
    text = write(base, data=str(base / "mine.jsonl"))
    assert not {"license", "base_model", "base_model_relation"} & metadata(text).keys()
    assert "no card that names it" in text and str(base.parent) not in text and "mine.jsonl" in text


def test_what_people_read(base):
    text = write(base, beta=0.25, estimator="spread", diffusion_steps=3)
    for words in (
        "# night-1",
        "train_dpo.py",
        "| beta | 0.25 |",
        "| estimator | spread |",
        "| steps | 75 |",
        "fingerprint f00d",
        "| trained on | 300 |",
        "| eval_loss | 0.3625 |",
        "[0.790, 0.922]",
        "import llada",
        "arXiv 2305.18290",
    ):
        assert words in text, words
    assert "import" not in write(base, model_type="Dream")
    assert "--load_in_4bit true" in write(base, load_in_4bit=True, lora_r=8)
    assert set(card.OF_PAIRS) < set(card.SHOWN) < ARGUMENTS.keys()


def test_sft(base):
    text = write(base, loss_type="sft")
    for words in ("noise_seed", "sft_pad_to", "figures of a loss", "2502.09992"):
        assert words in text, words
    assert "| beta" not in text and "sft" in metadata(text)["tags"]


def test_a_sum_names_its_losses(base):
    text = write(base, loss_type="ipo,sft", loss_weights="1,0.1")
    assert "after IPO (arXiv 2310.12036) plus supervised" in text and "| loss_weights | 1,0.1 |" in text
    assert "dpo" in metadata(text)["tags"] and "loss_weights" not in write(base)


def test_the_use_it_shows_works(base, tiny_dir):
    """The Python lines of the card, run on the embedded model's folder."""
    lines = write(base).split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(ROOT / "examples" / "tiny"))
    names = {}
    exec(lines, names)
    assert type(names["model"]).__name__ == "LLaDAModelLM"
    logits = names["model"](torch.tensor([[EOS, 5, 6]])).logits
    assert logits.shape[:2] == (1, 3) and torch.isfinite(logits).all()


# --- the original's own code ------------------------------------------------------------------------------


def test_code_of_a_folder_is_copied(base, tiny_dir, tmp_path):
    """It is not run: a file that would leave a trace leaves none. auto_map still names it."""
    (base / "modeling_llada.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model, tokenizer = checkpoint.load_model(str(base), torch.float32), tokenization.load_tokenizer(str(tiny_dir))
    checkpoint.save_model(tmp_path / "final", model, dict(model.named_parameters()), str(base), tokenizer, "card")
    assert (tmp_path / "final" / "modeling_llada.py").read_bytes() == (base / "modeling_llada.py").read_bytes()
    saved, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "final", base))
    assert saved["auto_map"] == original["auto_map"] and saved["architectures"] == original["architectures"]
    assert not (tmp_path / "ran").exists()


def test_code_on_the_hub_is_named(tmp_path):
    """As transformers writes it, REPOSITORY--file.Class; a name that has a repository keeps it."""
    found = checkpoint.own_code(
        {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoTokenizer": ["tokenization_x.Slow", None],
            "AutoModel": "other/repo--modeling_llada.LLaDAModelLM",
        },
        "org/model",
        tmp_path,
    )
    assert found == {
        "AutoConfig": "org/model--configuration_llada.LLaDAConfig",
        "AutoTokenizer": ["org/model--tokenization_x.Slow", None],
        "AutoModel": "other/repo--modeling_llada.LLaDAModelLM",
    }
    assert not list(tmp_path.iterdir())
