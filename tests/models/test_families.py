"""Tests of families.py and architecture.py: every family from an original checkpoint through the whole job.

bash tests/run.sh tests/models/test_families.py

Oracles: transformers' own classes where they exist (an all-zeros 4-D mask undoes causality there), plain torch for
SMDM.
"""

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from originals import (
    ORIGINALS,
    SMDM_HEADS,
    SMDM_WIDTH,
    edit_json,
    make_original,
    make_smdm,
    oracle,
    refused,
    smdm_logits,
)
from safetensors.torch import load_file, save_file
from small import MASK, VOCAB, call, ds_config, flags, log, make_pairs, pack, refusal, run_jobs, settings

import convert
import data_prep
import generate
import score
from files import InputError
from models import cache, checkpoint, tokenization
from reasoning import sampler
from scoring.states import response_states
from training import engine

FAMILIES = (*ORIGINALS, "smdm")


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    """Every family's folder, and what an independent computation says of it."""
    folder = tmp_path_factory.mktemp("families")
    ids = torch.randint(4, VOCAB, (2, 21), generator=torch.Generator().manual_seed(3))
    logits = {}
    for family in ORIGINALS:
        logits[family] = oracle(make_original(folder / family, family), ids, family)
        for path in Path(tiny_dir).glob("token*"):
            shutil.copy(path, folder / family)
    tensors = make_smdm(folder / "mdm.safetensors")
    logits["smdm"] = smdm_logits(tensors, ids)
    convert.from_smdm(folder / "mdm.safetensors", folder / "smdm", str(tiny_dir), SMDM_HEADS)
    edit_json(folder / "smdm" / "config.json", mask_token_id=MASK)  # the tests' vocabulary has it elsewhere
    return SimpleNamespace(folder=folder, ids=ids, logits=logits)


@pytest.fixture(scope="module")
def trained(home):
    """Each family scored and trained for three steps under ZeRO-3 with both offloads; then again from step 2 on."""
    config = ds_config(home.folder / "ds.json", "zero3_offload_4080", eps=1e-3)
    first, rest = [], []
    for family in FAMILIES:
        data = pack(
            home.folder / f"packed-{family}",
            make_pairs([(5, 7, 20), (4, 12, 9), (6, 2, 3), (3, 11, 5)], 7),
            home.folder / family,
        )
        base = ["--data", data, "--deepspeed", config] + flags(
            use_mixed_precision="no",
            eval_fraction=0,
            learning_rate=1e-2,
            warmup_ratio=0,
            max_steps=3,
            gradient_accumulation_steps=1,
            tokens_per_forward=100,
        )
        run = base + flags(output_dir=home.folder / f"run-{family}", save_steps=2)
        first += [(f"{family}-score", "score", base), (f"{family}-whole", "train_dpo", run)]
        rest.append((f"{family}-rest", "train_dpo", run))
    did = run_jobs(home.folder / "out", None, first)
    assert [(name, ranks[0]["error"]) for name, ranks in did.items() if ranks[0]["error"]] == []
    for family in FAMILIES:  # as if each had been stopped after step 2
        shutil.move(home.folder / f"run-{family}" / "final", home.folder / f"final-{family}")
    return did | run_jobs(home.folder / "out", None, rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(home, family):
    """Loaded strictly, every logit is the oracle's; at positions alone, and as log-probabilities of targets, too."""
    model = checkpoint.load_model(str(home.folder / family), torch.float32)
    with torch.no_grad():
        got = model(input_ids=home.ids).logits
        assert (got - home.logits[family]).abs().max() < 2e-5 * home.logits[family].abs().max()
        at = torch.tensor([0, 5, 20, 21, 22, 40])
        some = model(input_ids=home.ids, positions=at)
        assert torch.allclose(some.logits, got.flatten(0, 1)[at], atol=1e-5)
        targets = home.ids.flatten()[at]
        logps = model(input_ids=home.ids, positions=at, targets=targets)
    want = home.logits[family].flatten(0, 1)[at].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logps, want, atol=1e-4)


