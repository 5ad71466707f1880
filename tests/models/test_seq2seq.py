"""Encoder and decoder, and the decoder alone: training, generation and beam search."""

import itertools
import math

import pytest
import torch

from seqkern.errors import UserError
from seqkern.models import ConditionalLanguageModel, DecoderConfig, EncoderConfig, Seq2Seq

B, S, V = 5, 6, 4
LENGTHS = torch.tensor([6, 1, 3, 5, 2])
KINDS = ["lstm", "transformer"]
MODELS = ["lstm", "transformer", "mixed", "condition-lstm", "condition-transformer"]


def make(model, backend="seqkern", **sizes):
    """A model whose sequences end after a few tokens, and differ."""
    torch.manual_seed(2)
    if model.startswith("condition"):
        config = DecoderConfig(V, model.removeprefix("condition-"), 12, 2, 3, **sizes)
        made = ConditionalLanguageModel(config, 5, backend)
    else:
        reads, writes = ("transformer", "lstm") if model == "mixed" else (model, model)
        made = Seq2Seq(
            EncoderConfig(vocab_size=9, kind=reads, hidden=6, layers=2, heads=2, **sizes),
            DecoderConfig(V, writes, 12, 2, 3, **sizes),
            backend,
        )
    with torch.no_grad():
        made.head.weight.mul_(2)
        made.decoder.start.weight.mul_(4)
        made.head.bias[V] += 0.5
    return made


def sources(model, rows=B):
    if model.startswith("condition"):
        return {"source": torch.randn(rows, 5)}
    lengths = LENGTHS if rows == B else torch.randint(1, S + 1, (rows,))
    return {"source": torch.randint(9, (rows, S)), "source_lengths": lengths}


def row_of(given, row):
    return {name: value[row : row + 1] for name, value in given.items()}


def every(n):
    """All sequences of n tokens, int64 [V^n, n]."""
    return torch.tensor(list(itertools.product(range(V), repeat=n)), dtype=torch.int64)


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


def test_loss_is_the_mean_over_tokens_and_stops(model):
    made, given = make(model), sources(model)
    targets, lengths = torch.randint(V, (B, 3)), torch.tensor([3, 0, 1, 2, 3])
    logits, loss = made(**given, targets=targets, target_lengths=lengths, return_logits=True)
    log_p = logits.log_softmax(-1)  # [B, 4, V + 1]
    per_row = []
    for row, n in enumerate(lengths.tolist()):
        wanted = [*targets[row, :n].tolist(), V]
        per_row.append(sum(log_p[row, t, token] for t, token in enumerate(wanted)))
    torch.testing.assert_close(loss, -sum(per_row) / (int(lengths.sum()) + B))
    log_prob = made.log_prob(**given, targets=targets, target_lengths=lengths)
    torch.testing.assert_close(log_prob, torch.stack(per_row))
    none, again = made(**given, targets=targets.masked_fill(targets < 0, 0), target_lengths=lengths)
    assert none is None
    torch.testing.assert_close(again, loss)


def test_probabilities_of_all_sequences_sum_to_one(model):
    made, given = make(model).double(), sources(model, 1)
    given["source"] = given["source"].double() if "condition" in model else given["source"]
    total = 0.0
    for n in range(4):
        targets = every(n)
        repeated = {name: v.repeat_interleave(len(targets), 0) for name, v in given.items()}
        total += float(made.log_prob(**repeated, targets=targets).exp().sum().detach())
        if n == 3:  # what is left goes on after three tokens
            logits, _ = made(**repeated, targets=targets, return_logits=True)
            log_p = logits.log_softmax(-1)
            before = log_p[:, :3].gather(2, targets[..., None]).sum((1, 2))
            total += float((before.exp() * (1 - log_p[:, 3, V].exp())).sum().detach())
    assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_written_step_by_step_is_what_training_computes_at_once(model, backend, temperature):
    made, given = make(model, backend), sources(model)
    written = made.generate(**given, max_tokens=20, temperature=temperature, seed=4)
    past = torch.arange(written.tokens.shape[1]) >= written.lengths[:, None]
    assert bool((written.tokens[past] == made.stop_token).all())
    assert bool((written.tokens[~past] < V).all())
    if temperature:
        assert len(written.lengths.unique()) >= 2
    logits, _ = made(
        **given, targets=written.tokens, target_lengths=written.lengths, return_logits=True
    )
    log_p = logits.detach().log_softmax(-1)
    for row, n in enumerate(written.lengths.tolist()):
        tokens = [*written.tokens[row, :n].tolist(), *([made.stop_token] if n < 20 else [])]
        expected = sum(log_p[row, t, token] for t, token in enumerate(tokens))
        torch.testing.assert_close(written.log_prob[row], expected, rtol=1e-4, atol=1e-4)
        if temperature == 0:
            assert log_p[row, : len(tokens)].argmax(-1).tolist() == tokens


