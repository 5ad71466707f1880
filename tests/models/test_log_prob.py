"""Probabilities of whole sequences, against the chain rule written out."""

import math

import pytest
import torch

from seqkern.errors import UserError
from seqkern.models import MODELS, build_model

V, CONTEXT = 13, 8
SIZES = {"vocab_size": V, "context": CONTEXT, "hidden": 12, "layers": 2, "heads": 3}


def make(name, backend="seqkern", **sizes):
    torch.manual_seed(0)
    return build_model(name, SIZES | sizes, backend)


def tokens(batch, length, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def chain_rule(model, sequence):
    """The sum of the next-token log-probabilities of one sequence, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(1, len(sequence)):
        total += model.probabilities(sequence[None, :i])[0, -1, sequence[i]].log()
    return total


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_log_prob_is_the_chain_rule(name, backend):
    model = make(name, backend).double()
    x = tokens(4, CONTEXT + 1)
    lengths = torch.tensor([9, 1, 2, 6])
    expected = [chain_rule(model, row[:n]) for row, n in zip(x, lengths, strict=True)]
    actual = model.log_prob(x, lengths)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=0)
    assert actual[1] == 0


def test_without_lengths_every_token_counts(name):
    model, x = make(name), tokens(3, 6)
    assert torch.equal(model.log_prob(x), model.log_prob(x, torch.full((3,), 6)))
    assert torch.equal(model.log_prob(x[:, :1]), torch.zeros(3))


def test_the_probabilities_of_all_continuations_add_up_to_one(name):
    """Sum over x_2, x_3 of p(x_2, x_3 | x_1) = 1: nothing is lost or counted twice."""
    model = make(name).double()
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V * V, 2]
    x = torch.cat([torch.full((V * V, 1), 5), pairs], dim=1)
    total = model.log_prob(x).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_a_row_depends_on_neither_padding_nor_neighbours(name):
    """Bit for bit: other padding, other rows of other lengths in the same places."""
    model, x = make(name), tokens(5, CONTEXT + 1)
    lengths = torch.tensor([4, 9, 2, 7, 3])
    expected = model.log_prob(x, lengths)
    y, other = tokens(5, CONTEXT + 1, seed=7), torch.tensor([4, 2, 9, 1, 6])
    y[0, :4] = x[0, :4]
    y[0, 4:] = -100
    assert model.log_prob(y, other)[0] == expected[0]


def test_log_prob_ignores_dropout_and_leaves_training_on(name):
    model, x = make(name, dropout=0.5).train(), tokens(2, 7)
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    assert model.training


def test_log_prob_makes_no_logits_and_has_gradients(name, monkeypatch):
    model, x = make(name), tokens(3, 6)
    monkeypatch.setattr(model.loss, "forward", lambda *_: pytest.fail("loss of logits"))
    model.log_prob(x).sum().backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    picked = model.probabilities(x[:, :-1]).gather(2, x[:, 1:, None])
    picked.log().sum().backward()
    theirs = {key: p.grad for key, p in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_perplexity_is_per_predicted_token(name):
    model, x = make(name).double(), tokens(3, 6)
    lengths = torch.tensor([6, 1, 3])
    expected = math.exp(-model.log_prob(x, lengths).sum().item() / (5 + 0 + 2))
    assert model.perplexity(x, lengths).item() == pytest.approx(expected, rel=1e-12)
    _, loss = model(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(model.perplexity(x), loss.exp())


@pytest.mark.parametrize(
    ("x", "lengths", "named"),
    [
        (tokens(2, 3).float(), None, r"sequences must be int64 or int32 \[B, T\], got torch.float"),
        (tokens(2, 3)[0], None, r"sequences must be .* \[3\]"),
        (tokens(2, 3) + V, None, rf"tokens must be in \[0, {V}\)"),
        (tokens(2, 3), torch.tensor([1, 4]), r"lengths must be in \[1, 3\], got 4"),
        (tokens(2, 3), torch.tensor([0, 3]), r"lengths must be in \[1, 3\], got 0"),
        (tokens(2, 3), torch.tensor([1, 2, 3]), r"lengths must be .* \[2\], got .* \[3\]"),
        (tokens(2, 3), torch.tensor([1.0, 2.0]), "lengths must be int64 or int32"),
    ],
)
def test_wrong_arguments_are_refused(name, x, lengths, named):
    with pytest.raises(UserError, match=named):
        make(name).log_prob(x, lengths)


def test_perplexity_of_nothing_is_refused(name):
    with pytest.raises(UserError, match="a token that follows another"):
        make(name).perplexity(tokens(2, 5), torch.tensor([1, 1]))


def test_gpt_refuses_sequences_past_its_context_and_one():
    with pytest.raises(UserError, match="at most the context of 8 long, got 9"):
        make("gpt").log_prob(tokens(2, CONTEXT + 2))
