import math

import pytest
import torch

from seqkern import ops
from seqkern.errors import UserError
from seqkern.generation import Sampling, generate, window_start
from seqkern.models import MODELS, build_model
from seqkern.ops.attention_step import MAX_STEP_TOKENS
from seqkern.reference import token_distribution

V, CONTEXT = 11, 6
SIZES = {"vocab_size": V, "context": CONTEXT, "hidden": 12, "layers": 1, "heads": 2}


def make(name, backend="seqkern", seed=0, **sizes):
    torch.manual_seed(seed)
    made = build_model(name, SIZES | sizes, backend)
    with torch.no_grad():  # spread the logits, so that greedy chains are not constant
        made.embedding.weight.mul_(20)
    return made


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return make(name)


def prompt(batch, length):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(5))


class FixedLogits:
    """The same logits for every row and step."""

    context = None
    keeps_state = is_capturable = True

    def __init__(self, logits):
        self.logits = torch.tensor(logits)
        self.vocab_size = len(logits)

    def next_logits(self, tokens, state=None, lengths=None, *, capacity=None):
        return self.logits.expand(tokens.shape[0], -1), None


def sequential(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition in plain Python, one token at a time."""
    top = max(logits)
    weights = [math.exp((z - top) / temperature) for z in logits]
    p = {v: w / sum(weights) for v, w in enumerate(weights)}
    ranked = sorted(p, key=lambda v: (-p[v], v))

    def keep(tokens):
        total = sum(p[v] for v in tokens)
        return {v: p[v] / total for v in tokens}

    if top_k:
        ranked = ranked[:top_k]
        p = keep(ranked)
    kept, before = [], 0.0
    for v in ranked:
        if top_p < 1 and kept and before >= top_p:
            break
        kept.append(v)
        before += p[v]
    p = keep(kept)
    p = keep([v for v in kept if p[v] >= min_p * max(p.values())])
    return [p.get(v, 0.0) for v in range(len(logits))]


LOGITS = [0.5, 2.0, -1.0, 2.0, 1.0, -3.0]
OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 5, "top_p": 0.85, "min_p": 0.15},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distribution_is_the_sequential_definition(options, dtype):
    logits = torch.tensor([LOGITS, LOGITS[::-1]], dtype=dtype)
    p = token_distribution(logits, **options)
    expected = [sequential(LOGITS, **options), sequential(LOGITS[::-1], **options)]
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=["plain", "all-options"])
def test_tokens_are_drawn_with_those_probabilities(options):
    rows = 20_000
    out = generate(
        FixedLogits(LOGITS), torch.zeros(rows, 1, dtype=torch.int64), 1, Sampling(**options), seed=7
    )
    counts = torch.bincount(out[:, 1], minlength=len(LOGITS)).double()
    expected = rows * torch.tensor(sequential(LOGITS, **options), dtype=torch.float64)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert float(chi_squared) < 25.7  # 99.99 % point for 5 degrees of freedom


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"temperature": 0}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.25}, {1}),
        ({"top_p": 0.5}, {1, 2}),
        ({"min_p": 1.0}, {1, 2, 3, 4}),
    ],
)
def test_equal_logits_rank_by_lower_id(options, tokens):
    p = token_distribution(torch.tensor([[-math.inf, 1, 1, 1, 1]]), **options)
    assert set(p[0].nonzero().flatten().tolist()) == tokens


def test_banned_tokens_have_no_probability():
    p = token_distribution(torch.tensor([[0.0, -math.inf, 0.0]]))
    assert p.tolist() == [[0.5, 0.0, 0.5]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    p = token_distribution(torch.tensor([[100.0, -200.0, 99.0]]), temperature=temperature)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("bad", [[0.0, math.nan], [-math.inf, -math.inf]])
def test_logits_without_a_distribution_are_refused(bad):
    with pytest.raises(UserError, match="logits must have a finite maximum"):
        generate(FixedLogits(bad), torch.zeros(1, 1, dtype=torch.int64), 1, Sampling())


def window(row, context):
    """The tokens read before the next: grown one by one, the older half dropped when full."""
    held = []
    for token in row.tolist():
        if context is not None and len(held) == context:
            held = held[len(held) - context // 2 :]
        held.append(token)
    return torch.tensor([held])


def greedy_chain(model, row, new):
    """Row [T] continued by whole forwards of one row."""
    model = model.eval()
    for _ in range(new):
        best = model(window(row, model.context))[0, -1].argmax(-1, keepdim=True)
        row = torch.cat((row, best))
    return row


@pytest.mark.parametrize("context", [1, 2, 5, 6])
def test_the_window_is_a_function_of_the_length(context):
    for n in range(1, 40):
        row = torch.arange(n)
        assert window(row, context)[0].tolist() == row[window_start(n, context) :].tolist()


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
@pytest.mark.parametrize("length", [1, 3, CONTEXT])
def test_greedy_is_the_chain_of_argmaxes(name, backend, length):
    model = make(name, backend)
    tokens = prompt(3, length)
    out = model.generate(tokens, 3 * CONTEXT, temperature=0)
    expected = torch.stack([greedy_chain(model, row, 3 * CONTEXT) for row in tokens])
    assert torch.equal(out, expected)
    assert len(out[:, length:].unique()) > 1


@pytest.mark.parametrize("context", [1, 2, 5])
def test_any_context_slides(context):
    model = make("gpt", context=context)
    tokens = prompt(2, 1)
    out = model.generate(tokens, 12, temperature=0)
    assert torch.equal(out, torch.stack([greedy_chain(model, row, 12) for row in tokens]))


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_prompts_of_different_lengths_share_a_batch(name, backend):
    """Each equals its own run, though they pass the context at different steps."""
    model = make(name, backend)
    tokens, lengths = prompt(4, 5), torch.tensor([5, 1, 3, 5])
    out = model.generate(tokens, 2 * CONTEXT, lengths=lengths, seed=3)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(tokens[b : b + 1, :n], 2 * CONTEXT, seed=3 + b)[0]
        assert torch.equal(out[b, : len(alone)], alone)
        assert out[b, len(alone) :].unique().tolist() in ([], [alone[-1].item()])
    assert out.shape == (4, 5 + 2 * CONTEXT)


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        (torch.tensor([1, 2, 3]), r"lengths must be int64 or int32 \[2\], got torch.int64 \[3\]"),
        (torch.tensor([1.0, 2.0]), "lengths must be int64 or int32"),
        (torch.tensor([0, 2]), r"lengths must be in \[1, 3\], got 0"),
        (torch.tensor([1, 4]), r"lengths must be in \[1, 3\], got 4"),
    ],
)
def test_wrong_lengths_are_refused(model, lengths, named):
    with pytest.raises(UserError, match=named):
        model.generate(prompt(2, 3), 1, lengths=lengths)


def test_each_row_may_have_its_own_seed_and_options(model):
    tokens = prompt(3, 3)
    seeds, temperature = torch.tensor([9, 4, 4]), torch.tensor([1.0, 0.0, 2.0])
    top_k = torch.tensor([0, 0, 3])
    out = model.generate(tokens, 12, seed=seeds, temperature=temperature, top_k=top_k)
    for b in range(3):
        alone = model.generate(
            tokens[b : b + 1],
            12,
            seed=int(seeds[b]),
            temperature=float(temperature[b]),
            top_k=int(top_k[b]),
        )
        assert torch.equal(out[b], alone[0])


def test_log_probabilities_are_those_of_a_forward(name):
    model = make(name).double()
    tokens, lengths = prompt(3, 4), torch.tensor([4, 2, 3])
    new = CONTEXT - 4
    out, logprobs = model.generate(
        tokens, new, lengths=lengths, seed=1, top_k=3, temperature=0.7, return_logprobs=True
    )
    for b, n in enumerate(lengths.tolist()):
        row = out[b : b + 1, : n + new]
        expected = model(row[:, :-1]).log_softmax(-1)[0].gather(1, row[0, 1:, None])
        torch.testing.assert_close(logprobs[b], expected[n - 1 :, 0].float())


@pytest.mark.parametrize(
    "penalties",
    [{"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.5}],
    ids=str,
)
def test_penalties_count_prompt_and_new_tokens(model, penalties):
    tokens, lengths = prompt(3, 4), torch.tensor([4, 2, 3])
    out = model.generate(tokens, 15, lengths=lengths, seed=1, **penalties)
    plain = model.generate(tokens, 15, lengths=lengths, seed=1)
    for b, n in enumerate(lengths.tolist()):
        row = tokens[b, :n]
        for step in range(15):
            logits = model.eval()(window(row, model.context))[:, -1].detach()
            counts = torch.bincount(row, minlength=V)[None]
            drawn, _ = ops.sample(logits, token_counts=counts, seed=1 + b, step=step, **penalties)
            row = torch.cat((row, drawn))
        assert torch.equal(out[b, : n + 15], row)
    assert not torch.equal(out, plain)


def test_same_seed_same_tokens(model):
    tokens = prompt(2, 4)
    first, again, other = (model.generate(tokens, 20, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(model.generate(tokens, 20), model.generate(tokens, 20))


def test_generation_leaves_the_mode_and_the_global_generator_alone(model):
    model.train()
    before = torch.get_rng_state()
    out = model.generate(prompt(2, 3), 5, seed=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert out.dtype == torch.int64
    assert not out.requires_grad


def test_no_new_tokens_give_the_prompt(model):
    assert torch.equal(model.generate(prompt(2, 3), 0), prompt(2, 3))


def test_on_token_sees_every_new_token(model):
    seen = []
    out = model.generate(prompt(2, 3), 5, seed=1, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 3:])


@pytest.mark.parametrize("with_callback", [False, True])
def test_rows_stop_by_themselves(model, with_callback):
    """Rows that stop leave the batch, and those that go on notice nothing."""
    tokens, lengths, new = prompt(6, 3), torch.tensor([3, 1, 2, 3, 3, 2]), 30
    free = model.generate(tokens, new, lengths=lengths, seed=2)
    stop = int(free[0, 5])
    seen = []
    out, logprobs = model.generate(
        tokens,
        new,
        lengths=lengths,
        seed=2,
        stop_tokens=[stop],
        on_token=seen.append if with_callback else None,
        return_logprobs=True,
    )
    ends = []
    for b, n in enumerate(lengths.tolist()):
        drawn = free[b, n : n + new].tolist()
        end = drawn.index(stop) + 1 if stop in drawn else new
        assert out[b, : n + end].tolist() == free[b, : n + end].tolist()
        assert set(out[b, n + end :].tolist()) <= {drawn[end - 1]}
        assert bool((logprobs[b, :end] < 0).all())
        assert bool((logprobs[b, end:] == 0).all())
        if with_callback:
            shown = torch.stack(seen)[:, b].tolist()
            assert shown == [*drawn[:end], *[drawn[end - 1]] * (len(shown) - end)]
        ends.append(end)
    assert len(set(ends)) > 2
    assert logprobs.shape[1] == max(ends)


def test_rows_that_have_ended_leave_the_batch(model):
    """The batch shrinks when half of it has ended, so that they cost little."""
    sizes = []
    read = model.next_logits

    def watched(tokens, *rest, **options):
        sizes.append(len(tokens))
        return read(tokens, *rest, **options)

    model.next_logits = watched
    tokens = prompt(6, 3)
    free = model.generate(tokens, 30, seed=2)
    model.generate(tokens, 30, seed=2, stop_tokens=[int(free[0, 3]), int(free[1, 4])])
    assert min(sizes) <= 3


def test_generation_ends_when_all_rows_have_stopped(model):
    out = model.generate(prompt(3, 2), 50, seed=0, stop_tokens=range(V))
    assert out.shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"temperature": torch.tensor([-1.0])}, "temperature"),
        ({"seed": torch.tensor([1, 2])}, r"seed must be a number or int64 \[1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_options_outside_their_range_are_refused(model, options, named):
    with pytest.raises(UserError, match=named):
        model.generate(prompt(1, 2), **({"max_new_tokens": 2} | options))


def test_gpt_refuses_a_prompt_longer_than_its_context():
    model = build_model("gpt", SIZES)
    with pytest.raises(UserError, match="at most the context of 6 long, got 7"):
        model.generate(prompt(1, CONTEXT + 1), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gpt_steps_of_several_tokens_give_the_logits_of_a_full_read(dtype):
    torch.manual_seed(0)
    model = build_model("gpt", SIZES).to(dtype).eval()
    tokens = prompt(2, CONTEXT)
    with torch.no_grad():
        whole = model.double()(tokens)
        model.to(dtype)
        cache = model.empty_cache(2)
        for first, last in ((0, 1), (1, 4), (4, CONTEXT)):
            logits, cache = model.step_logits(tokens[:, first:last], cache)
            # Weights are the same numbers; keys and values are rounded to the cache's dtype.
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
            expected = whole[:, first:last]
            error = (logits - expected).abs().max() / expected.abs().max()
            assert float(error) < tolerance
    assert cache.lengths.tolist() == [CONTEXT, CONTEXT]
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("new", "capacity"), [(5, 8 + MAX_STEP_TOKENS - 1), (500, None)])
def test_memory_is_taken_for_what_will_be_read(new, capacity, monkeypatch):
    """Of the context, which a model may have far more of."""
    model = make("gpt", context=40)
    taken = []
    empty_cache = model.empty_cache

    def watched(batch, capacity=None):
        taken.append(capacity)
        return empty_cache(batch, capacity)

    monkeypatch.setattr(model, "empty_cache", watched)
    model.generate(prompt(2, 3), new, seed=0)
    whole = model.config.context + MAX_STEP_TOKENS - 1
    assert taken[0] == (capacity or whole)
