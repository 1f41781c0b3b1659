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


class Judgement(NamedTuple):
    """What a loss of one judged response is computed from: gain and kl () float32."""

    gain: Any
    kl: Any  # mean gain of responses beside prompts that they do not belong to, at least 0
    is_desirable: bool


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


def sigmoid_norm(pair, args):
    """DPO's loss of a margin of scores per token, as Tulu 3 trains (arXiv 2411.15124, section 5.1.2)."""
    return sigmoid(pair, args)


def robust(pair, args):
    """((1 - e) L(margin) - e L(-margin)) / (1 - 2e), L = DPO's loss: arXiv 2403.00409, equation 6.

    Unbiased where a share e = label_smoothing of the preferences is flipped; it may be negative.
    """
    e, logit = args.label_smoothing, args.beta * pair.margin
    return (e * logsigmoid(-logit) - (1 - e) * logsigmoid(logit)) / (1 - 2 * e)


def exo_pair(pair, args):
    """KL(p || [1 - e, e]) with p = sigmoid(beta * [margin, -margin]): EXO, arXiv 2402.00856, equation 16."""
    e, logit = args.label_smoothing, args.beta * pair.margin
    won = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-e))
    return won + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(e))


def nca_pair(pair, args):
    """-log s(w) - (log s(-w) + log s(-l)) / 2, s = sigmoid, w and l beta times the gains: NCA, arXiv 2402.05369."""
    chosen, rejected = args.beta * pair.chosen, args.beta * pair.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pair, args):
    """-log s(w) - log s(-l), s = sigmoid, w and l beta times the gains: BCO, arXiv 2404.04656, without its shift.

    The quality loss of MPO (arXiv 2411.10442): --loss_type sigmoid,bco_pair,sft --loss_weights 0.8,0.2,1
    """
    return -logsigmoid(args.beta * pair.chosen) - logsigmoid(-args.beta * pair.rejected)


def sppo_hard(pair, args):
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 of the gains: SPPO, arXiv 2405.00675, equation 4.7.

    With the probability of winning 1 for chosen and 0 for rejected. Its targets are sums, as in TRL, so beta is larger.
    """
    target = 1 / (2 * args.beta)
    return (pair.chosen - target) ** 2 + (pair.rejected + target) ** 2


def apo_zero(pair, args):
    """1 - s(w) + s(l), s = sigmoid, w and l beta times the gains: arXiv 2408.06266, equation 7.

    Chosen responses rise and rejected ones fall: for chosen ones that are better than the model's own.
    """
    return (-args.beta * pair.chosen).sigmoid() + (args.beta * pair.rejected).sigmoid()


def apo_down(pair, args):
    """s(w) + 1 - s(beta * margin), s = sigmoid, w = beta times the gain: arXiv 2408.06266, equation 8.

    Chosen responses fall and rejected ones more: for chosen ones that are worse than the model's own.
    """
    return (args.beta * pair.chosen).sigmoid() + (-args.beta * pair.margin).sigmoid()


def discopop(pair, args):
    """(1 - m) * -log s(x) + m exp(-x), x = beta * margin, m = s(x / tau), s = sigmoid: arXiv 2406.08414, equation 5."""
    logit = args.beta * pair.margin
    modulated = logit / args.discopop_tau
    exponential = (logsigmoid(modulated) - logit).exp()  # m exp(-x), where m is 0 and exp(-x) infinite too
    return -logsigmoid(logit) * (-modulated).sigmoid() + exponential


def simpo(pair, args):
    """-log sigmoid(beta * margin - gamma) of scores per token, without a reference: arXiv 2405.14734, equation 6.

    With label smoothing e, (1 - e) of it and e of -log sigmoid(gamma - beta * margin), as in TRL.
    """
    e, logit = args.label_smoothing, args.beta * pair.margin - args.simpo_gamma
    return -(1 - e) * logsigmoid(logit) - e * logsigmoid(-logit)


def cpo(pair, args):
    """DPO's loss without a reference, and the chosen response's NLL: arXiv 2401.08417, equation 5.

    The NLL is per token and counts cpo_alpha, as in TRL.
    """
    return sigmoid(pair, args) + args.cpo_alpha * pair.nll


def sft(pair, _):
    """-log p per token of the chosen response: the masked-diffusion NLL, arXiv 2502.09992, equation 5."""
    return pair.nll


def kto(judgement, args):
    """w (1 - sigmoid(beta (gain - kl))) of a desirable response, w (1 - sigmoid(beta (kl - gain))) of another.

    KTO, arXiv 2402.01306, equation 8. w: --desirable_weight or --undesirable_weight.
    """
    logit = args.beta * (judgement.gain - judgement.kl)
    if judgement.is_desirable:
        return args.desirable_weight * (1 - logit.sigmoid())
    return args.undesirable_weight * (1 - (-logit).sigmoid())


# --- the table --------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A row of the table. label: what a report calls it. method: what a model card calls it, with its source."""

    function: Callable  # (Pair or Judgement, TrainArguments) -> loss ()
    label: str
    method: str
    is_per_token: bool = False  # gains are means over the tokens of a response
    has_reference: bool = True  # gains are less the reference's scores
    has_nll: bool = False  # SFT's row of the chosen response is scored, too
    reads: tuple = ()  # the arguments of TrainArguments that it alone, or few, read
    tasks: tuple = ("preferences",)  # whose packed data it trains on

    def gain(self, score, ref, tokens):
        """The gain of responses with these scores. ref: their scores under the reference. tokens: their lengths."""
        gain = score - ref if self.has_reference else score
        return gain / tokens if self.is_per_token else gain


