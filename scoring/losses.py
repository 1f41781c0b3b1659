"""The losses on a pair's margin. To add one: a function here, its name in LOSSES, and in config.py under loss_type.

margin: () float32, (S(w) - S_ref(w)) - (S(l) - S_ref(l)) of the chosen response w and the rejected one l. Each function
returns the loss of one pair, ().
"""

import torch
from torch.nn.functional import logsigmoid


def sigmoid(margin, beta, label_smoothing=0.0):
    """-log sigmoid(beta * margin): DPO, arXiv 2305.18290, equation 7.

    With label smoothing e, (1 - e) of it and e of its mirror image (conservative DPO).
    """
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def hinge(margin, beta, _=0.0):
    """max(0, 1 - beta * margin), as SLiC (arXiv 2305.10425) and RSO (2309.06657) use it on the same margin."""
    return torch.relu(1 - beta * margin)


def ipo(margin, beta, _=0.0):
    """(margin - 1 / (2 beta))^2, arXiv 2310.12036, equation 17. Its margin is of scores per token, as in TRL."""
    return (margin - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}  # by --loss_type
