"""The losses, in one table, which arguments, training, model cards and reports follow.

To add one: a function of a Pair, and its row in LOSSES. --loss_type knows it then, alone and in a sum.

gain: S - S_ref of a response, the score of the policy less that of the reference; S where a loss has no reference. It
is divided by the response's tokens where a loss takes means. margin: gain of chosen less gain of rejected. A function
takes (Pair, TrainArguments) and returns the loss of one pair, (). Its slopes by the scores are autograd's.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """What a loss is computed from: () float32 each."""

    chosen: Any  # gain of the chosen response
    rejected: Any  # gain of the rejected one
    nll: Any = None  # of the chosen response, per token, by SFT's noise; where the loss has_nll

    @property
    def margin(self):
        return self.chosen - self.rejected


def logsigmoid(x):
    """log(1 / (1 + exp(-x))), finite for all x."""
    import torch.nn.functional  # config.py reads this file before a command may import torch

    return torch.nn.functional.logsigmoid(x)


# --- the functions ----------------------------------------------------------------------------------------


def sigmoid(pair, args):
    """-log sigmoid(beta * margin): DPO, arXiv 2305.18290, equation 7.

    With label smoothing e, (1 - e) of it and e of its mirror image (conservative DPO).
    """
    e, logit = args.label_smoothing, args.beta * pair.margin
    return -(1 - e) * logsigmoid(logit) - e * logsigmoid(-logit)


def hinge(pair, args):
    """max(0, 1 - beta * margin), as SLiC (arXiv 2305.10425) and RSO (2309.06657) use it on the same margin."""
    return (1 - args.beta * pair.margin).relu()


def ipo(pair, args):
    """(margin - 1 / (2 beta))^2, arXiv 2310.12036, equation 17. Its margin is of scores per token, as in TRL."""
    return (pair.margin - 1 / (2 * args.beta)) ** 2


def sft(pair, _):
    """-log p per token of the chosen response: the masked-diffusion NLL, arXiv 2502.09992, equation 5."""
    return pair.nll


# --- the table --------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A row of the table. label: what a report calls it. method: what a model card calls it, with its source."""

    function: Callable  # (Pair, TrainArguments) -> loss ()
    label: str
    method: str
    is_per_token: bool = False  # gains are means over the tokens of a response
    has_reference: bool = True  # gains are less the reference's scores
    has_nll: bool = False  # SFT's row of the chosen response is scored, too
    smooths: bool = False  # reads --label_smoothing

    def gain(self, score, ref, tokens):
        """The gain of responses with these scores. ref: their scores under the reference. tokens: their lengths."""
        gain = score - ref if self.has_reference else score
        return gain / tokens if self.is_per_token else gain


LOSSES = {
    "sigmoid": Loss(sigmoid, "DPO", "Direct Preference Optimization (arXiv 2305.18290)", smooths=True),
    "ipo": Loss(ipo, "IPO", "IPO (arXiv 2310.12036)", is_per_token=True),
    "hinge": Loss(hinge, "hinge", "a hinge loss on the preference margin (SLiC, arXiv 2305.10425)"),
    "sft": Loss(
        sft,
        "SFT",
        "supervised fine-tuning by the masked-diffusion loss (arXiv 2502.09992)",
        has_reference=False,
        has_nll=True,
    ),
}  # by a name of --loss_type


# --- --loss_type and --loss_weights -----------------------------------------------------------------------


class Term(NamedTuple):
    """A loss of a sum, and its weight there."""

    loss: Loss
    weight: float


def loss_names(text):
    """The type of --loss_type: a name of LOSSES, or several with commas."""
    names = text.split(",")
    for name in names:
        if name not in LOSSES:
            raise ArgumentTypeError(f"no loss is called {name!r}, expected {', '.join(LOSSES)}, or several with commas")
    if len(set(names)) < len(names):
        raise ArgumentTypeError(f"{text} names a loss twice")
    return text


def loss_weights(text):
    """The type of --loss_weights: numbers above 0 with commas."""
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text} is not numbers with commas between them") from None
    if not all(0 < weight < math.inf for weight in weights):
        raise ArgumentTypeError(f"{text}, expected numbers above 0")
    return text


def terms(args):
    """[Term] of a run's TrainArguments: its loss is their weighted sum. --sft_weight adds one of sft."""
    names = args.loss_type.split(",")
    weights = [float(weight) for weight in (args.loss_weights or ",".join("1" * len(names))).split(",")]
    found = [Term(LOSSES[name], weight) for name, weight in zip(names, weights, strict=True)]
    return found + [Term(LOSSES["sft"], args.sft_weight)] * bool(args.sft_weight)


def has_nll(args):
    """Whether SFT's row of the chosen response is scored, too."""
    return any(term.loss.has_nll for term in terms(args))


def leading(loss_type):
    """The Loss that rewards are shown for: the first of a sum that is about both responses, or sft alone."""
    found = [LOSSES[name] for name in loss_type.split(",")]
    return next((loss for loss in found if loss.function is not sft), found[0])


def has_reference(loss_type):
    """Whether a --loss_type needs reference scores."""
    return any(LOSSES[name].has_reference for name in loss_type.split(","))
