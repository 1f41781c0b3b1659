"""Tests of plan.py: counts that are exact, bytes against what torch keeps, verdicts. No weights, no timings.

bash tests/run.sh tests/training/test_plan.py
"""

import errno
import json

import huggingface_hub
import pytest
import torch
from small import ROOT, refusal

import config
import plan
from models import architecture, lora
from models.llada import LLaDAConfig, LLaDAModelLM, rotary
from training import deepspeed_config, footprint

PARAMETERS = 8_015_581_184  # LLaDA-8B: 2 * 126464 * 4096 + 32 * 218,112,000 + 4096
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
STATES = ("parameters", "master weights", "moments", "gradients", "gradient accumulation buffer")
LARGE = footprint.Machine(gpu_gib=16, host_gib=256)


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
    "llada_8b_lora_4080": (LLADA_8B, 32),
    "llada_8b_qlora_4080": (LLADA_8B, 16),
    "llada_8b_full_192gb": (LLADA_8B, 192),
    "llada_8b_full_nvme_64gb": (LLADA_8B, 64),
    "dream_7b_lora_4080": (DREAM_7B, 32),
    "smdm_1b_4080": (SMDM_1B, 32),
    "qwen_0.5b_4080": (QWEN_05B, 32),
}  # config.json, GB of the host that it is for


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
MODERNBERT_IDS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {  # model_type: what its config.json has besides SMALL
    "a2d-qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "a2d-llama": {},
    "bert": {},
    "modernbert": MODERNBERT_IDS,
    "albert": {"num_hidden_layers": 3, "embedding_size": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llada_8b"), LLADA_8B)


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def planned(folder, name, *argv, machine=LARGE, **lora):
    """The plan of a run under ds_configs/NAME.json."""
    groups = config.parse(
        ["--model_name_or_path", folder, "--deepspeed", str(ROOT / "ds_configs" / f"{name}.json"), *argv],
        "",
        *config.GROUPS,
    )
    for key, value in lora.items():
        setattr(groups[1], key, value)
    return plan.plan(
        architecture.load_config(folder), *groups, deepspeed_config.read_ds_config(groups[1].deepspeed), machine
    )


def size(made, *names, place="host"):
    return sum(item.size for item in made.items if item.place == place and item.name in names)


@pytest.mark.parametrize("name, each", [("zero3_offload_4080", 20), ("zero3_offload_bf16_states", 12)])
def test_host_bytes(folder, name, each):
    """160 GB and 96 GB of states at 8B; the copy that is saved comes on top."""
    made = planned(folder, name)
    assert made.parameters == made.trainable == PARAMETERS
    assert size(made, *STATES) == each * PARAMETERS
    assert size(made, "whole weights, gathered to be saved at the end") == 2 * PARAMETERS
    assert made.fits and made.verdict.startswith("FITS")
    assert "\n" not in made.verdict


def test_master_weights_alone_in_bf16(folder):
    groups = config.parse(["--model_name_or_path", folder], "", *config.GROUPS)
    ds = deepspeed_config.read_ds_config(ROOT / "ds_configs" / "zero3_offload_bf16_states.json")
    del ds["bf16"]["bf16_optimizer_states"]
    made = plan.plan(architecture.load_config(folder), *groups, ds, LARGE)
    assert size(made, *STATES) == 16 * PARAMETERS


def test_float32(folder):
    assert size(planned(folder, "zero3_offload_4080", "--use_mixed_precision", "no"), *STATES) == 24 * PARAMETERS


def test_lora(folder):
    """Only adapters have optimizer states; the base costs two bytes, on the host if parameters are offloaded."""
    r, base = 16, 2 * PARAMETERS
    adapters = 32 * r * (4 * (4096 + 4096) + 3 * (4096 + 12288))  # four of attention, three of the MLP; not the head
    made = planned(folder, "zero3_offload_4080", lora_r=r)
    assert (made.parameters, made.trainable) == (PARAMETERS, adapters)
    assert size(made, *STATES) == base + 20 * adapters
    on_card = size(planned(folder, "zero2_offload_4080", lora_r=r), "parameters", place="card")
    assert on_card == base + 2 * adapters
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
    packed = 1.032 * 0.5 * blocks  # a quarter of their bytes, and 3% of scales; the other weights stay as they are
    on_card = size(planned(folder, "zero0", lora_r=r, load_in_4bit=True), "parameters", place="card")
    assert on_card == pytest.approx(base + 2 * adapters - 2 * blocks + packed, rel=1e-3)
    attention = planned(folder, "zero3_offload_4080", lora_r=r, lora_targets="q_proj,v_proj")
    assert attention.trainable == 32 * r * 2 * (4096 + 4096)


def test_verdict_names_what_to_change(folder):
    made = planned(folder, "zero3_offload_4080", machine=footprint.Machine(16, 160))
    assert not made.fits and "fits with --lora_r 16 --deepspeed ds_configs/zero3_offload_4080.json" in made.verdict
    made = planned(folder, "zero3_offload_4080", machine=footprint.Machine(16, 14))
    assert "--load_in_4bit true --deepspeed ds_configs/zero0.json" in made.verdict
    made = planned(folder, "zero2_offload_4080")
    assert not made.fits and "the card needs" in made.verdict and "zero3_offload_4080.json" in made.verdict
    made = planned(folder, "zero3_offload_4080", "--states_per_forward", "7", "--max_length", "4096")
    assert not made.fits and "--states_per_forward 1" in made.verdict
    made = planned(folder, "zero3_offload_4080", machine=footprint.Machine(4, 8))
    assert not made.fits and "GiB of host memory" in made.verdict


def test_states_per_forward(folder):
    """auto takes more on a larger card, and a pair is then read over the bus less often."""
    small, large = (
        planned(folder, "zero3_offload_4080", "--max_length", "4096", machine=footprint.Machine(gib, 256))
        for gib in (16, 80)
    )
    assert small.work.states_per_forward < large.work.states_per_forward == 7
    assert small.training.bus > large.training.bus
    assert small.total("card") < 16 * 2**30 < large.total("card")


def test_ranks_share(folder):
    """Offloaded states are divided, so all ranks of a host hold them once; without offload each card holds a share."""
    one = planned(folder, "zero3_offload_4080")
    two = planned(folder, "zero3_offload_4080", machine=LARGE._replace(ranks=2))
    assert size(one, *STATES) == size(two, *STATES)
    one = planned(folder, "zero3")
    eight = planned(folder, "zero3", machine=LARGE._replace(ranks=8))
    assert not one.fits and eight.total("card") < one.total("card") / 4


@pytest.mark.parametrize("dtype, e", [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(dtype, e, checkpointing):
    """The plan's bytes of a graph are those of the tensors that autograd saves.

    With checkpointing: while one layer is recomputed.
    """
    width, inner, layers, B, L = 128, 384, 6, 2, 64
    model_config = LLaDAConfig(
        d_model=width, n_layers=layers, n_heads=4, n_kv_heads=2, mlp_hidden_size=inner, vocab_size=512
    )
    model = LLaDAModelLM(model_config).to(dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    shape = footprint.model_shape(model_config, config.parse([], "", config.ModelArguments)[0])
    tokens = B * L
    ids = torch.randint(0, 512, (B, L))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = model.model.transformer.wte(ids)
        cos, sin = rotary(L, width // 4, 1e4, "cpu")
        weights |= {cos.untyped_storage().data_ptr(), sin.untyped_storage().data_ptr()}
        for block in model.model.transformer.blocks:
            x = block(x, cos, sin, None)
    saved = sum(nbytes for _, nbytes in held.values())
    one = saved / layers
    flight = tokens * 3 * e * inner
    ends = tokens * ((4 if e == 2 else 0) + 4 * e) * width
    want = saved
    if checkpointing:
        layer_input = tokens * e * width
        want = layers * layer_input + one
        if e == 4:  # the one layer has saved its input too
            want -= layer_input
    got = footprint.activation_bytes(shape, B, L, e, checkpointing) - flight - ends
    assert got == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(tmp_path, capsys, monkeypatch, name):
    """Each fits the machine that it is named for, under the ds_config that its own comment launches."""
    monkeypatch.chdir(ROOT)
    fields, gigabytes = PRESETS[name]
    path = f"configs/{name}.yaml"
    argv = ["--config_file", path, "--model_name_or_path", write(tmp_path, fields), "--gpu_gib", "16"]
    assert plan.main([*argv, "--host_gib", str(gigabytes * 1e9 / 2**30)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("FITS") and "warning" not in said
    assert plan.main([*argv, "--host_gib", "2"]) == 1
    groups = _, model_args, _, train_args = config.parse(["--config_file", path], "", *config.GROUPS)
    made = plan.plan(
        architecture.load_config(str(tmp_path)), *groups, deepspeed_config.read_ds_config(model_args.deepspeed), LARGE
    )
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.yaml` |")]
    assert row.endswith(
        f"| {made.total('card') / 2**30:.1f} | {made.total('host') / 2**30:.1f} | {3600 / made.seconds:.0f} |"
    )
    text = (ROOT / path).read_text()
    assert f"launch.sh {model_args.deepspeed} --config_file {path}" in text and f"plan.py --config_file {path}" in text
    assert bool(model_args.lora_r) == ("lora" in name) and train_args.save_steps


def test_every_model_preset_is_planned():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*PRESETS, "tiny"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(tmp_path, model_type):
    """Counted exactly; LoRA's share too, against peft's own."""
    fields = SMALL | FAMILIES[model_type] | {"model_type": model_type}
    model_config = architecture.load_config(write(tmp_path, fields))
    model = architecture.build(model_config, torch.float32, False)
    model_args = config.parse([], "", config.ModelArguments)[0]
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(footprint.model_shape(model_config, model_args).trained) == whole
    model_args.lora_r = 2
    shape = footprint.model_shape(model_config, model_args)
    wrapped, _ = lora.add(model, 2, 4, "auto", 0, str(tmp_path))
    assert (sum(shape.frozen), sum(shape.trained)) == (
        whole,
        sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
    )
    assert planned(str(tmp_path), "zero3_offload_4080").fits and shape.layers == fields["num_hidden_layers"]


def test_bf16_masters_are_warned_of(folder, capsys):
    """What bf16 rounds away, by bf16 itself: a weight just above 256 times the rate stays, one just below moves."""
    rate = 2.0**-20
    for weight, moves in ((1.01 * 256 * rate, False), (0.98 * 256 * rate, True)):
        before = torch.tensor(weight, dtype=torch.bfloat16)
        assert bool(before + 0.99 * rate != before) == moves
    argv = ["--model_name_or_path", folder, "--host_gib", "256", "--gpu_gib", "16"]
    argv += ["--learning_rate", str(rate), "--deepspeed"]
    assert plan.main([*argv, str(ROOT / "ds_configs" / "zero3_offload_bf16_states.json")]) == 0
    said = capsys.readouterr().out
    assert f"away on every weight above {256 * rate:.2g}" in said and "LoRA" in said
    assert plan.main([*argv, str(ROOT / "ds_configs" / "zero3_offload_4080.json")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_page_locked_memory(folder):
    """Rounded up it costs more, exact it costs nothing; pageable buffers have none to round."""
    exact = planned(folder, "zero3_offload_4080")
    rounded = planned(folder, "zero3_offload_4080", machine=LARGE._replace(rounded=True))
    locked = [item for item in rounded.items if item.name.startswith("page-locked")]
    assert len(locked) == 2 and rounded.total("host") - exact.total("host") == sum(item.size for item in locked) > 0


def test_time_does_not_depend_on_the_batch(folder):
    """Pairs are scored one after the other; only what is done once a step is shared."""
    argv = ("--lora_r", "16", "--per_device_train_batch_size")
    one, four = (planned(folder, "zero3_offload_4080", *argv, batch) for batch in ("1", "4"))
    assert one.training.operations == four.training.operations and one.seconds == four.seconds


def test_loading(folder):
    """Whole weights are on the host before the card has them, a copy a rank; under ZeRO-3 one tensor at a time is."""
    for name in ("zero2_offload_4080", "zero0"):
        for ranks in (1, 4):
            made = planned(folder, name, "--lora_r", "16", machine=footprint.Machine(80, 256, ranks=ranks))
            assert made.total("host") >= ranks * 2 * PARAMETERS, (name, ranks)
    made = planned(folder, "zero3", machine=footprint.Machine(80, 256, ranks=8))
    assert made.total("host") < 3 * PARAMETERS + 8 * footprint.PROCESS


def test_sft_padding_counts(folder):
    argv = ("--lora_r", "16", "--loss_type", "sft", "--per_device_train_batch_size", "4")
    padded = planned(folder, "zero3_offload_4080", *argv, "--sft_pad_to", "4096")
    assert padded.total("card") > planned(folder, "zero3_offload_4080", *argv).total("card") * 1.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "0"], "expected more"),
        (["--diffusion_steps", "-3"], "--diffusion_steps is -3"),
        (["--lora_r", "-1"], "--lora_r is -1"),
        (["--trajectories", "0"], "at least 1"),
        (["--backprop_steps", "100"], "at most the 7 states"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--max_length", "0"], "--max_length"),
        (["--load_in_4bit", "true"], "--load_in_4bit"),
        (["--load_in_4bit", "true", "--lora_r", "16"], "ZeRO-3 cannot"),
    ],
)
def test_refuses_what_training_refuses(folder, capsys, argv, words):
    ds = str(ROOT / "ds_configs" / "zero3_offload_4080.json")
    assert words in refusal(plan.main, capsys, "--model_name_or_path", folder, "--deepspeed", ds, *argv)


def test_command_line(folder, capsys):
    ds_config = ROOT / "ds_configs" / "zero3_offload_4080.json"
    argv = ["--model_name_or_path", folder, "--deepspeed", str(ds_config), "--gpu_gib", "16"]
    assert plan.main([*argv, "--host_gib", "256"]) == 0
    said = capsys.readouterr().out
    assert "8,015,581,184 parameters" in said and said.splitlines()[-1].startswith("FITS")
    assert plan.main([*argv, "--host_gib", "64"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("DOES NOT FIT")
    assert "no such model folder" in refusal(plan.main, capsys, "--model_name_or_path", "/nowhere")
    assert "--ranks is 0" in refusal(plan.main, capsys, *argv, "--ranks", "0")
    assert "unknown argument --gpu_gb; did you mean --gpu_gib" in refusal(plan.main, capsys, *argv, "--gpu_gb", "16")
    assert "unknown argument --gpu; did you mean --gpu_gib?" in refusal(plan.main, capsys, *argv, "--gpu", "16")


def test_hours_for_pairs(folder, capsys):
    """One line: reference scores are forward passes alone, training has its held-out pairs too."""
    ds_config = ROOT / "ds_configs" / "zero3_offload_4080.json"
    argv = ["--model_name_or_path", folder, "--deepspeed", str(ds_config), "--gpu_gib", "16", "--host_gib", "256"]
    argv += ["--lora_r", "16", "--pairs", "800", "--eval_fraction", "0.05"]
    made = planned(folder, "zero3_offload_4080", "--lora_r", "16")
    scoring = made.scoring.seconds(LARGE)
    assert scoring == pytest.approx(made.seconds / 3, rel=0.01)  # else forward, recomputed and backward

    def line(*more):
        plan.main([*argv, *more])
        [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("800 ")]
        return said

    trained = (760 * made.seconds + 40 * scoring) / 3600
    assert line() == (
        f"800 pairs of the longest length: {800 * scoring / 3600:.1f} h of reference scores, "
        f"{trained:.1f} h of training (95 steps of 8, 40 held out)"
    )
    assert f"{2400 * scoring / 3600:.1f} h of reference scores" in line("--noise_sets", "3")
    assert f"{16 * made.seconds / 3600:.1f} h of training (2 steps of 8, 0 held out)" in line(
        "--max_steps", "2", "--eval_fraction", "0"
    )
    evaluated = (760 * made.seconds + 4 * 40 * scoring) / 3600
    assert f" {evaluated:.1f} h of training" in line("--eval_steps", "25")
    assert line("--ranks", "2").endswith("(48 steps of 16, 40 held out)")
    said = line("--loss_type", "sft")
    assert said.startswith("800 rows of the longest length: ") and "reference" not in said
    assert "--pairs is -1" in refusal(plan.main, capsys, *argv, "--pairs", "-1")


def test_both_responses_in_one_graph(folder, capsys):
    """The table says what is multiplied."""
    for size, words in (("7", "14 x 1024 tokens, both responses in one graph"), ("1", "1 x 1024 tokens ")):
        made = planned(folder, "zero3_offload_4080", "--states_per_forward", size)
        assert f"activations of {words}" in plan.table(made)


def test_a_full_disk_is_named(monkeypatch, capsys):
    """While config.json is downloaded."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    said = refusal(plan.main, capsys, "--model_name_or_path", "org/name")
    assert "/cache/config.json" in said and "No space left on device" in said


def test_no_network_is_one_sentence(capsys):
    said = refusal(plan.main, capsys, "--model_name_or_path", "org/name")
    assert "org/name is not a local folder and its config.json could not be downloaded" in said
