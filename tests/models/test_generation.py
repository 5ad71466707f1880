import math

import pytest
import torch

from seqkern.errors import UserError
from seqkern.generate import Sampling, generate
from seqkern.models import MODELS, build_model
from seqkern.reference import token_distribution

V, CONTEXT = 11, 6
SIZES = {"vocab_size": V, "context": CONTEXT, "hidden": 12, "layers": 1, "heads": 2}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = build_model(request.param, SIZES)
    with torch.no_grad():  # spread the logits, so that greedy chains are not constant
        made.embedding.weight.mul_(20)
    return made


def prompt(batch, length):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(5))


class FixedLogits:
    """The same logits for every row and step."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def next_logits(self, tokens, state):
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


@pytest.mark.parametrize("length", [1, 3, CONTEXT])
def test_greedy_is_the_chain_of_argmaxes(model, length):
    new = 2 * CONTEXT
    tokens = prompt(3, length)
    out = model.generate(tokens, new, temperature=0)
    expected = tokens
    for _ in range(new):
        window = expected if model.context is None else expected[:, -model.context :]
        best = model.eval()(window)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(out, expected)
    assert len(out[:, length:].unique()) > 1


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


def test_stopped_rows_repeat_their_stop_token_while_others_go_on(model):
    tokens = prompt(4, 3)
    free = model.generate(tokens, 30, seed=2)
    stop = int(free[0, 5])
    out = model.generate(tokens, 30, seed=2, stop_tokens=[stop])
    for row, plain in zip(out[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        end = plain.index(stop) + 1 if stop in plain else len(plain)
        assert row[:end] == plain[: min(end, len(row))]
        assert set(row[end:]) <= {stop}


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
            logits = model.step_logits(tokens[:, first:last], cache)
            # Weights are the same numbers; keys and values are rounded to the cache's dtype.
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
            expected = whole[:, last - 1]
            error = (logits - expected).abs().max() / expected.abs().max()
            assert float(error) < tolerance
    assert cache.lengths.tolist() == [CONTEXT, CONTEXT]
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
