"""A frozen model for forward passes: streamed under ZeRO-3, else plain."""

from models import checkpoint
from training import deepspeed_config, engine


def load(model_args, ranks, name=None):
    """The model of the arguments (or another, `name`) ready to be scored with: streamed under ZeRO-3, else plain."""
    ds_config = deepspeed_config.scoring_config(deepspeed_config.read_ds_config(model_args.deepspeed), model_args)
    model = checkpoint.load_model(
        name or model_args.model_name_or_path,
        checkpoint.DTYPES[model_args.use_mixed_precision],
        ds_config,
        model_args.trust_remote_code,
        model_args.shift_logits,
        model_args.load_in_4bit,
    )
    streamed = ds_config["zero_optimization"]["stage"] == 3  # else the model fits: no engine is needed
    return engine.build(model, ds_config) if streamed else model.to(ranks.device)
