"""Whether a run fits this machine, before the night: memory by item, the bus, the time of a pair. No weights are loaded.

    config.json + arguments + ds_config -> a table and a verdict
    python plan.py --config_file configs/llada_8b_lora_4080.yaml [--gpu_gib 16] [--host_gib 64]

Host bytes per parameter are what DeepSpeed 0.19.8 allocates under ZeRO-3 with both offloads: the parameter (b, 2 in bfloat16), for a
trained one master and moments (12 in float32, 6 with bfloat16 states), its gradient twice, as it is accumulated (b) and as the optimizer
reads it (4, or 2): 20 or 12 in all, 16 with bfloat16 masters and float32 moments. bench/planned.py compares it with measured peaks.
Activations and times are estimates from above, of pairs of --max_length tokens.

N parameters, D width, L tokens, V vocabulary, S states, b bytes of a parameter.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import config
import diffusion
from config import arg
from head import CHUNK_BYTES
from packed import InputError

GIB = 2**30
CARD = (97.5e12, 0.5)  # RTX 4080: bfloat16 tensor flop/s with float32 accumulation (NVIDIA's Ada white paper), and what we count on


@dataclass
class PlanArguments:
    gpu_gib: float = arg(16.0, "the card's memory, GiB; 0: no card, all is host memory")
    host_gib: Optional[float] = arg(None, "the machine's memory, GiB; default: this machine's")
    bus_gbs: float = arg(25.0, "host to card, 1e9 bytes/s (PCIe 4.0 x16 gives some 25 of 32)")
    tflops: float = arg(CARD[0] * CARD[1] / 1e12, "what the card does, 1e12 flop/s; default: half of an RTX 4080's bfloat16 rate")
    ranks: int = arg(1, "cards on this machine")


class Anatomy(NamedTuple):
    """What of a config.json memory depends on."""

    parameters: int
    layers: int
    width: int
    linears: list  # (in, out) of the linear layers of all blocks, which LoRA adapts, by name of the leaf: [(name, in, out)]
    words: int  # rows of the head
    head: int  # parameters of the head's matrix
    reach: int  # floats of a block's widest token, recomputed and kept for its backward pass


class Plan(NamedTuple):
    anatomy: Anatomy
    trained: int
    states: int  # of a response
    states_per_forward: int
    gpu: dict  # item: bytes
    host: dict
    bus: float  # bytes a pair
    seconds: float  # a pair
    fits: bool
    advice: str


# --- the model, from its config.json ---

def read_config(name):
    """config.json of a folder, or of the hub's model `name`, as a dict; that file alone is downloaded."""
    if not name:
        raise InputError("no model given; add --model_name_or_path FOLDER_OR_HUB_NAME")
    path = Path(name) / "config.json"
    if not path.exists() and not os.path.exists(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download
        try:
            path = hf_hub_download(name, "config.json")
        except Exception as error:  # the hub's client raises dozens of kinds
            raise InputError(f"{name}: its config.json is neither in a local folder nor to be had from the hub ({type(error).__name__}); "
                             "put it in a folder and give --model_name_or_path FOLDER") from None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a model's config.json") from None


def anatomy(fields):
    """The Anatomy of a config.json. LLaDA, SMDM, Qwen2, Qwen3 and Llama by arithmetic; others are built without memory, which is slower."""
    kind = fields.get("model_type")
    try:
        if kind in ("llada", "smdm"):
            return llada_like(fields)
        if kind in ("Dream", "a2d-qwen2", "a2d-qwen3", "a2d-llama", "qwen2", "qwen3", "llama"):
            return llama_like(fields, kind)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.json: {error} is missing or no number; expected a whole config.json of model_type {kind}") from None
    return built(fields)


def llada_like(fields):
    D, layers, heads = fields["d_model"], fields["n_layers"], fields["n_heads"]
    kv = D // heads * (fields.get("n_kv_heads") or heads)
    hidden = fields.get("mlp_hidden_size") or int(fields.get("mlp_ratio", 4) * D)
    rows = fields.get("embedding_size") or fields["vocab_size"]
    words = fields.get("head_size") or rows
    block = [("q_proj", D, D), ("k_proj", D, kv), ("v_proj", D, kv), ("attn_out", D, D), ("ff_proj", D, hidden), ("up_proj", D, hidden),
             ("ff_out", hidden, D)]
    beside = 2 * D + (D + 2 * kv if fields.get("include_qkv_bias") else 0)
    return summed(layers, D, block, beside, rows, words, bool(fields.get("weight_tying")))


def llama_like(fields, kind):
    D, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    hd = fields.get("head_dim") or D // heads
    q, kv, hidden = heads * hd, hd * (fields.get("num_key_value_heads") or heads), fields["intermediate_size"]
    block = [("q_proj", D, q), ("k_proj", D, kv), ("v_proj", D, kv), ("o_proj", q, D), ("gate_proj", D, hidden), ("up_proj", D, hidden),
             ("down_proj", hidden, D)]
    qwen2 = kind in ("Dream", "a2d-qwen2", "qwen2")
    beside = 2 * D + (q + 2 * kv if qwen2 else 0) + (2 * hd if kind.endswith("qwen3") else 0)
    return summed(layers, D, block, beside, fields["vocab_size"], fields["vocab_size"], bool(fields.get("tie_word_embeddings")))


def summed(layers, D, block, beside, rows, words, tied):
    inside = sum(a * b for _, a, b in block) + beside
    N = layers * inside + rows * D + D + (0 if tied else words * D)
    reach = 10 * D + 2 * sum(b for _, _, b in block)  # norms and residuals in float32 too, each product and what it becomes
    return Anatomy(N, layers, D, block * layers, words, words * D, reach)


def built(fields):
    """Through transformers, on the meta device."""
    import torch
    import families
    from transformers import AutoConfig
    try:
        made = AutoConfig.for_model(**fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"config.json: {' '.join(str(error).split())[:200]}") from None
    with torch.device("meta"):
        model = families.build(made, torch.bfloat16, families.shifted(made))
    linears = [(name.rpartition(".")[2], a, b) for name, (a, b) in families.block_linears(model).items()]
    head, layers = model.get_output_embeddings().weight, made.num_hidden_layers
    D = made.hidden_size
    per_layer = sum(b for _, _, b in linears) // max(1, len(linears) // 6) or D
    return Anatomy(sum(value.numel() for value in model.parameters()), layers, D, linears, head.shape[0], head.numel(), 10 * D + 2 * per_layer)


# --- memory ---

def trained_parameters(body, model_args):
    """Parameters with a gradient, and an optimizer's state."""
    if not model_args.lora_r:
        return body.parameters
    leaves = None if model_args.lora_targets == "auto" else {word.strip().rpartition(".")[2] for word in model_args.lora_targets.split(",")}
    chosen = [(a, b) for name, a, b in body.linears if leaves is None or name in leaves]
    if not chosen:
        raise InputError(f"--lora_targets {model_args.lora_targets}: matches no linear layer; there are "
                         f"{','.join(sorted({name for name, _, _ in body.linears}))} (auto: all)")
    return model_args.lora_r * sum(a + b for a, b in chosen)


def fixed_items(body, trained, model_args, ds, ranks):
    """(gpu, host) bytes by item that do not depend on the states of a forward."""
    b = 2 if model_args.use_mixed_precision == "bf16" else 4
    zero, N, bf16 = ds.get("zero_optimization", {}), body.parameters, ds.get("bf16", {})
    stage = zero.get("stage", 0)
    cpu = {name: zero.get(name, {}).get("device") == "cpu" for name in ("offload_param", "offload_optimizer")}
    master = 2 if bf16.get("bf16_master_weights_and_grads") else 4
    moment = 2 if bf16.get("bf16_optimizer_states") else 4
    share = trained / (ranks if stage else 1)
    gpu, host = {}, {}
    live = max(body.head, min(N, int(zero.get("stage3_max_live_parameters", 1e9)))) + min(N, int(zero.get("stage3_prefetch_bucket_size", 5e7)))
    if stage == 3:
        (host if cpu["offload_param"] else gpu)["parameters"] = N * b / (1 if cpu["offload_param"] else ranks)
        gpu["parameters in use"] = min(N, live) * b
    else:
        gpu["parameters"] = N * b
    there = host if cpu["offload_optimizer"] else gpu
    times = ranks if there is host else 1  # the ranks share one host
    there["master weights"] = share * master * times
    there["moments"] = share * 2 * moment * times
    there["gradients, the optimizer's"] = share * master * times
    there["gradients, accumulated"] = share * b * times
    if stage in (0, 1) or trained == N:
        gpu["gradients on their way"] = trained * b if stage < 2 else (
            2 * int(zero.get("reduce_bucket_size", 5e8)) + (body.head if stage == 3 else 0)) * b
    gpu["CUDA, libraries"], host["Python, libraries"] = 0.7 * GIB, 1.0 * GIB * ranks
    host["whole weights while saving"] = trained * b
    return gpu, host, b


def forward_items(body, size, joint, tokens, scored, model_args, trained, b):
    """Bytes of one forward of `size` states and its backward pass, by item. joint: of both responses in one graph."""
    rows = size * tokens
    kept = body.layers * rows * (body.width if model_args.gradient_checkpointing else body.reach) * b * (2 if joint else 1)
    words = 1.5 if b == 2 else 1.0
    chunk = min(CHUNK_BYTES, 4 * body.words * size * scored)
    return {"activations": kept + rows * body.reach * b, "logits": 2 * words * chunk,
            "head's gradient": body.head * b if trained == body.parameters else 0}


def plan(fields, data_args, model_args, noise_args, train_args, ds, machine):
    """The Plan of a run. fields: config.json's; ds: the ds_config; machine: PlanArguments, host_gib filled in."""
    body = anatomy(fields)
    trained = trained_parameters(body, model_args)
    T, R = noise_args.diffusion_steps, noise_args.trajectories
    S = 1 if train_args.loss_type == "sft" else diffusion.state_count(
        "spread" if noise_args.estimator == "auto" else noise_args.estimator, 3 if T == "auto" else T, R)
    gpu, host, b = fixed_items(body, trained, model_args, ds, machine.ranks)
    tokens, scored = data_args.max_length, data_args.max_length * 3 // 4
    room, asked = machine.gpu_gib * GIB, model_args.states_per_forward
    wanted = [train_args.per_device_train_batch_size] if S == 1 else [S, math.ceil(S / 2), 4, 2, 1] if asked == "auto" else [min(asked, S)]
    for size in wanted:
        moving = forward_items(body, size, 1 < S == size, tokens, scored, model_args, trained, b)
        if room and sum(gpu.values()) + sum(moving.values()) <= room:
            break
    gpu |= moving
    bus, seconds = cost(body, trained, S, size, tokens, scored, model_args, ds, machine, b)
    fits, advice = verdict(gpu, host, model_args, train_args, ds, machine, size, trained == body.parameters)
    return Plan(body, trained, S, size, gpu, host, bus, seconds, fits, advice)


def cost(body, trained, S, size, tokens, scored, model_args, ds, machine, b):
    """(bytes over the bus, seconds) of one pair: a forward of both responses without a graph, and segments with one."""
    segments = math.ceil(S / size)
    joint = segments == 1  # both responses in one graph: the score is not taken first
    forwards = 2 * segments * (1 if joint else 2)
    backwards = 1 if joint else 2 * segments
    zero = ds.get("zero_optimization", {})
    streamed = zero.get("stage") == 3 and zero.get("offload_param", {}).get("device") == "cpu"
    again = forwards + backwards * (2 if joint else 1)  # each backward pass fetches the weights once more
    bus = (again * body.parameters * b if streamed else 0) + (backwards * trained * b if zero.get("offload_optimizer") else 0)
    rows = 2 * S * tokens
    inner = sum(x * y for _, x, y in body.linears) + 2 * tokens * body.width * body.layers  # multiplications of a token, attention's too
    passes = (3 if trained == body.parameters else 2) + bool(model_args.gradient_checkpointing) + (0 if joint else 1)
    flops = 2 * passes * rows * inner + 2 * (passes + 1) * 2 * S * scored * body.head
    return bus, max(flops / (machine.tflops * 1e12), bus / (machine.bus_gbs * 1e9))


def verdict(gpu, host, model_args, train_args, ds, machine, size, full):
    """(fits, what to change or to know)."""
    need, has = sum(gpu.values()) / GIB, machine.gpu_gib
    memory = sum(host.values()) / GIB + (0 if has else need)
    stage, states = ds.get("zero_optimization", {}).get("stage", 0), ds.get("bf16", {})
    if has and need > has:
        if stage < 3:
            return False, f"the card needs {need:.1f} GiB of {has:.0f}; take ds_configs/zero3_offload_4080.json, which streams the weights"
        if size > 1:
            return False, f"the card needs {need:.1f} GiB of {has:.0f}; take --states_per_forward 1"
        return False, (f"the card needs {need:.1f} GiB of {has:.0f}; take a smaller --max_length"
                       + (" or --lora_r 16" if full else "") + ("" if model_args.gradient_checkpointing else ", and --gradient_checkpointing"))
    if memory > 0.95 * machine.host_gib:
        more = f"the host needs {memory:.0f} GiB of {machine.host_gib:.0f}; "
        if full:
            return False, more + "take --lora_r 16, or a machine with more memory"
        return False, more + ("take a machine with more memory" if stage == 3 else "take ds_configs/zero3_offload_4080.json")
    if states.get("bf16_master_weights_and_grads"):
        return True, (f"but masters in bfloat16 round a step of {train_args.learning_rate:g} away on every weight above "
                      f"{256 * train_args.learning_rate:.2g}; LoRA, or float32 masters, learn at such rates")
    return True, ""


# --- what is printed ---

def line(made, machine):
    """The verdict in one line."""
    gpu = f"card {sum(made.gpu.values()) / GIB:.1f} of {machine.gpu_gib:.0f} GiB, " if machine.gpu_gib else ""
    host = sum(made.host.values()) + (0 if machine.gpu_gib else sum(made.gpu.values()))
    return (f"plan: {'FITS' if made.fits else 'DOES NOT FIT'}: {gpu}host {host / GIB:.1f} of {machine.host_gib:.0f} GiB"
            + (f"; {made.advice}" if made.advice else ""))


def table(made, machine, ds_name):
    rows = [f"{made.anatomy.parameters:,} parameters, {made.trained:,} trained; {made.states} states a response, "
            f"{made.states_per_forward} a forward; {ds_name or 'no ds_config'}"]
    for name, items in (("card" if machine.gpu_gib else "with the host's, for there is no card", made.gpu), ("host", made.host)):
        rows.append(f"{name:32s}{sum(items.values()) / GIB:8.2f} GiB")
        rows += [f"  {item:30s}{size / GIB:8.2f}" for item, size in sorted(items.items(), key=lambda pair: -pair[1]) if size >= 0.005 * GIB]
    rows.append(f"a pair: {made.bus / 1e9:.1f} GB over the bus, at most {made.seconds:.1f} s as planned, {3600 / made.seconds:.0f} pairs/h "
                f"({machine.tflops:.0f} Tflop/s, {machine.bus_gbs:.0f} GB/s; not measured)")
    return "\n".join(rows)


def host_gib():
    [total] = [int(words.split()[1]) for words in Path("/proc/meminfo").read_text().splitlines() if words.startswith("MemTotal")]
    return total * 2**10 / GIB


def read_ds(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); see ds_configs/README.md") from None


def main(argv=None):
    *groups, machine = config.parse(argv, __doc__.splitlines()[0], *config.GROUPS, PlanArguments)
    machine.host_gib = machine.host_gib or host_gib()
    if machine.ranks < 1 or machine.tflops <= 0 or machine.bus_gbs <= 0:
        raise InputError(f"--ranks {machine.ranks}, --tflops {machine.tflops}, --bus_gbs {machine.bus_gbs}: expected more than 0")
    model_args = groups[1]
    made = plan(read_config(model_args.model_name_or_path), *groups, read_ds(model_args.deepspeed), machine)
    print(table(made, machine, model_args.deepspeed))
    print(line(made, machine))
    return 0 if made.fits else 1


if __name__ == "__main__":
    config.run(main)
