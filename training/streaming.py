"""A frozen model for forward passes: its weights streamed from the host under ZeRO-3, or all on the device."""

from models import checkpoint
from training import cards, deepspeed_config, engine


def load(model_args, ranks):
    """The model of the arguments, ready for forward passes, and for backward passes through its activations.

    Under ZeRO-3 it is a DeepSpeed engine that streams the weights; otherwise they fit, and no engine is needed.
    """
    ds_config = deepspeed_config.scoring_config(deepspeed_config.read_ds_config(model_args.deepspeed), model_args)
    name = model_args.model_name_or_path
    with cards.loading(name):
        model = checkpoint.load_model(
            name,
            checkpoint.DTYPES[model_args.use_mixed_precision],
            ds_config,
            model_args.trust_remote_code,
            model_args.shift_logits,
            model_args.load_in_4bit,
            model_args.block_size,
        )
        model.requires_grad_(False)  # under ZeRO-3 a frozen embedding stays on the host
        if ds_config["zero_optimization"]["stage"] == 3:
            return engine.build(model, ds_config)
        return model.to(ranks.device)
