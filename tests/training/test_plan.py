"""Tests of plan.py: counts that are exact, bytes against what torch keeps, verdicts. No weights, no timings.

bash tests/run.sh tests/training/test_plan.py
"""

import errno
import json
import sys

import huggingface_hub
import pytest
import torch
from small import ROOT, refusal

sys.path.insert(0, str(ROOT / "bench"))

import activations

import config
import plan
from models import architecture, lora
from models.families import Blocks
from scoring import noise, passes
from training import costs, deepspeed_config, footprint
from training.activations import Graph
from training.shapes import model_shape

PARAMETERS = 8_015_581_184  # LLaDA-8B: 2 * 126464 * 4096 + 32 * 218,112,000 + 4096
STATES = ("parameters", "master weights", "moments", "gradients", "gradient accumulation buffer")
SEVEN_STATES = ("--estimator", "spread", "--diffusion_steps", "3", "--trajectories", "3")
LARGE = footprint.Machine(gpu_gib=16, host_gib=256)


HOSTS = {"llada_8b_qlora_4080": 16, "llada_8b_full_192gb": 192, "llada_8b_full_nvme_64gb": 64}  # GB of memory; else 32


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
MODERNBERT_IDS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {  # model_type: what its config.json has besides SMALL
    "a2d-qwen3": {"num_key_value_heads": 1, "head_dim": 24, "block_size": 0},
    "a2d-llama": {"block_size": 0},
    "bert": {},
    "modernbert": MODERNBERT_IDS,
    "albert": {"num_hidden_layers": 3, "embedding_size": 16},
}


PRESETS = sorted(path.stem for path in ROOT.glob("configs/*_*.yaml"))  # all but tiny.yaml


@pytest.fixture(scope="module")
def folder():
    return str(activations.CONFIGS / "llada_8b")


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def planned(folder, name, *argv, machine=LARGE, lengths=None, **lora):
    """The plan of a run under ds_configs/NAME.json."""
    groups = config.parse(
        ["--model_name_or_path", folder, "--deepspeed", str(ROOT / "ds_configs" / f"{name}.json"), *argv],
        "",
        *config.GROUPS,
    )
    for key, value in lora.items():
        setattr(groups[1], key, value)
    return plan.plan(
        architecture.load_config(folder),
        *groups,
        deepspeed_config.read_ds_config(groups[1].deepspeed),
        machine,
        lengths,
    )


def shape_of(name, *argv):
    """The Shape of a model of tests/configs."""
    model_args = config.parse(list(argv), "", config.ModelArguments)[0]
    return model_shape(architecture.load_config(str(activations.CONFIGS / name)), model_args)


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
    made = planned(folder, "zero3_offload_4080", "--tokens_per_forward", "65536", "--max_length", "4096")
    assert not made.fits and "fits with --tokens_per_forward 4096" in made.verdict
    made = planned(folder, "zero3_offload_4080", machine=footprint.Machine(4, 8))
    assert not made.fits and "GiB of host memory" in made.verdict


def test_tokens_per_forward(folder):
    """auto takes more on a larger card, up to a whole pair in one graph, and the bus then carries the weights less."""
    argv = ("--max_length", "4096", "--lora_r", "16", *SEVEN_STATES)
    small, large = (
        planned(folder, "zero3_offload_4080", *argv, machine=footprint.Machine(gib, 256)) for gib in (16, 80)
    )
    assert 4096 < small.work.tokens_per_forward < large.work.tokens_per_forward == 14 * 4096
    assert small.training.bus > large.training.bus and small.training.operations > large.training.operations
    assert small.total("card") < 16 * 2**30 < large.total("card")
    assert "activations of 57344 tokens" in plan.table(large)
    given = planned(folder, "zero3_offload_4080", "--tokens_per_forward", "5000")
    assert given.work.tokens_per_forward == 5000 and given.work.largest_graph.tokens == 4 * 1024