SMOOTHED = ("label_smoothing",)
LOSSES = {
    "sigmoid": Loss(sigmoid, "DPO", "Direct Preference Optimization (arXiv 2305.18290)", reads=SMOOTHED),
    "hinge": Loss(hinge, "hinge", "a hinge loss on the preference margin (SLiC, arXiv 2305.10425)"),
    "ipo": Loss(ipo, "IPO", "IPO (arXiv 2310.12036)", is_per_token=True),
    "sigmoid_norm": Loss(
        sigmoid_norm, "DPO per token", "length-normalized DPO (arXiv 2411.15124)", is_per_token=True, reads=SMOOTHED
    ),
    "robust": Loss(robust, "robust DPO", "robust DPO (arXiv 2403.00409)", reads=SMOOTHED),
    "exo_pair": Loss(exo_pair, "EXO", "EXO (arXiv 2402.00856)", reads=SMOOTHED),
    "nca_pair": Loss(nca_pair, "NCA", "NCA (arXiv 2402.05369)"),
    "bco_pair": Loss(bco_pair, "BCO", "BCO (arXiv 2404.04656)"),
    "sppo_hard": Loss(sppo_hard, "SPPO", "SPPO with hard labels (arXiv 2405.00675)"),
    "apo_zero": Loss(apo_zero, "APO-zero", "APO-zero (arXiv 2408.06266)"),
    "apo_down": Loss(apo_down, "APO-down", "APO-down (arXiv 2408.06266)"),
    "discopop": Loss(discopop, "DiscoPOP", "DiscoPOP (arXiv 2406.08414)", reads=("discopop_tau",)),
    "simpo": Loss(
        simpo,
        "SimPO",
        "SimPO (arXiv 2405.14734)",
        is_per_token=True,
        has_reference=False,
        reads=("label_smoothing", "simpo_gamma"),
    ),
    "cpo": Loss(
        cpo, "CPO", "CPO (arXiv 2401.08417)", has_reference=False, has_nll=True, reads=("label_smoothing", "cpo_alpha")
    ),
    "sft": Loss(
        sft,
        "SFT",
        "supervised fine-tuning by the masked-diffusion loss (arXiv 2502.09992)",
        has_reference=False,
        has_nll=True,
        tasks=("sft", "preferences"),
    ),
    "kto": Loss(kto, "KTO", "KTO (arXiv 2402.01306)", reads=("desirable_weight", "undesirable_weight"), tasks=("kto",)),
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
    if "kto" in names and len(names) > 1:
        raise ArgumentTypeError(f"{text}: kto trains on single responses, and cannot be part of a sum")
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


def readers(argument):
    """The names of the losses that read an argument; [] for one that all read, such as beta."""
    return [name for name, loss in LOSSES.items() if argument in loss.reads]