def rows_of_any_length():
    """Two states of each of some responses, equal lengths not side by side, two without a prompt."""
    rng, made = np.random.default_rng(0), []
    for prompt, response in ((5, 16), (0, 7), (5, 16), (3, 1), (9, 30), (0, 1), (2, 6)):
        masked = rng.random((2, response)) < 0.5
        masked[:, 0] = True
        ids = rng.integers(4, VOCAB, prompt + response)
        made.append(response_states(ids[:prompt], ids[prompt:], masked, masked / 2, MASK))
    return made


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_row_does_not_depend_on_its_neighbours(home, family, dtype, close):
    """Rows of any length in one forward pass: each one's score is that of its own logits, alone in a batch of one.

    Models whose attention cannot tell rows apart get rows of one length at a time.
    """
    shift = "auto"
    if family == "llama":  # as Dream, its logits at i - 1 predict token i
        family, shift = "a2d-llama", "yes"
    model = checkpoint.load_model(str(home.folder / family), dtype, shift_logits=shift)
    responses, shapes, worst = rows_of_any_length(), [], 0.0
    model.register_forward_pre_hook(lambda *given: shapes.append(given[2]["input_ids"].shape), with_kwargs=True)
    with torch.no_grad():
        scores = score.state_scores(model, responses, 10**4, engine.Ranks(0, 1, torch.device("cpu")))
        joined = score.joins_rows(model)
        assert joined == (family in ("Dream", "a2d-qwen3", "a2d-llama", "smdm"))
        total = sum(states.inputs.size for states in responses)
        assert (
            shapes == [(1, total)] if joined else sorted(shapes) == [(2, 1), (2, 4), (2, 7), (2, 8), (2, 39), (4, 21)]
        )
        for states, got in zip(responses, scores):
            for row, mine in enumerate(got):
                logps = (
                    model(input_ids=torch.from_numpy(states.inputs[row : row + 1])).logits[0].float().log_softmax(-1)
                )
                at = torch.from_numpy(states.targets[row])[:, None]
                want = float((logps.gather(1, at)[:, 0] * torch.from_numpy(states.weight[row])).sum())
                worst = max(worst, abs(float(mine) - want) / abs(want))
    assert worst < close


