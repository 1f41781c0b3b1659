"""Tests of the families of 2026 against numbers made with their makers' code: logits, scores, gradients.

    bash tests/run.sh tests/models/test_originals_2026.py

A folder for each family holds a tiny checkpoint in the original layout, and ref.npz. Everything is within 1e-5 of the
largest value, or of 1.
"""

import functools

import numpy as np
import pytest
import torch
from safetensors import safe_open

import score
from models import checkpoint, families
from scoring.states import response_states
from training import engine

ALONE = engine.Ranks(0, 1, torch.device("cpu"))
MASKS = {"illada": 5, "nemotron_labs_diffusion": 100}  # 310 in the others
TRAINED = [(name, size) for name in ("sdar", "a2d_bd3lm", "nemotron_labs_diffusion") for size in (8, 4)]


@functools.cache
def load(folder):
    """A family's model, read bidirectionally where its files do not say how attention runs."""
    block_size = 0 if folder.name == "a2d_bd3lm" else "auto"
    return checkpoint.load_model(str(folder), torch.float32, block_size=block_size).eval()


def close(got, want, loose=1e-5):
    got, want = got.detach().float(), torch.as_tensor(want)
    assert float((got - want).abs().max()) < loose * max(1.0, float(want.abs().max()))


def raw_logits(model, ids, mask=None, places=None):
    """Logits as the original has them, not shifted: with a cache-less pass of the model that ours adapts."""
    more = {"attention_mask": mask} if mask is not None else {}
    if places is not None:
        more["position_ids"] = places
    body = getattr(model, model.base_model_prefix)
    hidden = body(input_ids=ids, **more).last_hidden_state
    return torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)


def given(reference, case):
    """(ids (B, L), mask (B, 1, L, L) or (B, L) or None, positions or None) of a case of ref.npz."""
    ids = torch.from_numpy(reference[f"{case}/ids"])
    places = reference.get(f"{case}/position_ids")
    if places is not None:
        places = torch.from_numpy(places).expand(ids.shape)
    mask = reference.get(f"{case}/mask")
    if mask is None:
        return ids, None, places
    mask = torch.from_numpy(mask)
    if mask.dtype == torch.bool:
        mask = mask.expand(len(ids), *mask.shape[-2:])[:, None]
    return ids, mask, places


FORWARDS = {
    "illada": ("one", "short", "batch", "leftpad", "rightpad", "shifted", "mask3d"),
    "sdar": ("fwd_B4", "fwd_B8", "full"),
    "a2d_bd3lm": ("fwd_B8", "fwd_B4", "full"),
    "fast_dllm_v2": ("fwd_B8", "fwd_B4"),
    "nemotron_labs_diffusion": ("causal", "causal_far", "full"),
}


@torch.no_grad()
@pytest.mark.parametrize("name, case", [(name, case) for name, cases in FORWARDS.items() for case in cases])
def test_logits(shared, name, case):
    """Plain rows, padded ones, block-causal and causal masks, positions beyond the first length of YaRN."""
    folder = shared / "golden" / name
    reference, model = dict(np.load(folder / "ref.npz")), load(folder)
    ids, mask, places = given(reference, case)
    if case.startswith("causal"):
        L = ids.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool).tril().expand(len(ids), 1, L, L)
    real = torch.ones(ids.shape, dtype=torch.bool)
    if mask is not None and mask.ndim == 2:
        real = mask.bool()
    elif mask is not None:
        real = mask[:, 0].any(-1)  # a padding token of the original attends to nothing
        mask = mask | ~real[:, None, :, None]  # softmax of nothing is not a number
    close(raw_logits(model, ids, mask, places)[real], reference[f"{case}/logits"][real.numpy()])


def states_of(reference, case, masking):
    """[States] of a case's rows under its masks: every hidden token weighs 1."""
    rows = zip(reference[f"{case}/x0"], reference[f"{case}/masked"], np.resize(reference[f"{case}/prompt_len"], 4))
    made = []
    for ids, masked, P in rows:
        hidden = masked[None, P:]
        made.append(response_states(ids[:P], ids[P:], hidden, hidden.astype(float), *masking))
    return made


def scores_and_gradients(model, states, reference, case):
    """Compare the sum of log-probabilities of each row, and its gradient by every tensor of the case."""
    model.zero_grad()
    got = torch.stack([each.sum() for each in score.state_scores(model, states, 100, ALONE)])
    got.sum().backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    gradients = {key.split("grad:")[1]: key for key in reference if key.startswith(f"{case}/grad:")}
    for tensor, key in gradients.items():
        close(named[tensor].grad, reference[key])
    return got


@pytest.mark.parametrize("name, size", TRAINED)
def test_shared_row(shared, name, size):
    """The doubled row of their training: scores and gradients. Nemotron's first tokens are masked there like others."""
    folder = shared / "golden" / name
    reference, model, case = dict(np.load(folder / "ref.npz")), load(folder), f"train_B{size}"
    blocks = families.Blocks(size, is_causal=name == "nemotron_labs_diffusion")
    states = states_of(reference, case, families.Masking(MASKS.get(name, 310), blocks))
    got = scores_and_gradients(model, states, reference, case)
    assert len(reference[f"{case}/score"]) == 2 and any(key.startswith(f"{case}/grad:") for key in reference)
    close(got, reference[f"{case}/score"])


@pytest.mark.parametrize("size", [8, 4])
def test_first_tokens_from_the_clean_text(shared, size):
    """Fast-dLLM v2 as its sampler reads it: shifted, a block's first token from the clean text."""
    folder = shared / "golden" / "fast_dllm_v2"
    reference, model = dict(np.load(folder / "ref.npz")), load(folder)
    blocks = families.Blocks(size, shift=True, first_from_clean=True)
    states = states_of(reference, f"odd_B{size}", families.Masking(310, blocks))
    got = scores_and_gradients(model, states, reference, f"odd_B{size}")
    close(got, reference[f"odd_B{size}/score_sampler"])


def test_bidirectional_score(shared):
    """iLLaDA's score and gradients, by rows end to end."""
    folder = shared / "golden" / "illada"
    reference, model = dict(np.load(folder / "ref.npz")), load(folder)
    got = scores_and_gradients(
        model, states_of(reference, "score", families.Masking(MASKS["illada"])), reference, "score"
    )
    close(got, reference["score/score"])


@pytest.mark.parametrize("name", FORWARDS)
def test_what_the_files_say(shared, name):
    """Attention and block size by config.json, the mask by name or number; tensors under the original's names."""
    folder = shared / "golden" / name
    said = {
        "illada": None,
        "sdar": families.Blocks(4),
        "a2d_bd3lm": None,  # read with --block_size 0
        "fast_dllm_v2": families.Blocks(8, shift=True, first_from_clean=True),
        "nemotron_labs_diffusion": families.Blocks(8, True, False, True, "prompt"),
    }
    model = load(folder)
    assert model.blocks == said[name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert stored <= names and names - stored <= {"lm_head.weight"}  # absent where it is the embedding
