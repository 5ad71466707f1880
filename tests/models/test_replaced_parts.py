"""Models of which users replaced parts, or hooked on to them: every path runs what is there.

An adapter keeps the parameters of the layer it stands for in sight, as PEFT's do, so a kernel that
reads parameters in a layer's place would compute something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern import models, nn

TOKENS = torch.tensor([[1, 2, 3, 6], [9, 8, 0, 1]])
NEXT = torch.tensor([[2, 3, 6, 4], [8, 0, 1, 1]])
Change = Callable[[torch.nn.Module, str], object]


class Adapter(torch.nn.Module):
    """A low-rank update beside a layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Any:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + 3 * self.up(self.down(x))


def adapted(model: torch.nn.Module, name: str) -> None:
    torch.manual_seed(1)
    model.set_submodule(name, Adapter(model.get_submodule(name)).eval())


def doubled(of: Any) -> Any:
    """A tensor twice as large; of several the first, which leaves states alone."""
    return (2 * of[0], *of[1:]) if isinstance(of, tuple) else 2 * of


def hooked(model: torch.nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, output: doubled(output))


def pre_hooked(model: torch.nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: doubled(args))


def overridden(model: torch.nn.Module, name: str) -> None:
    part: Any = model.get_submodule(name)
    before = part.forward
    part.forward = lambda *args, **options: doubled(before(*args, **options))


def sigmoid(model: torch.nn.Module, name: str) -> None:
    model.set_submodule(name, torch.nn.Sigmoid())


def other_eps(model: torch.nn.Module, name: str) -> None:
    model.get_submodule(name).eps = 0.1  # type: ignore[assignment]


def without_bias(model: torch.nn.Module, name: str) -> None:
    part: Any = model.get_submodule(name)
    torch.manual_seed(1)
    model.set_submodule(name, torch.nn.Linear(part.in_features, part.out_features, bias=False))


