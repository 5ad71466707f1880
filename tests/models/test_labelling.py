"""Classifier and tagger: rows of different lengths know nothing of padding and of each other."""

import math

import pytest
import torch

from seqkern.errors import UserError
from seqkern.models import EncoderConfig, SequenceClassifier, SequenceTagger
from seqkern.models.labelling import POOLINGS

B, T, F, V, K = 6, 9, 3, 7, 4
LENGTHS = torch.tensor([9, 1, 4, 7, 2, 9])
KINDS = ["lstm", "transformer"]
MODELS = [*POOLINGS, "tagger"]


def encoder(kind, reads="records", **sizes):
    inputs = {"features": F} if reads == "records" else {"vocab_size": V}
    return EncoderConfig(kind=kind, hidden=12, layers=2, heads=3, **inputs, **sizes)


def make(model, kind, reads="records", backend="seqkern", **sizes):
    torch.manual_seed(1)
    read = encoder(kind, reads, **sizes)
    if model == "tagger":
        return SequenceTagger(read, K, backend)
    return SequenceClassifier(read, K, model, backend)


def batch(reads):
    return torch.randn(B, T, F) if reads == "records" else torch.randint(V, (B, T))


def padded_with(x, lengths, value):
    padding = torch.arange(T) >= lengths[:, None]
    return x.masked_fill(padding if x.dim() == 2 else padding[..., None], value)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("reads", ["records", "tokens"])
@pytest.mark.parametrize("model", MODELS)
def test_result_is_the_same_bits_whatever_is_in_the_padding(model, kind, reads):
    made, x = make(model, kind, reads), batch(reads)
    values = (0.0, 1e30, math.nan, math.inf) if reads == "records" else (0, V - 1, -5, 10**9)
    results, gradients = [], []
    for value in values:
        out = made(padded_with(x, LENGTHS, value), LENGTHS)
        made.zero_grad()
        out.square().sum().backward()
        results.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    assert results[0].isfinite().all()
    assert gradients[0].isfinite().all()
    assert all(torch.equal(out, results[0]) for out in results)
    assert all(torch.equal(grad, gradients[0]) for grad in gradients)