def test_same_seed_same_tokens_and_a_row_draws_alone_what_it_draws_in_the_batch(model):
    made, given = make(model), sources(model)
    written = made.generate(**given, max_tokens=12, seed=7)
    assert torch.equal(written.tokens, made.generate(**given, max_tokens=12, seed=7).tokens)
    assert not torch.equal(
        written.tokens[:, :1], made.generate(**given, max_tokens=12, seed=1007).tokens[:, :1]
    )
    for row in range(B):
        alone = made.generate(**row_of(given, row), max_tokens=12, seed=7 + row)
        n = int(written.lengths[row])
        assert int(alone.lengths) == n
        assert alone.tokens[0].tolist() == written.tokens[row, :n].tolist()


WRITERS = {
    "log_prob": lambda made, given: (
        made.log_prob(**given, targets=torch.arange(B * 3).view(B, 3) % V).detach(),
    ),
    "greedy": lambda made, given: made.generate(**given, max_tokens=9, temperature=0),
    "sampling": lambda made, given: made.generate(**given, max_tokens=9, seed=3),
    "beams": lambda made, given: made.beam_search(**given, max_tokens=9, beams=3),
}


def rows_equal(first, second, row):
    """Whether a row of two results is the same bits, as wide as the narrower result."""
    width = min(t.shape[1] for t in (first[0], second[0])) if first[0].dim() == 2 else None
    return all(torch.equal(a[row, ...][:width] if a.dim() == 2 else a[row],
                           b[row, ...][:width] if b.dim() == 2 else b[row])
               for a, b in zip(first, second, strict=True))  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_row_is_the_same_bits_whatever_padding_and_other_rows_hold(model, write):
    made, given = make(model), sources(model)
    expected = WRITERS[write](made, given)
    if "source_lengths" in given:
        padding = torch.arange(S) >= LENGTHS[:, None]
        other = {**given, "source": given["source"].masked_fill(padding, 10**6)}
        assert all(
            torch.equal(a, b) for a, b in zip(WRITERS[write](made, other), expected, strict=True)
        )
    for row in range(B):
        other = {name: value.clone() for name, value in sources(model).items()}
        for name, value in given.items():
            other[name][row] = value[row]
        if "source_lengths" in other:
            other["source_lengths"] = torch.randint(1, S + 1, (B,))
            other["source_lengths"][row] = LENGTHS[row]
        assert rows_equal(WRITERS[write](made, other), expected, row)


def test_log_prob_of_a_row_is_the_same_bits_whatever_targets_the_others_have(model):
    made, given = make(model), sources(model)
    targets = torch.randint(V, (B, 6))
    with torch.no_grad():
        for row, n in enumerate((6, 0, 3, 1, 5)):
            found = []
            for others in (0, 1, 4, 6):
                lengths = torch.full((B,), others)
                lengths[row] = n
                changed = torch.randint(V, (B, 6))
                changed[row, :n] = targets[row, :n]
                log_prob = made.log_prob(**given, targets=changed, target_lengths=lengths)
                found.append(log_prob[row])
            assert all(torch.equal(out, found[0]) for out in found)


def every_sequence(made, given, max_tokens, alpha):
    """The best of all sequences of at most `max_tokens` tokens, its stop token among them."""
    best = (-math.inf, None)
    for n in range(max_tokens):
        targets = every(n)
        repeated = {name: v.repeat_interleave(len(targets), 0) for name, v in given.items()}
        scores = made.log_prob(**repeated, targets=targets).detach() / (n + 1) ** alpha
        best = max(best, (float(scores.max()), targets[int(scores.argmax())].tolist()))
    return best


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_beams_enough_for_all_sequences_find_the_best(model, alpha):
    made, given = make(model), sources(model)
    found = made.beam_search(**given, max_tokens=4, beams=V**3, length_penalty=alpha)
    for row in range(B):
        score, tokens = every_sequence(made, row_of(given, row), 4, alpha)
        n = int(found.lengths[row])
        assert found.tokens[row, :n].tolist() == tokens
        assert float(found.log_prob[row]) / (n + 1) ** alpha == pytest.approx(score, abs=1e-4)