def test_costs_are_those_of_the_passes(folder):
    """Weights cross the bus once in a pass without a graph and twice in one with a graph, the head once, the embedding
    never."""
    lengths, states, pairs = costs.Lengths(100, 200), 7, 8
    argv = (*SEVEN_STATES, "--lora_r", "16", "--tokens_per_forward")
    small = 65 * 4096 + 32 * 16 * 4096 * (4 * 2 + 3)  # the norms, and adapters of width 4096: they stay on the card
    once = 2 * (PARAMETERS - 126464 * 4096 + 41_943_040 - small)  # bytes
    step = 4 * 41_943_040  # of the adapters' gradients in float32
    for tokens in (300, 2100, 4200, 9000):
        made = planned(folder, "zero3_offload_4080", *argv, str(tokens), lengths=lengths)
        rows = [[300] * 2 * states] * pairs
        without_graph, with_graph = passes.divide(rows, rows, tokens).counts
        gradients = 2 * 41_943_040 * (2 * with_graph - 1)
        weights = once * (without_graph + 2 * with_graph) - 2 * 126464 * 4096 * with_graph
        assert made.training.bus * pairs == pytest.approx(weights + gradients + step)
    share = sum(row.scored for row in made.work.rows(made.work.responses, 1)) / (2 * states * 200)
    assert share == pytest.approx(4 / 7, abs=0.01)  # states of 3, 2 and 1 thirds: (3 + 3 x 2 + 3 x 1) / 3 / 7
    blocks = 300 * (2 * 32 * (4 * 4096**2 + 3 * 4096 * 12288) + 32 * 4 * 300 * 4096)
    head = share * 200 * 2 * 126464 * 4096
    assert made.training.operations == pytest.approx(14 * 3 * (blocks + head))


def block_work(tokens, *argv, size=8):
    """The Work of a step of a block-causal model: prompts of 10 tokens, responses of 21, 4 states of each."""
    _, _, noise_args, train_args = config.parse(list(argv), "", *config.GROUPS)
    noise.settle(noise_args, True)
    lengths = costs.Lengths(10, 21)
    work = costs.work_of(lengths, noise_args, train_args, noise_args.diffusion_steps, Blocks(size))
    return work._replace(tokens_per_forward=tokens)


def test_a_response_of_a_block_causal_model_is_a_row():
    """Blocks begin at 8, 16 and 24: a copy has 23 tokens, the clean text 24. Rows are divided where they must be."""
    work = block_work(1000)
    assert (work.least_tokens, work.most_tokens) == (24 + 23, 16 * (24 + 4 * 23))
    assert [row.tokens for row in work.rows(work.responses, 1000)] == [24 + 4 * 23] * 2
    assert [row.tokens for row in work.rows(work.responses, 115)] == [24 + 2 * 23] * 4
    assert [row.tokens for row in work.rows(work.responses, 1)] == [24 + 23] * 8
    without_graph, with_graph = work.divided
    assert without_graph == [] and [len(rows) for rows in with_graph] == [8, 8]
    assert work.largest_graph == Graph(8 * 116, 8 * 92, 8 * 24, 8 * 4 * (24 + 23), 8 * (24 * 24 + 23 * 47))
    [row, _] = work.rows(work.responses, 1000)
    assert row.products == 24 * 24 + 4 * 23 * (24 + 23)
    sft = block_work(1000, "--loss_type", "sft")
    assert [row.tokens for row in sft.rows(sft.responses, 1000)] == [24 + 23]


def test_blocks_of_a_whole_row_cost_what_bidirectional_rows_do():
    shape, [row, _] = shape_of("llada_8b"), block_work(1, size=64).responses
    rows = costs.Work.rows([row], 1)
    assert [each.tokens for each in rows] == [31] * 4 and rows[0].products == 31**2
    plain = [costs.Row(31, each.scored) for each in rows]
    assert costs.operations_of(shape, rows) == costs.operations_of(shape, plain)


def test_a_pass_takes_the_slower_of_arithmetic_and_bus():
    machine = footprint.Machine(16, 32, tflops=1, pcie_gbs=1)
    cost = costs.Cost([costs.Pass(3e12, 1e9), costs.Pass(1e12, 4e9)], pairs=2)
    assert cost.seconds(machine) == (3 + 4) / 2 and cost.seconds(machine, overlap=False) == (3 + 1 + 1 + 4) / 2


def test_ranks_share(folder):
    """Offloaded states are divided, so all ranks of a host hold them once; without offload each card holds a share."""
    one = planned(folder, "zero3_offload_4080")
    two = planned(folder, "zero3_offload_4080", machine=LARGE._replace(ranks=2))
    assert size(one, *STATES) == size(two, *STATES)
    one = planned(folder, "zero3")
    eight = planned(folder, "zero3", machine=LARGE._replace(ranks=8))
    assert not one.fits and eight.total("card") < one.total("card") / 4


