"""Tests of families.py and smdm.py: every family from a checkpoint in its original layout, through the whole job.

Oracles: transformers' own classes where they exist (an all-zeros 4-D mask undoes causality there), plain torch for SMDM.
"""

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import MASK, VOCAB, call, ds_config, flags, log, make_pairs, pack, refusal, run_jobs

import convert
import data_prep
import generate
from files import InputError
from models import checkpoint, families, smdm, tokenization

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
)
GROUPED = SMALL | dict(num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6)
ORIGINALS = {  # family: (class that makes it, its configuration, fields of the original's config.json beside)
    "Dream": (
        "Qwen2ForCausalLM",
        GROUPED,
        {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "rope_theta": 1e6,
            "mask_token_id": MASK,
            "pad_token_id": 2,
            "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    ),
    "a2d-qwen3": (
        "Qwen3ForCausalLM",
        GROUPED | {"head_dim": 16},
        {
            "model_type": "a2d-qwen3",
            "architectures": ["A2DQwen3LMHeadModel"],
            "tie_word_embeddings": True,
            "rope_theta": 1e4,
        },
    ),
    "a2d-llama": (
        "LlamaForCausalLM",
        GROUPED,
        {
            "model_type": "a2d-llama",
            "architectures": ["A2DLlamaLMHeadModel"],
            "tie_word_embeddings": False,
            "rope_theta": 1e4,
        },
    ),
    "bert": (
        "BertForPreTraining",
        SMALL | {"max_position_embeddings": 512},
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        SMALL
        | {
            "num_hidden_layers": 4,
            "local_attention": 8,
            "pad_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "max_position_embeddings": 512,
        },
        {"mlp_dropout": 0.1},
    ),
    "albert": ("AlbertForPreTraining", SMALL | {"embedding_size": 16, "max_position_embeddings": 512}, {}),
}
FAMILIES = (*ORIGINALS, "smdm")
SMDM_WIDTH, SMDM_HEADS = 32, 4


def make_smdm(path):
    """A small checkpoint with SMDM's names and shapes: {name: tensor}, written to path."""
    D, hidden, draw = SMDM_WIDTH, 48, torch.Generator().manual_seed(1)
    shapes = {"transformer.wte.weight": (VOCAB, D), "lm_head.weight": (VOCAB - 1, D), "transformer.ln_f.weight": (D,)}
    for i in range(2):
        block = f"transformer.h.{i}"
        shapes |= {
            f"{block}.norm_1.weight": (D,),
            f"{block}.norm_2.weight": (D,),
            f"{block}.attn.attn.weight": (3 * D, D),
            f"{block}.attn.proj.weight": (D, D),
            f"{block}.mlp.swiglu.w1.weight": (hidden, D),
            f"{block}.mlp.swiglu.w2.weight": (hidden, D),
            f"{block}.mlp.swiglu.w3.weight": (D, hidden),
        }
    tensors = {
        name: torch.randn(shape, generator=draw) * (1.0 if len(shape) == 1 else 2 / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return tensors


def smdm_logits(tensors, ids):
    """SMDM on ids (B, L) in plain torch: packed q, k, v per head, half-split rotation from bfloat16 tables."""
    take = lambda name: tensors[f"{name}.weight"]  # noqa: E731
    norm = lambda x, name: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * take(name)  # noqa: E731
    x, hd = take("transformer.wte")[ids], SMDM_WIDTH // SMDM_HEADS
    angle = torch.arange(ids.shape[1])[:, None] / 10000.0 ** (torch.arange(0, hd, 2) / hd)
    cos, sin = (part.bfloat16().float()[None, :, None] for part in (angle.cos(), angle.sin()))  # (1, L, 1, hd/2)

    def turn(h):
        a, b = h[..., : hd // 2], h[..., hd // 2 :]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    for i in range(2):
        packed = (norm(x, f"transformer.h.{i}.norm_1") @ take(f"transformer.h.{i}.attn.attn").T).view(
            *ids.shape, SMDM_HEADS, 3, hd
        )
        q, k, v = turn(packed[..., 0, :]), turn(packed[..., 1, :]), packed[..., 2, :]  # (B, L, H, hd)
        weight = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(hd)).softmax(-1)
        x = (
            x
            + torch.einsum("bhlm,bmhd->blhd", weight, v).reshape(*ids.shape, -1)
            @ take(f"transformer.h.{i}.attn.proj").T
        )
        h, mlp = norm(x, f"transformer.h.{i}.norm_2"), f"transformer.h.{i}.mlp.swiglu"
        gate = h @ take(f"{mlp}.w1").T
        x = x + (gate * gate.sigmoid() * (h @ take(f"{mlp}.w2").T)) @ take(f"{mlp}.w3").T
    return norm(x, "transformer.ln_f") @ take("lm_head").T


def make_original(folder, family):
    """A random checkpoint of `family` as its makers publish it; returns the model that made it."""
    name, fields, said = ORIGINALS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    shape = {key: value for key, value in said.items() if key in ("rope_theta", "tie_word_embeddings")}
    model = cls(cls.config_class(**fields, **shape)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases at 1 and 0 would prove nothing
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors, seen = {}, set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied weight is stored once
            seen.add(tensor.data_ptr())
            if family == "bert":
                key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[key] = tensor.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = cls.config_class.model_type
    (folder / "config.json").write_text(json.dumps({"model_type": base, **fields, **said}))
    return model


def oracle(model, ids, family):
    """(B, L, V) logits of each token's own position."""
    with torch.no_grad():
        if family not in families.CAUSAL:
            out = model(input_ids=ids)
            return out.logits if "logits" in out else out.prediction_logits
        logits = model(input_ids=ids, attention_mask=torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1])).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if family == "Dream" else logits


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
    convert.main(
        [
            str(folder / "mdm.safetensors"),
            str(folder / "smdm"),
            "--tokenizer",
            str(tiny_dir),
            "--n_heads",
            str(SMDM_HEADS),
        ]
    )
    said = json.loads((folder / "smdm" / "config.json").read_text())
    (folder / "smdm" / "config.json").write_text(
        json.dumps(said | {"mask_token_id": MASK})
    )  # the tests' vocabulary has it elsewhere
    return SimpleNamespace(folder=folder, ids=ids, logits=logits, smdm=tensors)


@pytest.fixture(scope="module")
def trained(home):
    """Each family scored, trained for three steps under ZeRO-3 with both offloads, and again from the checkpoint of step 2."""
    config = ds_config(home.folder / "ds.json", "zero3_offload_4080", eps=1e-3)
    jobs = []
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
            states_per_forward=3,
        )
        jobs += [(f"{family}-score", "score", base)] + [
            (f"{family}-{name}", "train_dpo", base + flags(output_dir=home.folder / f"run-{family}", save_steps=2))
            for name in ("whole", "rest")
        ]
    first, rest = [job for job in jobs if not job[0].endswith("rest")], [job for job in jobs if job[0].endswith("rest")]
    did = run_jobs(home.folder / "out", None, first)
    assert [(name, ranks[0]["error"]) for name, ranks in did.items() if ranks[0]["error"]] == []
    for family in FAMILIES:
        shutil.move(
            home.folder / f"run-{family}" / "final", home.folder / f"final-{family}"
        )  # as if it had been stopped after step 2
    did |= run_jobs(home.folder / "out", None, rest)
    return did


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
    assert (
        abs(lines[0]["rewards/margins"]) < 1e-4
        and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        and lines[0]["grad_norm"] > 0
    )
    first, resumed = (
        load_file(folder / "model.safetensors")
        for folder in (home.folder / f"final-{family}", home.folder / f"run-{family}" / "final")
    )
    assert first.keys() == resumed.keys() and all(torch.equal(first[name], resumed[name]) for name in first)
    before = dict(checkpoint.load_model(str(home.folder / family), torch.float32).named_parameters())
    after = dict(checkpoint.load_model(str(home.folder / f"final-{family}"), torch.float32).named_parameters())
    assert before.keys() == after.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert all("token_type_embeddings" in name for name in still), still


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_config(home, trained, family):
    """What the original's config.json says stays said; the mask is noted where it was not."""
    was, saved = (
        json.loads((folder / "config.json").read_text())
        for folder in (home.folder / family, home.folder / f"final-{family}")
    )
    assert {key: saved.get(key) for key in was if key != "transformers_version"} == {
        key: was[key] for key in was if key != "transformers_version"
    }
    assert saved["mask_token_id"] == MASK


@pytest.mark.parametrize("family", ["bert", "Dream"])
def test_original_reads_what_is_saved(home, trained, family):
    """transformers' own loading of the saved folder gives our logits."""
    final = home.folder / f"final-{family}"
    ours = checkpoint.load_model(str(final), torch.float32)(input_ids=home.ids).logits.detach()
    cls = getattr(transformers, ORIGINALS[family][0].replace("PreTraining", "MaskedLM"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = json.loads((final / "config.json").read_text())
        theirs = cls.from_pretrained(
            final, config=cls.config_class(**{key: said[key] for key in said if key not in ("model_type", "is_causal")})
        )
    assert (oracle(theirs.eval(), home.ids, family) - ours).abs().max() < 1e-4


def test_smdm_both_ways(home, tmp_path):
    """Original -> folder -> original, bit for bit; what is no SMDM is refused."""
    convert.main([str(home.folder / "smdm"), str(tmp_path / "new" / "back.safetensors")])
    back = load_file(tmp_path / "new" / "back.safetensors")
    assert back.keys() == home.smdm.keys() and all(torch.equal(back[name], home.smdm[name]) for name in back)
    refused = lambda tensors, *words: (
        save_file(tensors, tmp_path / "bad.safetensors"),
        refuse(  # noqa: E731
            lambda: convert.from_smdm(
                str(tmp_path / "bad.safetensors"), tmp_path / "no", str(home.folder / "bert"), SMDM_HEADS
            ),
            *words,
        ),
    )
    refused(
        {name: tensor for name, tensor in home.smdm.items() if name != "lm_head.weight"}, "lm_head.weight", "missing"
    )
    refused(home.smdm | {"strange.weight": torch.zeros(1)}, "strange.weight")
    refused(home.smdm | {"transformer.h.1.norm_1.weight": torch.zeros(3)}, "attn_norm", "shape")
    whole = (home.folder / "mdm.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:-100])
    refuse(
        lambda: convert.from_smdm(
            str(tmp_path / "torn.safetensors"), tmp_path / "no", str(home.folder / "bert"), SMDM_HEADS
        ),
        "torn.safetensors",
        "download it again",
    )
    refuse(
        lambda: convert.from_smdm(
            str(home.folder / "mdm.safetensors"), tmp_path / "no", str(tmp_path / "nowhere"), SMDM_HEADS
        ),
        "--tokenizer",
        "nowhere",
    )
    assert not (tmp_path / "no").exists()
    refuse(lambda: smdm.config_of({name: tuple(tensor.shape) for name, tensor in home.smdm.items()}), "--n_heads")
    refuse(lambda: checkpoint.load_model(str(home.folder / "mdm.safetensors"), torch.float32), "convert.py")


def refuse(action, *words):
    with pytest.raises(InputError) as error:
        action()
    assert all(word in str(error.value) for word in words), error.value


def test_released_smdm():
    """The released 1028M: its heads from the width, its parameters as counted on the original."""
    shapes = {
        "transformer.wte.weight": (32001, 1792),
        "lm_head.weight": (32000, 1792),
        "transformer.h.0.mlp.swiglu.w1.weight": (7168, 1792),
    }
    config = smdm.config_of(shapes | {f"transformer.h.{i}.norm_1.weight": (1792,) for i in range(20)})
    with torch.device("meta"):
        model = smdm.SMDMModelLM(config)
    assert (config.n_heads, config.mask_token_id) == (14, 32000) and sum(
        value.numel() for value in model.parameters()
    ) == 1142367744


def test_shift_is_never_guessed(home, tmp_path):
    """A plain causal model: the shift is to be said, and is noted in what is saved."""
    shutil.copytree(home.folder / "a2d-llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    refuse(lambda: checkpoint.load_model(str(tmp_path / "llama"), torch.float32), "model_type llama", "--shift_logits")
    logits = {
        shift: checkpoint.load_model(str(tmp_path / "llama"), torch.float32, shift_logits=shift)(
            input_ids=home.ids
        ).logits
        for shift in ("yes", "no")
    }
    assert torch.allclose(logits["yes"][:, 1:], logits["no"][:, :-1], atol=1e-6)
    assert (logits["no"] - home.logits["a2d-llama"]).abs().max() < 1e-4
    model = checkpoint.load_model(str(tmp_path / "llama"), torch.float32, shift_logits="no")
    checkpoint.save_model(
        tmp_path / "out",
        model,
        dict(model.named_parameters()),
        tmp_path / "llama",
        tokenization.load_tokenizer(str(tmp_path / "llama")),
        "",
        3,
    )
    assert torch.equal(
        checkpoint.load_model(str(tmp_path / "out"), torch.float32)(input_ids=home.ids).logits, logits["no"]
    )
    refuse(
        lambda: checkpoint.load_model(str(home.folder / "smdm"), torch.float32, shift_logits="yes"),
        "--shift_logits yes",
    )


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
        save_file(
            {name: tensor for name, tensor in (tensors | change).items() if tensor is not None},
            tmp_path / "bad" / "model.safetensors",
        )
        refuse(lambda: checkpoint.load_model(str(tmp_path / "bad"), torch.float32), *words)


def test_learned_positions_end(home, capsys, tmp_path):
    """BERT reads so many tokens and no more: longer rows are listed, longer responses refused."""
    shutil.copytree(home.folder / "bert", tmp_path / "bert")
    path, weights = tmp_path / "bert" / "config.json", load_file(home.folder / "bert" / "model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 24, "mask_token_id": MASK}))
    place = "bert.embeddings.position_embeddings.weight"
    save_file(weights | {place: weights[place][:24].contiguous()}, tmp_path / "bert" / "model.safetensors")
    (tmp_path / "prefs.jsonl").write_text(
        "".join(json.dumps({"prompt": "7 + 5 =", "chosen": " 12" * n, "rejected": " 13"}) + "\n" for n in (1, 30))
    )
    call(
        data_prep.main,
        *flags(model_name_or_path=tmp_path / "bert", out=tmp_path / "packed"),
        "--in",
        tmp_path / "prefs.jsonl",
    )
    said = capsys.readouterr().out
    assert "reads at most 24 tokens" in said and "too long" in said and "1 kept" in said
    said = refusal(
        generate.main,
        capsys,
        *flags(model=tmp_path / "bert", prompt="7 + 5 =", gen_length=32, use_mixed_precision="no"),
    )
    assert "at most 24 tokens" in said and "--gen_length 32" in said


# the real tokenizers, through the whole job


def real_smdm(shared, folder):
    """SMDM with the 32k sentencepiece vocabulary, tiny, converted from the original's layout."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    shutil.copy(shared / "tokenizers" / "llama_32k_tokenizer.model", tokenizer / "tokenizer.model")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "eos_token": "</s>",
                "bos_token": "<s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
            }
        )
    )
    small = make_smdm(folder / "small.safetensors")
    draw = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randn(n, SMDM_WIDTH, generator=draw)
        for name, n in (("transformer.wte.weight", 32001), ("lm_head.weight", 32000))
    }
    save_file(small | rows, folder / "mdm.safetensors")
    convert.main(
        [str(folder / "mdm.safetensors"), str(folder / "model"), "--tokenizer", str(tokenizer), "--n_heads", "4"]
    )
    return folder / "model"


def real_dream(shared, folder):
    make_original(folder / "model", "Dream")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"vocab_size": 152064, "mask_token_id": 151666, "pad_token_id": 151643}
    (folder / "model" / "config.json").write_text(json.dumps(config))
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
    did = run_jobs(
        tmp_path / "out",
        None,
        [
            ("score", "score", states),
            (
                "train",
                "train_dpo",
                states + flags(output_dir=run, max_steps=2, gradient_accumulation_steps=1, eval_fraction=0.1),
            ),
        ],
    )
    assert [did[name][0]["error"] for name in did] == ["", ""]
    assert abs(log(run)[0]["rewards/margins"]) < 1e-3
    capsys.readouterr()
    call(generate.main, *flags(model=run / "final", prompt="2 + 3 = ?", gen_length=8, use_mixed_precision="no"))
    assert capsys.readouterr().out.endswith("\n")
    assert json.loads((run / "final" / "config.json").read_text())["mask_token_id"] == mask
