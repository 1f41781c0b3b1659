"""The losses on a pair's margin. Add another loss here."""

import torch
from torch.nn.functional import logsigmoid


def preference_loss(margin, beta, loss_type="sigmoid", label_smoothing=0.0):
    """The loss of one pair; margin: () float32, (S(w) - S_ref(w)) - (S(l) - S_ref(l)).

    sigmoid: -log sigmoid(beta * margin), arXiv 2305.18290 equation 7; with label smoothing e, (1 - e) of it and e of its
        mirror (conservative DPO).
    hinge: max(0, 1 - beta * margin), as SLiC (arXiv 2305.10425) and RSO (2309.06657) use it on the same margin.
    ipo: (margin - 1 / (2 beta))^2, arXiv 2310.12036 equation 17; `margin` is then of scores per token, as in TRL.
    """
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)
