from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map

from seqkern.errors import UserError
from seqkern.generation import Sampling
from seqkern.generation.graph import StepGraph, captured, warmed_up
from seqkern.generation.sampler import Sampler, count_tokens
from seqkern.models import MODELS, build_model
from seqkern.reference import token_distribution

V, CONTEXT = 11, 12
SIZES = {"vocab_size": V, "context": CONTEXT, "hidden": 12, "layers": 2, "heads": 2}
OPTIONS = [
    {"temperature": 0},
    {},
    {"top_k": 4, "temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
]


def make(name, seed=0, spread=20, **sizes):
    torch.manual_seed(seed)
    model = build_model(name, SIZES | sizes).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(spread)
    return model


def prompt(batch, length):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("draft", MODELS)
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_tokens_are_those_without_a_draft(name, draft, draft_tokens):
    """Also across windows of two contexts, prompts of different lengths, penalties, and stops."""
    model, small = make(name), make(draft, seed=1, layers=1, context=8)
    tokens, lengths = prompt(4, 5), torch.tensor([5, 1, 3, 5])
    options = {
        **{"lengths": lengths, "temperature": 0, "frequency_penalty": 0.3},
        **{"stop_tokens": [2], "return_logprobs": True},
    }
    plain, plain_logprobs = model.generate(tokens, 40, **options)
    seen = []
    out, logprobs = model.generate(
        tokens, 40, draft=small, draft_tokens=draft_tokens, on_token=seen.append, **options
    )
    assert torch.equal(out, plain)
    torch.testing.assert_close(logprobs, plain_logprobs)
    assert len(seen) == logprobs.shape[1]
    shown, expected = torch.stack(seen, 1)[0].tolist(), plain[0, 5:].tolist()
    assert shown[: len(expected)] == expected[: len(shown)]


@torch.no_grad()
def continuations(model, row, new, **options):
    """The probability of every continuation of row [T] by `new` tokens, V^new of them."""
    rows, p = row[None], torch.ones(1, dtype=torch.float64)
    for _ in range(new):
        counts = torch.stack([torch.bincount(r, minlength=model.vocab_size) for r in rows])
        q = token_distribution(model(rows)[:, -1], token_counts=counts, **options)  # [n, V]
        p = (p[:, None] * q).flatten()
        every = torch.arange(model.vocab_size).repeat(len(rows))
        rows = torch.cat((rows.repeat_interleave(model.vocab_size, 0), every[:, None]), 1)
    return p


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    ],
    ids=["plain", "truncated", "penalised"],
)
def test_tokens_have_the_distribution_of_the_model(options):
    """Chi-squared of all 125 continuations by three tokens; the draft knows nothing of them."""
    model = make("gpt", vocab_size=5, spread=3)
    draft = make("lstm", seed=3, vocab_size=5, spread=3, layers=1)
    rows, row = 20_000, torch.tensor([1, 4])
    out = model.generate(row.repeat(rows, 1), 3, seed=11, draft=draft, draft_tokens=2, **options)
    digits = out[:, 2:] @ torch.tensor([25, 5, 1])
    counts = torch.bincount(digits, minlength=125).double()
    expected = rows * continuations(model, row, 3, **options)
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)
    common = expected >= 5
    chi_squared = ((counts - expected)[common] ** 2 / expected[common]).sum()
    chi_squared += (counts - expected)[rare].sum() ** 2 / expected[rare].sum().clamp(min=1)
    freedom = int(common.sum())
    # The normal approximation of chi-squared's 99.99 % point.
    assert float(chi_squared) < freedom + 3.72 * (2 * freedom) ** 0.5 + 10
    assert freedom > 15


@pytest.mark.parametrize("draft", ["gpt", "rnn"])
def test_a_row_depends_on_nothing_around_it(name, draft):
    model, small = make(name), make(draft, seed=1, layers=1, context=9)
    tokens, lengths = prompt(3, 4), torch.tensor([4, 2, 3])
    out = model.generate(tokens, 30, lengths=lengths, seed=5, draft=small)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(tokens[b : b + 1, :n], 25, seed=5 + b, draft=small)[0]
        assert torch.equal(out[b, : len(alone)], alone)


def test_a_draft_saves_readings(name):
    """A draft like the model itself: every proposal is kept."""
    model, twin = make(name), make(name)
    reads = []
    read = model.step_logits

    def watched(tokens, state):
        reads.append(tokens.shape[1])
        return read(tokens, state)

    model.step_logits = watched
    out = model.generate(prompt(2, 1), 11, seed=1, draft=twin, draft_tokens=4)
    # One token comes from the prompt; then twice four proposals and one more.
    assert reads == [5, 5]
    assert out.shape == (2, 12)


def test_drafts_that_do_not_fit_are_refused():
    model = make("gpt")
    with pytest.raises(UserError, match="draft must have the vocabulary of the model, 11 tokens"):
        model.generate(prompt(1, 2), 3, draft=make("lstm", vocab_size=7))
    with pytest.raises(UserError, match=r"draft_tokens must be in \[1, 15\], got 16"):
        model.generate(prompt(1, 2), 3, draft=make("lstm"), draft_tokens=16)
    whole = build_model("gpt", SIZES, "torch").double()
    with pytest.raises(UserError, match="draft reads whole windows"):
        model.generate(prompt(1, 2), 3, draft=whole)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_step_that_a_graph_captures_draws_the_same_tokens(name, options):
    """Without a device: what would be captured runs as it is, after the same warm-up."""
    model, tokens = make(name), prompt(3, 3)
    sampling, seeds = Sampling(**options), torch.arange(3) + 7
    counts = count_tokens(tokens, None, V) if sampling.penalises else None
    sampler = Sampler(sampling, seeds, counts)
    logits, state = model.next_logits(tokens)
    token, _ = sampler.draw(logits, 0)
    sampler.count(token[:, None])
    state = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state)
    graph = StepGraph(
        *(model, state, sampler, token, 1),
        capture=lambda step, _: step,
        warm_up=lambda step, _: [step() for _ in range(3)],
    )
    drawn = [token, *(graph.replay()[0] for _ in range(5))]
    expected = model.generate(tokens, 6, seed=7, **options)
    assert torch.equal(torch.stack(drawn, 1), expected[:, 3:])


def test_capture_is_on_the_device_of_the_tokens(monkeypatch):
    """Which need not be the current one: a step captured on another stream would never run."""
    device, seen = torch.device("cuda", 1), []

    class Recorded:
        def __init__(self, name, *args, **options):
            self.name, self.given = name, (*args, *options.values())
            seen.append((name, self.given))

        def __enter__(self):
            seen.append(("enter", self.name))

        def __exit__(self, *_):
            seen.append(("exit", self.name))

        def wait_stream(self, other):
            seen.append(("wait", self.given, other.given))

        def replay(self):
            pass

    for name in ("CUDAGraph", "Stream", "current_stream", "device", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, partial(Recorded, name))
    warmed_up(lambda: seen.append("step"), device)
    assert seen.count("step") == 2
    assert {item[1] for item in seen if item[0] in ("Stream", "current_stream", "device")} == {
        (device,)
    }
    assert seen.index(("enter", "device")) < seen.index("step") < seen.index(("exit", "stream"))
    seen.clear()
    captured(lambda: seen.append("step"), device)
    (given,) = [item[1] for item in seen if item[0] == "graph"]
    assert given[1].given == (device,)  # the stream of the capture
    order = [item if item == "step" else item[:2] for item in seen]
    assert order.index(("enter", "device")) < order.index(("graph", given))
    assert order.index(("enter", "graph")) < order.index("step") < order.index(("exit", "graph"))