def test_sliding_windows_do_not_join_rows(home, tmp_path):
    """Attention of rows end to end knows no window: such a model gets rows of one length, and its own attention."""
    folder = shutil.copytree(home.folder / "Dream", tmp_path / "sliding")
    edit_json(folder / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = checkpoint.load_model(str(folder), torch.float32)
    assert model.config.layer_types == ["full_attention", "sliding_attention"] and not score.joins_rows(model)
    assert (model(input_ids=home.ids).logits - home.logits["Dream"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_by_the_longest_row_do_not_join_rows(home, tmp_path, kind):
    """transformers takes the rotation's frequencies from the longest row of a pass: a row would not be alone."""
    folder = shutil.copytree(home.folder / "Dream", tmp_path / kind)
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8} | factors
    edit_json(folder / "config.json", rope_parameters=rope, max_position_embeddings=8)
    model = checkpoint.load_model(str(folder), torch.float32)
    rng, ranks = np.random.default_rng(0), engine.Ranks(0, 1, torch.device("cpu"))
    states = []
    for n in (3, 12):
        prompt, response, ones = rng.integers(5, VOCAB, 2), rng.integers(5, VOCAB, n), np.ones((1, n))
        states.append(response_states(prompt, response, ones.astype(bool), ones, MASK))
    with torch.no_grad():
        alone = [score.state_scores(model, [each], 100, ranks)[0] for each in states]
        assert torch.allclose(torch.cat(alone), torch.cat(score.state_scores(model, states, 100, ranks)), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_causality(home, family):
    """The last token moves the first's logits, and dropout is off although the model is in training mode."""
    model = checkpoint.load_model(str(home.folder / family), torch.float32)
    other = home.ids.clone()
    other[:, 6] = (other[:, 6] + 1) % VOCAB
    with torch.no_grad():
        once, again, moved = (model(input_ids=ids).logits for ids in (home.ids, home.ids, other))
    assert model.training and torch.equal(once, again) and not torch.allclose(once[:, 1], moved[:, 1], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_resume(home, trained, family):
    """Margin 0 at first, three steps that change every weight, a folder that loads, and the same end from step 2 on."""
    for name in ("score", "whole", "rest"):
        assert trained[f"{family}-{name}"][0]["error"] == ""
    lines = log(home.folder / f"run-{family}")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert abs(lines[0]["rewards/margins"]) < 1e-4 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[0]["grad_norm"] > 0
    first = load_file(home.folder / f"final-{family}" / "model.safetensors")
    resumed = load_file(home.folder / f"run-{family}" / "final" / "model.safetensors")
    assert first.keys() == resumed.keys() and all(torch.equal(first[name], resumed[name]) for name in first)
    before = dict(checkpoint.load_model(str(home.folder / family), torch.float32).named_parameters())
    after = dict(checkpoint.load_model(str(home.folder / f"final-{family}"), torch.float32).named_parameters())
    assert before.keys() == after.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert all("token_type_embeddings" in name for name in still), still


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_config(home, trained, family):
    """The fields of the original's config.json are kept; the mask is added where it was missing."""
    original = json.loads((home.folder / family / "config.json").read_text())
    saved = json.loads((home.folder / f"final-{family}" / "config.json").read_text())
    changed = {key for key in original if saved.get(key) != original[key]}
    assert changed <= {"transformers_version"} and saved["mask_token_id"] == MASK


@pytest.mark.parametrize("family", ["bert", "Dream"])
def test_original_reads_what_is_saved(home, trained, family):
    """transformers' own loading of the saved folder gives our logits."""
    final = home.folder / f"final-{family}"
    ours = checkpoint.load_model(str(final), torch.float32)(input_ids=home.ids).logits.detach()
    cls = getattr(transformers, ORIGINALS[family][0].replace("PreTraining", "MaskedLM"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = json.loads((final / "config.json").read_text())
        shared_fields = {key: value for key, value in fields.items() if key not in ("model_type", "is_causal")}
        theirs = cls.from_pretrained(final, config=cls.config_class(**shared_fields))
    assert (oracle(theirs.eval(), home.ids, family) - ours).abs().max() < 1e-4


def test_shift_is_never_guessed(home, tmp_path):
    """A plain causal model: the user gives the shift, and what is saved keeps it."""

    def load(folder, shift="auto"):
        return checkpoint.load_model(str(folder), torch.float32, shift_logits=shift)

    folder = shutil.copytree(home.folder / "a2d-llama", tmp_path / "llama")
    edit_json(folder / "config.json", model_type="llama")
    refused(lambda: load(folder), "model_type llama", "--shift_logits")
    shifted, model = load(folder, "yes"), load(folder, "no")
    logits = model(input_ids=home.ids).logits
    assert torch.allclose(shifted(input_ids=home.ids).logits[:, 1:], logits[:, :-1], atol=1e-6)
    assert (logits - home.logits["a2d-llama"]).abs().max() < 1e-4
    tokenizer, weights = tokenization.load_tokenizer(str(folder)), dict(model.named_parameters())
    checkpoint.save_model(tmp_path / "out", model, weights, folder, tokenizer, "", 3)
    assert torch.equal(load(tmp_path / "out")(input_ids=home.ids).logits, logits)
    refused(lambda: load(home.folder / "smdm", "yes"), "--shift_logits yes")


def test_strict(home, tmp_path):
    """A tensor too many, too few, or of another shape, in a family that transformers builds."""
    tensors = load_file(home.folder / "Dream" / "model.safetensors")
    shutil.copytree(home.folder / "Dream", tmp_path / "bad")
    one = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        ({one: None}, (one, "missing")),
        ({"model.extra": torch.zeros(2)}, ("model.extra", "not part")),
        ({one: torch.zeros(2, 2)}, (one, "shape")),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, tmp_path / "bad" / "model.safetensors")
        refused(lambda: checkpoint.load_model(str(tmp_path / "bad"), torch.float32), *words)


def test_learned_positions_end(home, capsys, tmp_path):
    """BERT reads so many tokens and no more: longer rows are listed, longer responses refused."""
    bert = shutil.copytree(home.folder / "bert", tmp_path / "bert")
    weights = load_file(bert / "model.safetensors")
    edit_json(bert / "config.json", max_position_embeddings=24, mask_token_id=MASK)
    place = "bert.embeddings.position_embeddings.weight"
    save_file(weights | {place: weights[place][:24].contiguous()}, bert / "model.safetensors")
    rows = [{"prompt": "7 + 5 =", "chosen": " 12" * n, "rejected": " 13"} for n in (1, 30)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = flags(model_name_or_path=bert, out=tmp_path / "packed")
    call(data_prep.main, "--in", tmp_path / "prefs.jsonl", *argv)
    said = capsys.readouterr().out
    assert "reads at most 24 tokens" in said and "too long" in said and "1 kept" in said
    argv = flags(model=bert, prompt="7 + 5 =", gen_length=32, use_mixed_precision="no")
    said = refusal(generate.main, capsys, *argv)
    assert "at most 24 tokens" in said and "--gen_length 32" in said


# --- the real tokenizers, through the whole job -----------------------------------------------------------


def real_smdm(shared, folder):
    """SMDM with the 32k sentencepiece vocabulary, tiny, converted from the original's layout."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    shutil.copy(shared / "tokenizers" / "llama_32k_tokenizer.model", tokenizer / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    small = make_smdm(folder / "small.safetensors")
    draw = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randn(n, SMDM_WIDTH, generator=draw)
        for name, n in (("transformer.wte.weight", 32001), ("lm_head.weight", 32000))
    }
    save_file(small | rows, folder / "mdm.safetensors")
    convert.from_smdm(folder / "mdm.safetensors", folder / "model", str(tokenizer), SMDM_HEADS)
    return folder / "model"


def real_dream(shared, folder):
    make_original(folder / "model", "Dream")
    edit_json(folder / "model" / "config.json", vocab_size=152064, mask_token_id=151666, pad_token_id=151643)
    tensors = load_file(folder / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(152064, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    save_file(tensors, folder / "model" / "model.safetensors")
    shutil.unpack_archive(shared / "tokenizers" / "dream_v0_instruct_7b_tokenizer.tar.xz", folder / "archive")
    for path in (folder / "archive").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".txt") and path.name != "config.json":
            shutil.copy(path, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("make, mask", [(real_smdm, 32000), (real_dream, 151666)])
def test_whole_job_with_the_real_tokenizer(shared, tmp_path, capsys, make, mask):
    """GSM8K pairs: packed, scored, trained, saved, sampled from."""
    model = make(shared, tmp_path / "made")
    rows = (shared / "prefs_gsm8k_models.jsonl").read_text().splitlines()[:12]
    (tmp_path / "prefs.jsonl").write_text("\n".join(rows) + "\n")
    data, run = tmp_path / "packed", tmp_path / "run"
    call(data_prep.main, "--in", tmp_path / "prefs.jsonl", *flags(out=data, model_name_or_path=model))
    said = capsys.readouterr().out
    assert "12 rows, 12 kept" in said and (f"({mask})" in said or f"mask: {mask}" in said)
    prompt = tokenization.prompt_ids(tokenization.load_tokenizer(str(model)), json.loads(rows[0])["prompt"], "auto")
    assert data_prep.packed.Packed(data)[0][0].tolist() == prompt  # the sampler's prompt is the trained one
    states = flags(data=data, diffusion_steps=2, trajectories=1, use_mixed_precision="no")
    two_steps = states + flags(output_dir=run, max_steps=2, gradient_accumulation_steps=1, eval_fraction=0.1)
    did = run_jobs(tmp_path / "out", None, [("score", "score", states), ("train", "train_dpo", two_steps)])
    assert [did[name][0]["error"] for name in did] == ["", ""]
    assert abs(log(run)[0]["rewards/margins"]) < 1e-3
    capsys.readouterr()
    call(generate.main, *flags(model=run / "final", prompt="2 + 3 = ?", gen_length=8, use_mixed_precision="no"))
    assert capsys.readouterr().out.endswith("\n")
    assert json.loads((run / "final" / "config.json").read_text())["mask_token_id"] == mask


@pytest.mark.parametrize("family", ["Dream", "a2d-qwen3", "llama", "smdm"])
def test_a_window_sees_what_is_kept(home, family):
    """After a pass over whole rows, a window of each row has the logits that it had, wherever rows and windows stand.

    A shifted model's window begins a token before the first that it predicts.
    """
    shift = "auto"
    if family == "llama":
        family, shift = "a2d-llama", "yes"
    model = checkpoint.load_model(str(home.folder / family), torch.float32, shift_logits=shift)
    lengths, store = {0: 9, 1: 9, 3: 14, 4: 6}, cache.Store(5, 14)
    ids = {
        slot: torch.randint(4, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for slot, n in lengths.items()
    }
    windows = {0: (3, 7), 1: (3, 7), 3: (1, 14), 4: (0, 6)}
    whole = cache.Windows(store, [cache.Window(slot, 0, n, n) for slot, n in lengths.items()], "cpu")
    part = cache.Windows(store, [cache.Window(slot, *span, lengths[slot]) for slot, span in windows.items()], "cpu")
    with torch.no_grad():
        alone = {slot: model(input_ids=row).logits[0] for slot, row in ids.items()}
        model(input_ids=torch.cat(list(ids.values()), 1), rows=whole)
        seen = torch.cat([ids[slot][:, first:stop] for slot, (first, stop) in windows.items()], 1)
        ends = np.cumsum([stop - first for first, stop in windows.values()])
        places = torch.tensor([end - 1 for end in ends])  # the last token of each window
        logits = model(input_ids=seen, rows=part, positions=places).logits
    for got, (slot, (_, stop)) in zip(logits, windows.items()):
        assert torch.allclose(got, alone[slot][stop - 1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_every_family(home, family):
    """Read whole at every pass, a cache approximates nothing; a model that cannot read a part of a row refuses it."""
    model = checkpoint.load_model(str(home.folder / family), torch.float32).eval()
    prompts = torch.randint(4, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    plain = sampler.generate(model, prompts, settings(gen_length=8, block_length=4), MASK)
    if model.joins_rows:
        for name in ("prefix", "dual"):
            sample = settings(gen_length=8, block_length=4, cache=name, refresh=1)
            assert torch.equal(sampler.generate(model, prompts, sample, MASK), plain)
        return
    assert sampler.batch_size(model, [[1]] * 20, settings()) == 8  # whatever its layers are
    sample = settings(gen_length=8, cache="dual")
    with pytest.raises(InputError, match="cannot read a part of a row; leave it out"):
        sampler.check_model(model, [[1]], sample)
