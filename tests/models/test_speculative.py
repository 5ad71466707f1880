import pytest
import torch
from torch.utils._pytree import tree_map

from seqkern.errors import UserError
from seqkern.generation import Sampling
from seqkern.generation.graph import StepGraph
from seqkern.generation.sampler import Sampler, count_tokens
from seqkern.models import MODELS, build_model

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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("draft", MODELS)
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_a_draft_changes_no_token(name, draft, draft_tokens, options):
    """Also across windows of two contexts, prompts of different lengths, and stops."""
    model, small = make(name), make(draft, seed=1, layers=1, context=8)
    tokens, lengths = prompt(4, 5), torch.tensor([5, 1, 3, 5])
    arguments = {"lengths": lengths, "seed": 3, "stop_tokens": [2], "return_logprobs": True}
    plain, plain_logprobs = model.generate(tokens, 40, **arguments, **options)
    seen = []
    out, logprobs = model.generate(
        tokens,
        40,
        draft=small,
        draft_tokens=draft_tokens,
        on_token=seen.append,
        **arguments,
        **options,
    )
    assert torch.equal(out, plain)
    torch.testing.assert_close(logprobs, plain_logprobs)
    assert len(seen) == logprobs.shape[1]
    shown, expected = torch.stack(seen, 1)[0].tolist(), plain[0, 5:].tolist()
    assert shown[: len(expected)] == expected[: len(shown)]


def test_a_draft_saves_readings(name):
    """A draft like the model itself: every proposal is right."""
    model, twin = make(name), make(name)
    reads = []
    read = model.step_logits

    def watched(tokens, state):
        reads.append(tokens.shape[1])
        return read(tokens, state)

    model.step_logits = watched
    out = model.generate(prompt(2, 1), 11, seed=1, draft=twin, draft_tokens=4)
    assert reads == [5, 5]  # one token from the prompt, then twice four proposals and one more
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
        capture=lambda step: step,
        warm_up=lambda step: [step() for _ in range(3)],
    )
    drawn = [token, *(graph.replay()[0] for _ in range(5))]
    expected = model.generate(tokens, 6, seed=7, **options)
    assert torch.equal(torch.stack(drawn, 1), expected[:, 3:])