def gpt(backend: str, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = models.GPTConfig(40, context=8, hidden=24, layers=2, heads=2, tied=tied)
    model = models.GPT(config, backend).eval()
    with torch.no_grad():  # far enough from the start for every part to matter
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def lstm(backend: str) -> Any:
    torch.manual_seed(0)
    return models.LSTMLanguageModel(models.LSTMConfig(40, hidden=24, layers=2), backend).eval()


def rnn(backend: str) -> Any:
    torch.manual_seed(0)
    return models.RNNLanguageModel(models.RNNConfig(40, hidden=24, layers=2), backend).eval()


CASES: list[tuple[Callable[[str], Any], str, Change]] = [
    *((gpt, f"blocks.1.attention.{part}", adapted) for part in ("qkv", "out")),
    *((gpt, f"blocks.0.mlp.{part}", adapted) for part in ("0", "2")),
    *(
        (gpt, part, hooked)
        for part in (
            *("embedding", "positions", "blocks.0", "blocks.1.attention_norm", "norm", "head"),
            *("blocks.1.attention", "blocks.0.attention.qkv", "blocks.0.mlp", "blocks.0.mlp.1"),
            *("blocks.1.mlp_norm", "blocks.1.dropout", "dropout"),
        )
    ),
    *((gpt, part, pre_hooked) for part in ("blocks.1", "blocks.1.mlp.2", "head")),
    *((gpt, part, overridden) for part in ("blocks.1.attention", "blocks.1.mlp.0")),
    (gpt, "blocks.1.mlp.1", sigmoid),
    (gpt, "blocks.1.mlp_norm", other_eps),
    (gpt, "blocks.0.attention.out", without_bias),
    *((model, part, hooked) for model in (lstm, rnn) for part in ("embedding", "dropout", "head")),
    (lstm, "lstm", hooked),
    (rnn, "rnn", hooked),
    (lstm, "lstm", pre_hooked),
    (rnn, "rnn", pre_hooked),
    (lstm, "lstm", overridden),
    *((model, "head", adapted) for model in (gpt, lstm, rnn)),
]


@torch.no_grad()
@pytest.mark.parametrize(("made", "part", "change"), CASES)
def test_every_path_runs_what_is_there(
    made: Callable[[str], Any], part: str, change: Change
) -> None:
    ours, theirs = made("seqkern"), made("torch")
    before = ours(TOKENS)
    assert ours.is_capturable
    for model in (ours, theirs):
        change(model, part)
    wanted = theirs.head(theirs.hidden_states(TOKENS))  # PyTorch's layers, and no other path
    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(ours(TOKENS), wanted)
    for model in (ours, theirs):
        torch.testing.assert_close(model.next_logits(TOKENS)[0], wanted[:, -1])
    _, state = ours.next_logits(TOKENS[:, :1])
    logits, state = ours.step_logits(TOKENS[:, 1:3], state)
    torch.testing.assert_close(logits, wanted[:, 1:3])
    torch.testing.assert_close(ours.next_logits(TOKENS[:, 3:], state)[0], wanted[:, 3])

    losses = F.cross_entropy(wanted.transpose(1, 2), NEXT, reduction="none")
    for model in (ours, theirs):
        torch.testing.assert_close(model(TOKENS, NEXT)[1], losses.mean())
        torch.testing.assert_close(model(TOKENS, NEXT, return_logits=True)[1], losses.mean())
        torch.testing.assert_close(model.next_log_probs(TOKENS, NEXT), -losses)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_generation_with_an_adapter(tied: bool) -> None:
    """Past the context, where windows move on."""
    ours, theirs = gpt("seqkern", tied), gpt("torch", tied)
    for model in (ours, theirs):
        adapted(model, "blocks.1.attention.qkv")
    options = {"temperature": 0, "lengths": torch.tensor([4, 2])}
    assert ours.generate(TOKENS, 12, **options).equal(theirs.generate(TOKENS, 12, **options))


@torch.no_grad()
def test_steps_with_an_adapter_in_16_bits() -> None:
    """Nothing is cast where the user's layers run: what they take is what `forward` gives them."""
    model = gpt("seqkern")
    adapted(model, "blocks.1.mlp.0")
    model.bfloat16()
    _, state = model.next_logits(TOKENS[:, :3])
    logits = model.next_logits(TOKENS[:, 3:], state)[0]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, model(TOKENS)[:, -1], rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().generate(TOKENS, 8).shape == (2, 12)


@pytest.mark.parametrize("change", [adapted, hooked, pre_hooked, overridden])
def test_steps_with_what_users_made_stay_out_of_graphs(change: Change) -> None:
    model = gpt("seqkern")
    change(model, "blocks.0.mlp.0")
    assert not model.is_capturable


def test_a_recurrence_that_is_hooked_reads_embeddings() -> None:
    model, seen = lstm("seqkern"), []
    model.lstm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.generate(TOKENS, 3)
    assert seen == [(2, 4, 24), (2, 1, 24), (2, 1, 24)]


def test_gradients_of_an_embedding_with_padding() -> None:
    """A row that is padding takes no gradient, also where the recurrence looks rows up itself."""
    model = lstm("seqkern")
    model.embedding = torch.nn.Embedding(40, 24, padding_idx=1)
    model(torch.tensor([[1, 2] * 50]), torch.tensor([[2, 1] * 50]))[1].backward()
    assert not model.embedding.weight.grad[1].any()
    assert model.embedding.weight.grad[2].any()


def test_an_lstm_of_another_form() -> None:
    """What stands for the LSTM need not have its biases, nor its one direction's width."""
    model = lstm("seqkern")
    model.lstm = nn.LSTM(24, 24, 1, bias=False, batch_first=True)
    _, state = model.next_logits(TOKENS[:, :3])
    torch.testing.assert_close(
        model.next_logits(TOKENS[:, 3:], state)[0], model(TOKENS)[:, -1].detach()
    )


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_losses_of_an_adapted_head(backend: str) -> None:
    """Of the models that are not language models."""
    torch.manual_seed(0)
    encoder = models.EncoderConfig(vocab_size=30, hidden=8)
    tagger = models.SequenceTagger(encoder, tags=5, backend=backend)
    decoder = models.DecoderConfig(12, hidden=16)
    writer = models.ConditionalLanguageModel(decoder, condition=3, backend=backend)
    for model in (tagger, writer):
        adapted(model, "head")
    tags = torch.tensor([[0, 4, -100, 2], [1, 1, 3, 0]])
    logits = tagger(TOKENS)
    loss = tagger(TOKENS, targets=tags)[1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), tags))
    loss.backward()
    assert tagger.head.up.weight.grad.any()

    source, written = torch.randn(2, 3), torch.tensor([[3, 5], [0, 11]])
    logits, loss = writer(source, written, return_logits=True)
    wanted = F.pad(written, (0, 1), value=12)
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(writer(source, written)[1], losses.mean())
    torch.testing.assert_close(writer.log_prob(source, written), -losses.sum(1))
