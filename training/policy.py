"""The policy: the model that training starts from, in its engine, and what is saved of it when training is finished.

--model_name_or_path -> start_policy() -> the loop of train_dpo.py -> save_final() -> runs/NAME/final/
"""

import os
import shlex

import numpy as np
import torch.distributed as dist

import config
from files import InputError
from models import architecture, checkpoint, families, folders, lora, tokenization
from scoring.passes import most_tokens
from scoring.states import all_masked
from scoring.window import Piece
from training import card, engine, memory, runs

SMALL = 10**8  # parameters: a model below is taken for one like the embedded one, which solves its tasks alone


def check_start(model_args):
    """Refuse an adapter as the model that training starts from."""
    name = model_args.model_name_or_path
    if folders.read_adapter(folders.model_folder(name)):
        raise InputError(
            f"{name}: an adapter, expected a complete model to start from; run: python merge.py {shlex.quote(name)} "
            "OUT, and score and train with --model_name_or_path OUT"
        )


def check_row_lengths(packed, args, model_args):
    """Refuse SFT rows that padding makes longer than a model with learned positions can read."""
    model_config = architecture.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
    most = families.longest(model_config)
    prompt_tokens = np.diff(packed.bounds[:, :2], axis=1)
    padded = int(prompt_tokens.max()) + args.sft_pad_to
    if most and padded > most:
        raise InputError(
            f"--sft_pad_to {args.sft_pad_to}: makes rows of {padded} tokens, and this model reads {most}; expected "
            f"at most {args.sft_pad_to - padded + most}"
        )


def start_policy(model_args, args, ds_config, ranks):
    """The engine of the model that training starts from, with LoRA's adapters if they are asked for."""
    source = model_args.model_name_or_path
    model = checkpoint.load_model(
        source,
        checkpoint.DTYPES[model_args.use_mixed_precision],
        ds_config,
        model_args.trust_remote_code,
        model_args.shift_logits,
        model_args.load_in_4bit,
        model_args.block_size,
    )
    if ranks.first:
        print(families.attention_line(folders.plain_config(source), model_args.block_size), flush=True)
    if model_args.gradient_checkpointing:
        architecture.recompute_activations(model)
    if model_args.lora_r:
        targets = model_args.lora_targets
        model, words = lora.add(model, model_args.lora_r, model_args.lora_alpha, targets, args.seed, source)
        if ranks.first:
            print(words, flush=True)
    return engine.build(model, ds_config)


def longest_row(objective):
    """The States of one row that takes as much memory as any of the objective's."""
    return all_masked(objective.packed, objective.masking, objective.least_tokens)


def fit(policy, objective, pairs_per_rank, score_and_backward, ranks):
    """--tokens_per_forward auto: the most that fit, tried with a gradient of 0 on the longest response, all masked.

    policy: the engine. pairs_per_rank: pairs or rows of an optimizer step. score_and_backward: that of score.py.
    """
    states = longest_row(objective)
    length = states.tokens

    def backward(loss, _):
        policy.set_gradient_accumulation_boundary(False)
        policy.backward(loss, scale_wrt_gas=False)

    def no_gradient(scores):
        return 0.0 * sum(scores)

    def trial(tokens):
        piece = Piece([states] * (tokens // length), no_gradient)
        score_and_backward(policy, [piece], tokens, ranks, backward)

    most = most_tokens(length, int(objective.tokens().max()), pairs_per_rank)
    found = memory.largest_that_fits(length, most, trial, ranks, memory.first_step_bytes(policy))
    if ranks.first:
        print(
            f"tokens_per_forward auto: {found.size}; the longest response with its prompt has {length} tokens; "
            f"the trial took {found.peak_gib:.1f} GiB",
            flush=True,
        )
    return found.size


def save_final(job, run, model_args, arguments, evaluation, counts):
    """Write final/: the model, or LoRA's adapter alone, with its tokenizer and card. Every rank must call it.

    arguments: of the run. evaluation: the metrics of the last one. counts: {what: number}, for the card.
    """
    weights = engine.gather_weights(job.policy, job.ranks)
    if job.ranks.first:
        source, model, mask_id = model_args.model_name_or_path, job.policy.module, job.objective.masking.mask_id
        tokenizer = tokenization.load_tokenizer(source, model_args.trust_remote_code)
        text = card.text(run.folder.name, arguments, job.objective.packed, counts, evaluation, model.config.model_type)
        if model_args.lora_r:
            base = {
                "is_folder": os.path.isdir(source),
                "fingerprint": folders.model_fingerprint(source),
                "mask_token_id": mask_id,
                "shift_logits": bool(getattr(model.config, "shift_logits", False)),
                "block_size": families.block_size(model.config),
                "load_in_4bit": model_args.load_in_4bit,
            }
            lora.save(run.final, model, weights, tokenizer, text, base)
            merge = f"python merge.py {shlex.quote(str(run.final))} OUT merges it into the base, rounded"
            print(f"{run.final}: the adapter, in peft's format ({merge})")
        else:
            checkpoint.save_model(run.final, model, weights, source, tokenizer, text, mask_id)
            print(f"{run.final}: the aligned model, in Hugging Face format")
        parameters = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())
        streams = job.policy.zero_optimization_stage() == 3 and job.ranks.device.type == "cuda"
        has_blocks = model.blocks is not None
        print(next_commands(run, model_args, parameters < SMALL, streams, has_blocks), flush=True)
    dist.barrier()


def next_commands(run, model_args, is_small, streams, has_blocks):
    """The commands that follow a run, with the flags that they need.

    is_small: a model like the embedded one. streams: the weights may not fit the card, so that sampling streams them.
    has_blocks: a block-causal model, which says itself how long a block is.
    """
    folder, final, base = (shlex.quote(str(each)) for each in (run.folder, run.final, model_args.model_name_or_path))
    names = ["trust_remote_code", "shift_logits", "block_size", "use_mixed_precision", "load_in_4bit"]
    lengths = {"gen_length": 40, "block_length": 8} if is_small else {"gen_length": 256, "block_length": 32}
    if has_blocks:
        del lengths["block_length"]
    sampling = " ".join(f"--{name} {value}" for name, value in lengths.items())
    sampling = f"{sampling} {config.flags(names, model_args)}".rstrip()
    if streams:
        sampling += f" --deepspeed {shlex.quote(runs.streaming_config(model_args.deepspeed) or runs.STREAMING)}"
    tasks = "--tasks arithmetic" if is_small else "--tasks gsm8k --limit 200"
    return (
        f"next: python report.py {folder}\n"
        f"then: python evaluate.py --model {final} --compare {base} {tasks} {sampling}\n"
        f"and:  python generate.py --model {final} {sampling} --prompt '...'"
    )