LLADA = {"model_type": "llada", "d_model": 512, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
MIXTURE = {  # LLaDA-MoE's
    "model_type": "lladamoe",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "rope_theta": 50000,
    "partial_rotary_factor": 1,
}
SHARED = {  # a block-causal model with norms of queries and keys, and wide heads
    "model_type": "sdar",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "vocab_size": 512,
    "block_size": 4,
    "rope_theta": 1e6,
}
SIZES = {  # the largest moment: the logits, in three chunks; a layer; experts; attention
    "logits": LLADA | {"mlp_hidden_size": 1536, "vocab_size": 65536},
    "layer": LLADA | {"mlp_hidden_size": 1536, "vocab_size": 512},
    "experts": MIXTURE | {"expert_intermediate_size": 128, "vocab_size": 512},
    "shared row": SHARED,
    "wide experts": MIXTURE | {"expert_intermediate_size": 512, "vocab_size": 512},
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(tmp_path, name, precision, lora_r, checkpointing):
    """The plan's bytes of a graph are torch's peak on fake tensors. bench/activations.py has the full shapes."""
    write(tmp_path, SIZES[name])
    case = activations.Case("", tmp_path, lora_r, checkpointing, precision)
    with activations.fake():
        blocks = activations.families.blocks(case.model_config)
        measured = activations.measured(activations.fake_model(case), blocks, 8, 500)
    assert activations.planned(case, 8, 500) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(capsys, monkeypatch, name):
    """Each fits the machine that it is named for, under the ds_config that its own comment launches."""
    monkeypatch.chdir(ROOT)
    path, gigabytes, model = f"configs/{name}.yaml", HOSTS.get(name, 32), str(activations.model_folder(name))
    argv = ["--config_file", path, "--model_name_or_path", model, "--gpu_gib", "16"]
    assert plan.main([*argv, "--host_gib", str(gigabytes * 1e9 / 2**30)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("FITS") and "warning" not in said
    groups = _, model_args, _, train_args = config.parse(["--config_file", path], "", *config.GROUPS)
    read = architecture.load_config(model), *groups, deepspeed_config.read_ds_config(model_args.deepspeed)
    assert not plan.plan(*read, footprint.Machine(16, 2), advise=False).fits
    long, short = (plan.plan(*read, LARGE, lengths=lengths) for lengths in (None, costs.Lengths(100, 200)))
    memory_gib = " | ".join(f"{long.total(place) / 2**30:.1f}" for place in ("card", "host"))
    row = f"| {memory_gib} | {3600 / short.seconds:.0f} | {3600 / long.seconds:.0f} |"
    tables = (ROOT / "README.md").read_text() + (ROOT / "docs" / "tuning.md").read_text()
    [line] = [line for line in tables.splitlines() if line.startswith(f"| `{name}.yaml`") and line.count("|") == 7]
    assert line.endswith(row)
    text = (ROOT / path).read_text()
    assert f"launch.sh {model_args.deepspeed} --config_file {path}" in text and f"plan.py --config_file {path}" in text
    assert bool(model_args.lora_r) == ("lora" in name) and train_args.save_steps


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(tmp_path, model_type):
    """Counted exactly; LoRA's share too, against peft's own."""
    fields = SMALL | FAMILIES[model_type] | {"model_type": model_type}
    model_config = architecture.load_config(write(tmp_path, fields))
    model = architecture.build(model_config, torch.float32, False)
    model_args = config.parse([], "", config.ModelArguments)[0]
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(model_shape(model_config, model_args).trained) == whole
    model_args.lora_r = 2
    shape = model_shape(model_config, model_args)
    wrapped, _ = lora.add(model, 2, 4, "auto", 0, str(tmp_path))
    assert (sum(shape.frozen), sum(shape.trained)) == (
        whole,
        sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
    )
    assert planned(str(tmp_path), "zero3_offload_4080").fits and len(shape.layers) == fields["num_hidden_layers"]


RELEASED = {"sdar_1.7b": 2.03e9, "nemotron_3b": 7_663_347_000 / 2, "illada_8b": 7.615e9, "lladamoe_7b": 7.36e9}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    assert shape_of(name).parameters == pytest.approx(RELEASED[name], rel=1e-3)
    assert shape_of("sdar_4b").parameters == 8_822_848_512 / 2


def test_a_mixture_of_experts():
    """LLaDA2-mini's released bytes; 8 of 256 experts, a shared one and the router work for a token."""
    shape = shape_of("llada2_mini", "--lora_r", "16", "--load_in_4bit", "true")
    biases = 19 * 256
    assert 2 * (shape.parameters + biases) == 32_511_286_784
    attention = 2048 * (16 + 2 * 4) * 128 + 2048 * 2048
    expert, router = 3 * 2048 * 512, 256 * 2048
    assert shape.block_weights == 20 * attention + 3 * 2048 * 5120 + 19 * (9 * expert + router)
    norms = 20 * (2 * 2048 + 2 * 128) + 2048
    assert shape.active == shape.block_weights + norms + 2 * 157184 * 2048
    assert shape.packed == 20 * attention + 3 * 2048 * 5120 + 19 * 257 * expert  # the router and the norms are not
    assert shape.unpacked == 256 * 2048 * 512  # a stack
    adapters = 20 * (2048 + 24 * 128 + 2 * 2048) + 3 * (2048 + 5120) + 19 * 3 * (2048 + 512)
    assert sum(shape.trained) == 16 * adapters
    assert shape.largest_block == attention + 2 * 2048 + 2 * 128 + 257 * expert + router
    every = shape_of("llada2_mini")
    assert max(every.trained) == 157184 * 2048 and 256 * 2048 * 512 in every.trained and every.packed == 0


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
    """A micro-step's pairs are packed with those of the others; only what is done once a step is shared."""
    argv = ("--lora_r", "16", "--gradient_accumulation_steps")
    one, four = (
        planned(folder, "zero3_offload_4080", *argv, steps, "--per_device_train_batch_size", batch)
        for steps, batch in (("8", "1"), ("2", "4"))
    )
    assert one.training.passes == four.training.passes and one.seconds == four.seconds


def test_loading(folder):
    """Whole weights are on the host before the card has them, a copy a rank; under ZeRO-3 one tensor at a time is."""
    for name in ("zero2_offload_4080", "zero0"):
        for ranks in (1, 4):
            made = planned(folder, name, "--lora_r", "16", machine=footprint.Machine(80, 256, ranks=ranks))
            assert made.total("host") >= ranks * 2 * PARAMETERS, (name, ranks)
    made = planned(folder, "zero3", machine=footprint.Machine(80, 256, ranks=8))
    assert made.total("host") < 3 * PARAMETERS + 8 * footprint.PROCESS


def test_sft_padding_counts(folder):
    argv = ("--lora_r", "16", "--loss_type", "sft", "--tokens_per_forward", "2048")
    plain, padded = (planned(folder, "zero3_offload_4080", *argv, "--sft_pad_to", pad) for pad in ("0", "4096"))
    assert (
        plain.work.largest_graph.tokens == 2048 and padded.work.largest_graph.tokens == 5120
    )  # a row longer than a pass
    assert plain.work.divided[0] == [] and padded.seconds > 5 * plain.seconds


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "0"], "expected more"),
        (["--diffusion_steps", "-3"], "--diffusion_steps is -3"),
        (["--lora_r", "-1"], "--lora_r is -1"),
        (["--trajectories", "0"], "at least 1"),
        (["--backprop_steps", "100"], "at most the 4 states"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--max_length", "0"], "--max_length"),
        (["--prompt_tokens", "-1"], "--prompt_tokens is -1"),
        (["--prompt_tokens", "100", "--response_tokens", "1000"], "longer than --max_length 1024"),
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
    argv += ["--lora_r", "16"]
    made = planned(folder, "zero3_offload_4080", "--lora_r", "16")
    scoring = made.scoring.seconds(LARGE)
    assert scoring == pytest.approx(made.seconds / 3, rel=0.01)  # else forward, recomputed and backward

    def line(*more):
        plan.main([*argv, "--pairs", "800", *more])
        [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("800 ")]
        return said

    trained = (760 * made.seconds + 40 * scoring) / 3600
    assert line() == (
        f"800 pairs (prompt and response 1024 tokens): {800 * scoring / 3600:.1f} h of reference scores, "
        f"{trained:.1f} h of training (95 steps of 8, 40 held out)"
    )
    assert f"{2400 * scoring / 3600:.1f} h of reference scores" in line("--noise_sets", "3")
    assert f"{16 * made.seconds / 3600:.1f} h of training (2 steps of 8, 0 held out)" in line(
        "--max_steps", "2", "--eval_fraction", "0"
    )
    evaluated = (760 * made.seconds + 4 * 40 * scoring) / 3600
    assert f" {evaluated:.1f} h of training" in line("--eval_steps", "25")
    assert line("--ranks", "2").endswith("(48 steps of 16, 40 held out)")
    unscored = f"800 pairs (prompt and response 1024 tokens): {trained:.1f} h of training"
    assert line("--loss_type", "simpo").startswith(unscored)
    said = line("--loss_type", "sft")
    assert said.startswith("800 rows (prompt and response 1024 tokens): ") and "reference" not in said
    assert "--pairs is -1" in refusal(plan.main, capsys, *argv, "--pairs", "-1")


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