def test_a_larger_length_penalty_favours_longer_sequences(model):
    made, given = make(model), sources(model)
    short, long = (
        made.beam_search(**given, max_tokens=8, length_penalty=alpha).lengths.sum()
        for alpha in (0.0, 2.0)
    )
    assert short < long


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_few_beams_give_a_sequence_with_its_probability(model, beams):
    made, given = make(model), sources(model)
    found = made.beam_search(**given, max_tokens=20, beams=beams)
    again = made.log_prob(**given, targets=found.tokens, target_lengths=found.lengths)
    torch.testing.assert_close(found.log_prob, again.detach(), rtol=1e-4, atol=1e-4)
    for row in range(B):
        alone = made.beam_search(**row_of(given, row), max_tokens=20, beams=beams)
        n = int(alone.lengths)
        assert alone.tokens[0].tolist() == found.tokens[row, :n].tolist()
        assert n == int(found.lengths[row])


def test_backends_agree(model):
    ours, torchs, given = make(model), make(model, "torch"), sources(model)
    targets = torch.randint(V, (B, 5))
    torch.testing.assert_close(
        ours.log_prob(**given, targets=targets),
        torchs.log_prob(**given, targets=targets),
        rtol=1e-4,
        atol=1e-4,
    )
    found = [m.beam_search(**given, max_tokens=9) for m in (ours, torchs)]
    assert torch.equal(found[0].tokens, found[1].tokens)


def test_gradients_reach_every_parameter(model):
    made, given = make(model, dropout=0.1), sources(model)
    made(**given, targets=torch.randint(V, (B, 3)))[1].backward()
    # A key's bias moves all scores of a query alike: softmax does not see it.
    missing = [
        name
        for name, p in made.named_parameters()
        if p.grad is None or float(p.grad.abs().sum()) == 0
    ]
    assert missing == []


def test_generation_leaves_the_mode_and_dropout_alone(model):
    made, given = make(model, dropout=0.5), sources(model)
    first = made.beam_search(**given, max_tokens=5)
    assert torch.equal(first.log_prob, made.beam_search(**given, max_tokens=5).log_prob)
    assert made.training


def test_diverged_model_is_the_users_error(model):
    made, given = make(model), sources(model)
    with torch.no_grad():
        made.head.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        made.beam_search(**given, max_tokens=3)
    with pytest.raises(UserError, match="sample: logits"):
        made.generate(**given, max_tokens=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((B, 2), V)}, r"targets must be in \[0, 4\), got 4"),
        ({"targets": torch.zeros(B, 2)}, "targets must be int64 or int32"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, "targets must have 5 rows .* got 2"),
        ({"target_lengths": torch.full((B,), 3)}, r"target_lengths must be in \[0, 2\], got 3"),
        ({"source_lengths": LENGTHS - 1}, r"source_lengths must be in \[1, 6\], got 0"),
        ({"source": torch.full((B, S), 9)}, r"tokens must be in \[0, 9\), got 9"),
    ],
    ids=str,
)
def test_wrong_training_data_is_named(change, message):
    good = {"targets": torch.zeros(B, 2, dtype=torch.int64), **sources("lstm")}
    with pytest.raises(UserError, match=message):
        make("lstm")(**{**good, **change})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": torch.zeros(2, 4)}, r"source must be floating point \[B, 5\]"),
        ({"source": torch.zeros(2, 5, dtype=torch.int64)}, "source must be floating point"),
        (
            {"source": torch.zeros(2, 5), "source_lengths": torch.ones(2)},
            "source_lengths must be None",
        ),
    ],
)
def test_wrong_condition_is_named(given, message):
    with pytest.raises(UserError, match=message):
        make("condition-lstm").generate(**given, max_tokens=3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("generate", {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ("generate", {"max_tokens": 3, "top_p": 0.0}, "top_p"),
        ("beam_search", {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ("beam_search", {"max_tokens": 3, "beams": 0}, "beams must be at least 1, got 0"),
        ("beam_search", {"max_tokens": 3, "length_penalty": -1.0}, "length_penalty"),
        ("beam_search", {"max_tokens": 3, "length_penalty": math.nan}, "length_penalty"),
    ],
)
def test_wrong_options_are_named(method, options, message):
    with pytest.raises(UserError, match=message):
        getattr(make("lstm"), method)(**sources("lstm"), **options)
