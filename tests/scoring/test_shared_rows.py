"""Tests of the shared row of block-causal models: its scores are those of each block computed alone, without sharing.

bash tests/run.sh tests/scoring/test_shared_rows.py
"""

import functools

import numpy as np
import pytest
import torch

import score
from models import architecture
from models.families import Blocks, Masking
from scoring import noise, recipe, states
from scoring.window import Piece
from training import engine

MASK, WORDS = 63, 64
ALONE = engine.Ranks(0, 1, torch.device("cpu"))
KINDS = {
    "as SDAR": {},
    "as Nemotron": {"is_causal": True, "first_from_clean": True},
    "as Fast-dLLM v2": {"shift": True, "first_from_clean": True},
}


@functools.cache
def model():
    """A tiny random SDAR: bidirectional unless its rows or its mask say more. It does not shift its logits."""
    config = architecture.SDARConfig(
        block_size=4,
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return architecture.build(config, torch.float32, shift=False)


def text(P, n, seed=0):
    """Prompt (P,) and response (n,) ids."""
    ids = np.random.default_rng([P, n, seed]).integers(0, MASK, P + n)
    return ids[:P], ids[P:]


def drawn(P, n, blocks, S, seed=0):
    """(masked, weight), (S, n) each, of a response."""
    divided, rng = recipe.partition(P, n, blocks), noise.generator(seed, [P, n], "pair")
    masked = noise.state_masks(n, "elbo_stratified", S, 1, rng, **divided)
    return masked, noise.state_weights(masked, "elbo_stratified", S, 1, **divided)


def logps(inputs, blocks):
    """log p (L, V) of a sequence whose clean blocks stand before its last one, in a pass of its own.

    Each token sees the blocks up to its own. Of a causal model the clean tokens see the tokens up to themselves.
    """
    place = torch.arange(len(inputs))
    block = place // blocks.size
    sees = block[:, None] >= block
    if blocks.is_causal:
        is_clean = block < block[-1]
        sees = torch.where(is_clean[:, None], place[:, None] >= place, sees)
    ids = torch.tensor(np.asarray(inputs, np.int64))[None]
    return model()(input_ids=ids, attention_mask=sees[None, None]).logits[0].log_softmax(-1)


def by_blocks(prompt, response, masked, weight, blocks):
    """The score of each state, (S,), by a pass for each block and state. Nothing is shared or cached."""
    ids, scores = np.concatenate((prompt, response)), []
    for hidden, weights in zip(masked, weight):
        row = np.where(np.concatenate((np.zeros(len(prompt), bool), hidden)), MASK, ids)
        total = 0.0
        for place in np.flatnonzero(weights) + len(prompt):
            start = place // blocks.size * blocks.size
            if blocks.first_from_clean and place == start:
                # The last clean token before the block predicts it. What follows the clean text does not matter.
                logp = logps(np.append(ids[:start], MASK), blocks)[start - 1]
            else:
                block = np.concatenate((ids[:start], row[start : start + blocks.size]))
                logp = logps(block, blocks)[place - blocks.shift]
            total = total + float(weights[place - len(prompt)]) * logp[ids[place]]
        scores.append(total)
    return torch.stack(scores)


def gradient(total):
    return torch.autograd.grad(total, list(model().parameters()))


def close(got, want, loose=1e-5):
    got, want = got.detach(), want.detach()
    assert float((got - want).abs().max()) < loose * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P, n, size", [(5, 9, 4), (8, 1, 4), (7, 1, 4), (3, 6, 1), (2, 40, 32), (33, 7, 32)])
def test_equals_each_block_alone(kind, P, n, size):
    """Score and gradient, whatever the prompt's remainder, at a response of one token, with blocks of 1, 4 and 32."""
    blocks = Blocks(size, **KINDS[kind])
    (prompt, response), (masked, weight) = text(P, n), drawn(P, n, blocks, 3)
    got = score.diffusion_score(model(), prompt, response, masked, weight, Masking(MASK, blocks))
    want = by_blocks(prompt, response, masked, weight, blocks)
    close(got, want)
    for mine, theirs in zip(gradient(got.sum()), gradient(want.sum()), strict=True):
        close(mine, theirs)


def test_blocks_of_one_token_are_the_left_to_right_likelihood():
    """With blocks of one token the score is the sum of log p(token | tokens before it), computed token by token."""
    blocks, (prompt, response) = Blocks(1), text(4, 6)
    masked, weight = drawn(4, 6, blocks, 1)
    ids, want = np.concatenate((prompt, response)), 0.0
    for place in range(4, 10):
        want += logps(np.append(ids[:place], MASK), blocks)[place, ids[place]].item()
    [got] = score.diffusion_score(model(), prompt, response, masked, weight, Masking(MASK, blocks)).tolist()
    assert masked.all() and got == pytest.approx(want, rel=1e-6)


def test_a_block_of_the_whole_row_is_the_bidirectional_model():
    masked, weight = drawn(5, 9, None, 4)
    alone, whole = (
        score.diffusion_score(model(), *text(5, 9), masked, weight, Masking(MASK, blocks))
        for blocks in (None, Blocks(14))
    )
    close(whole, alone, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_divided_and_may_have_neighbours(kind):
    """Scores do not depend on the tokens of a pass, nor on other responses in it."""
    blocks = Blocks(4, **KINDS[kind])
    lengths = [(5, 9), (8, 1), (3, 12), (6, 5)]
    found = [states.response_states(*text(P, n), *drawn(P, n, blocks, 5), MASK, blocks) for P, n in lengths]
    alone = [score.state_scores(model(), [each], 10**4, ALONE)[0] for each in found]
    for tokens in (1, 25, 60, 10**4):
        for got, want in zip(score.state_scores(model(), found, tokens, ALONE), alone, strict=True):
            close(got, want)


@pytest.mark.parametrize("tokens", [1, 60, 10**4])
def test_divided_gradient(tokens):
    """A pair's gradient is that of one graph, whether its row is divided or not."""
    blocks = Blocks(4)
    sides = [states.response_states(*text(5, n), *drawn(5, n, blocks, 4), MASK, blocks) for n in (9, 11)]

    def loss_of(scores):
        return -torch.nn.functional.logsigmoid(0.1 * (scores[0] - scores[1]) + 0.3)

    sums = [each.sum() for each in score.state_scores(model(), sides, 10**4, ALONE)]
    want = gradient(loss_of(sums))
    model().zero_grad()
    passes = []

    def backward(loss, _):
        passes.append(1)
        loss.backward()

    [(loss, _)] = score.score_and_backward(model(), [Piece(sides, loss_of)], tokens, ALONE, backward)
    assert float(loss) == pytest.approx(float(loss_of(sums)), rel=1e-6)
    assert len(passes) == {1: 8, 60: 2, 10**4: 1}[tokens]
    for parameter, expected in zip(model().parameters(), want, strict=True):
        close(parameter.grad, expected)


def test_tokens_of_a_row():
    """P + n tokens up to the last block, and each copy the response's blocks with what they hold of the prompt."""
    blocks = Blocks(4)
    for P, n in ((5, 9), (8, 1), (3, 12), (1, 2)):
        made = states.response_states(*text(P, n), *drawn(P, n, blocks, 4), MASK, blocks)
        assert made.tokens == states.tokens_of(P, n, 4, blocks)
        [row] = made.rows(10**4)
        assert len(states.join([(made, row)]).inputs) == made.length(row) == made.tokens
        assert sum(made.length(row) for row in made.rows(1)) == sum(
            states.tokens_of(P, n, 1, blocks) for _ in made.live
        )
    assert states.tokens_of(5, 9, 4, blocks) == 12 + 4 * 10 and states.tokens_of(5, 9, 4, None) == 4 * 14