@pytest.mark.parametrize("reads", ["records", "tokens"])
@pytest.mark.parametrize("model", MODELS)
def test_row_is_the_same_bits_whatever_the_other_rows_hold(model, kind, reads):
    made, x = make(model, kind, reads), batch(reads)
    with torch.no_grad():
        expected = made(x, LENGTHS)
        for row in range(B):
            others, lengths = batch(reads), torch.randint(1, T + 1, (B,))
            others[row], lengths[row] = x[row], LENGTHS[row]
            assert torch.equal(made(others, lengths)[row], expected[row])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 5), (3, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("hidden", [12, 64])
def test_row_of_a_tiny_batch_is_the_same_bits_whatever_lengths_the_others_have(kind, shape, hidden):
    B, T = shape
    torch.manual_seed(1)
    made = SequenceTagger(EncoderConfig(features=F, kind=kind, hidden=hidden), K)
    x = torch.randn(B, T, F)
    with torch.no_grad():
        for n in range(1, T + 1):
            found = []
            for others in range(1, T + 1):
                lengths = torch.full((B,), others)
                lengths[-1] = n
                found.append(made(x, lengths)[-1])
            assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.parametrize("model", MODELS)
def test_row_alone_and_without_padding_is_what_it_is_in_the_batch(model, kind):
    # Not bit for bit: with fewer rows PyTorch's matrix products take another kernel.
    made, x = make(model, kind).double(), batch("records").double()
    together = made(x, LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        alone = made(x[row : row + 1, :n])[0]
        expected = together[row, :n] if model == "tagger" else together[row]
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_rows_come_in_any_order(model, kind):
    made, x = make(model, kind).double(), batch("records").double()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        made(x[order], LENGTHS[order]), made(x, LENGTHS)[order], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("reads", ["records", "tokens"])
def test_backends_agree(model, kind, reads):
    ours, torchs = (make(model, kind, reads, backend) for backend in ("seqkern", "torch"))
    x = batch(reads)
    torch.testing.assert_close(ours(x, LENGTHS), torchs(x, LENGTHS), rtol=1e-4, atol=1e-5)


def test_last_state_is_where_each_direction_ended():
    made, x = make("last", "lstm"), batch("records")
    inner, H = made.encoder, 12
    embedded = inner.embedding(x)
    for row, n in enumerate(LENGTHS.tolist()):
        _, (h, _) = inner.lstm(embedded[row : row + 1, :n])
        expected = h[-2:].reshape(H)  # of the last layer, both directions
        torch.testing.assert_close(made.pooled(x, LENGTHS)[row], expected)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_is_over_the_rows_own_elements(pooling, kind):
    made, x = make(pooling, kind), batch("records")
    valid = torch.arange(T) < LENGTHS[:, None]
    states = made.encoder(x, LENGTHS, valid)
    for row, n in enumerate(LENGTHS.tolist()):
        own = states[row, :n]
        expected = own.mean(0) if pooling == "mean" else own.amax(0)
        torch.testing.assert_close(made.pooled(x, LENGTHS)[row], expected)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_one_direction_sees_nothing_of_what_comes_later(bidirectional):
    made, x = make("tagger", "lstm", bidirectional=bidirectional), batch("records")
    changed = x.clone()
    changed[:, 5] += 1
    same = torch.equal(made(x)[:, :5], made(changed)[:, :5])
    assert same is not bidirectional


def test_transformer_tells_places_apart():
    made = make("tagger", "transformer")
    x = torch.ones(1, 5, F)
    assert not torch.allclose(made(x)[0, 0], made(x)[0, 3])


def test_loss_is_the_mean_over_the_rows(kind):
    made, x, targets = make("last", kind), batch("records"), torch.randint(K, (B,))
    logits, loss = made(x, LENGTHS, targets)
    torch.testing.assert_close(logits, made(x, LENGTHS))
    expected = -logits.log_softmax(-1)[torch.arange(B), targets].mean()
    torch.testing.assert_close(loss, expected)


def test_loss_of_tags_leaves_out_padding_and_what_is_not_asked(kind):
    made, x = make("tagger", kind), batch("records")
    targets = torch.randint(K, (B, T))
    targets[0, 3] = -100
    asked = (torch.arange(T) < LENGTHS[:, None]) & (targets >= 0)
    logits, loss = made(x, LENGTHS, targets, return_logits=True)
    expected = -logits.log_softmax(-1)[asked].gather(1, targets[asked][:, None]).mean()
    torch.testing.assert_close(loss, expected)
    without, again = made(x, LENGTHS, padded_with(targets, LENGTHS, 99))
    assert without is None
    assert torch.equal(loss, again)


@pytest.mark.parametrize("model", MODELS)
def test_probabilities_sum_to_one_without_dropout(model, kind):
    made, x = make(model, kind, dropout=0.5), batch("records")
    p = made.probabilities(x, LENGTHS)
    assert torch.equal(p, made.probabilities(x, LENGTHS))
    assert made.training
    ones = torch.ones(B) if model != "tagger" else (torch.arange(T) < LENGTHS[:, None]).float()
    torch.testing.assert_close(p.sum(-1), ones)


@pytest.mark.parametrize("model", ["last", "tagger"])
def test_gradients_reach_every_parameter(model, kind):
    made, x = make(model, kind, dropout=0.1), batch("records")
    targets = torch.randint(K, (B, T) if model == "tagger" else (B,))
    made(x, LENGTHS, targets)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": LENGTHS - 1}, r"lengths must be in \[1, 9\], got 0"),
        ({"lengths": LENGTHS + 1}, r"lengths must be in \[1, 9\], got 10"),
        ({"lengths": LENGTHS[:2]}, r"lengths must be int64 or int32 \[6\], got torch.int64 \[2\]"),
        ({"lengths": LENGTHS.float()}, "lengths must be int64 or int32"),
        ({"x": torch.zeros(B, T, F + 1)}, r"records must be floating point \[B, T, 3\]"),
        ({"x": torch.zeros(B, T, F, dtype=torch.int64)}, "records must be floating point"),
        ({"x": torch.zeros(B)}, r"the batch must be \[B, T, \.\.\.\], got \[6\]"),
        ({"x": torch.zeros(B, 0, F)}, "at least one element"),
        ({"targets": torch.full((B,), K)}, r"targets must be in \[0, 4\), got 4"),
        ({"targets": torch.zeros(B, 2, dtype=torch.int64)}, r"targets must be int64 \[6\]"),
        ({"targets": torch.zeros(B)}, r"targets must be int64 \[6\], got torch.float32"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    good = {"x": batch("records"), "lengths": LENGTHS, "targets": torch.zeros(B, dtype=torch.int64)}
    with pytest.raises(UserError, match=message):
        make("last", "lstm")(**{**good, **change})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((B, T), V), r"tokens must be in \[0, 7\), got 7"),
        (torch.full((B, T), -1), r"tokens must be in \[0, 7\), got -1"),
        (torch.zeros(B, T), r"tokens must be int64 or int32 \[B, T\], got torch.float32"),
    ],
)
def test_wrong_tokens_are_named(tokens, message):
    with pytest.raises(UserError, match=message):
        make("tagger", "lstm", "tokens")(tokens)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(torch.full((B, T), K), r"targets must be in \[0, 4\), got 4"), (LENGTHS, r"int64 \[6, 9\]")],
)
def test_wrong_tags_are_named(targets, message):
    with pytest.raises(UserError, match=message):
        make("tagger", "lstm")(batch("records"), LENGTHS, targets)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "one of vocab_size and features must be at least 1"),
        ({"vocab_size": 3, "features": 3}, "got 3 and 3"),
        ({"features": 3, "kind": "gru"}, "kind must be one of lstm, transformer, got 'gru'"),
        ({"features": 3, "kind": "transformer", "hidden": 10}, "a multiple of heads = 4, got 10"),
        ({"features": 3, "hidden": 9}, "hidden must be even for two directions, got 9"),
        ({"features": 3, "layers": 0}, "layers must be at least 1"),
        ({"features": 3, "dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_sizes_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        EncoderConfig(**sizes)


def test_wrong_pooling_and_classes_are_named():
    with pytest.raises(UserError, match="pooling must be one of last, mean, max, got 'sum'"):
        SequenceClassifier(encoder("lstm"), K, "sum")
    with pytest.raises(UserError, match="classes must be at least 1, got 0"):
        SequenceClassifier(encoder("lstm"), 0)
