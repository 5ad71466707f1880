import pytest
import torch

from seqkern.errors import UserError
from seqkern.models import (
    GPT,
    MODELS,
    GPTConfig,
    LSTMConfig,
    LSTMLanguageModel,
    RNNConfig,
    RNNLanguageModel,
    build_model,
)
from seqkern.models.size import count_parameters

V, CONTEXT = 13, 8
SIZES = {"vocab_size": V, "context": CONTEXT, "hidden": 12, "layers": 2, "heads": 3}


def make(name, backend="seqkern", seed=0, **sizes):
    torch.manual_seed(seed)
    return build_model(name, SIZES | sizes, backend)


def tokens(batch, length, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("length", [1, 5, CONTEXT])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_logits_and_loss_have_their_shapes(name, length, dtype):
    x = tokens(3, length).to(dtype)
    model = make(name)
    assert model(x).shape == (3, length, V)
    logits, loss = model(x, x.long(), return_logits=True)
    assert logits.shape == (3, length, V)
    assert loss.shape == ()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_a_model(name, layers, tied):
    sizes = SIZES | {"layers": layers, "tied": tied}
    assert count_parameters(name, sizes) == build_model(name, sizes).num_parameters()


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_training_makes_logits_only_where_asked(name, backend):
    model, x = make(name, backend).double(), tokens(3, 5)
    none, loss = model(x, x)
    logits, same_loss = model(x, x, return_logits=True)
    assert none is None
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(loss, same_loss, rtol=1e-12, atol=0)


def test_training_runs_the_loss_of_hidden_states(name, monkeypatch):
    model, x = make(name), tokens(3, 5)
    monkeypatch.setattr(model.loss, "forward", lambda *_: pytest.fail("loss of logits"))
    _, loss = model(x, x)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loss_is_the_mean_negative_log_likelihood(name):
    x, y = tokens(3, 6), tokens(3, 6, seed=2)
    model = make(name).double()
    _, loss = model(x, y)
    picked = model.probabilities(x).gather(2, y[:, :, None])  # [B, T, 1]
    torch.testing.assert_close(loss, -picked.log().mean())


def test_a_new_model_is_close_to_uniform(name):
    _, loss = make(name)(tokens(4, 8), tokens(4, 8, seed=2))
    assert loss.item() == pytest.approx(torch.tensor(float(V)).log().item(), abs=0.3)


def test_probabilities_are_normalised_and_ignore_dropout(name):
    model = make(name, dropout=0.5).train()
    p = model.probabilities(tokens(2, 7))
    assert p.shape == (2, 7, V)
    assert bool((p > 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 7))
    assert torch.equal(p, model.probabilities(tokens(2, 7)))
    assert model.training


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_later_token_changes_no_earlier_logits(name, changed):
    model = make(name).eval()
    x = tokens(2, 8)
    y = x.clone()
    y[:, changed] = (y[:, changed] + 1) % V
    before, after = model(x), model(y)
    torch.testing.assert_close(before[:, :changed], after[:, :changed])
    assert bool((before[:, changed:] != after[:, changed:]).any(-1).all())


@pytest.mark.parametrize("piece", [1, 3])
def test_reading_in_pieces_gives_the_logits_of_one_forward(name, piece):
    model = make(name).double().eval()
    x = tokens(2, CONTEXT)
    expected = model(x)
    state = None
    for start in range(0, CONTEXT, piece):
        part = x[:, start : start + piece]
        logits, state = model.next_logits(part, state)
        torch.testing.assert_close(logits, expected[:, start + part.shape[1] - 1])
        assert not logits.requires_grad


@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_prompts_of_different_lengths_are_read_together(name, backend):
    """And what stands behind a row's prompt changes nothing."""
    model = make(name, backend).double().eval()
    x, lengths = tokens(3, 6), torch.tensor([2, 6, 1])
    logits, state = model.next_logits(x, None, lengths)
    if model.keeps_state:
        logits, state = model.next_logits(tokens(3, 1, seed=4), state)
    for b, n in enumerate(lengths.tolist()):
        alone = x[b : b + 1, :n]
        if model.keeps_state:
            alone = torch.cat((alone, tokens(3, 1, seed=4)[b : b + 1]), 1)
        torch.testing.assert_close(logits[b], model(alone)[0, -1])


def test_several_tokens_are_scored_and_taken_back(name):
    model = make(name).double().eval()
    x = tokens(3, CONTEXT)
    _, before = model.next_logits(x[:, :3])
    logits, after = model.step_logits(x[:, 3:7], before)
    torch.testing.assert_close(logits, model(x[:, :7])[:, 3:])
    keep = torch.tensor([1, 4, 2])
    state = model.rewind(after, before, x[:, 3:7], keep)
    logits, _ = model.next_logits(x[:, 7:8], state)
    for b, n in enumerate(keep.tolist()):
        read = torch.cat((x[b : b + 1, : 3 + n], x[b : b + 1, 7:8]), 1)
        torch.testing.assert_close(logits[b], model(read)[0, -1])


def test_a_state_of_some_rows_goes_on_without_the_others(name):
    model = make(name).double().eval()
    x, rows = tokens(4, 5), torch.tensor([3, 1])
    _, state = model.next_logits(x[:, :4])
    logits, _ = model.next_logits(x[rows, 4:], model.select_rows(state, rows))
    torch.testing.assert_close(logits, model(x[rows])[:, -1])


@torch.no_grad()
def test_an_lstm_reads_single_tokens_and_pieces_in_turn():
    model = make("lstm").double().eval()
    x = tokens(2, 6)
    state = None
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 6)):
        logits, state = model.next_logits(x[:, start:end], state)
        torch.testing.assert_close(logits, model(x[:, :end])[:, -1])


@pytest.mark.parametrize("rows", [[1], [0, 1, 2], [2, 0]])
@pytest.mark.parametrize("width", [0, 3])
def test_a_gpt_rereads_rows(rows, width):
    model = make("gpt").double().eval()
    x, new = tokens(3, 5), tokens(3, 3, seed=7)
    _, state = model.next_logits(x[:, :4])
    state = model.reread(state, rows, new[rows, :width])
    logits, _ = model.next_logits(x[:, 4:], state)
    for b in range(3):
        held = new[b, :width] if b in rows else x[b, :4]
        torch.testing.assert_close(logits[b], model(torch.cat((held, x[b, 4:]))[None])[0, -1])


def test_a_gpt_reads_more_tokens_than_a_step_takes():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "context": 50, "hidden": 16, "layers": 2, "heads": 2}
    model = build_model("gpt", sizes).double().eval()
    x = tokens(2, 45)
    _, state = model.next_logits(x[:, :5])
    logits, _ = model.next_logits(x[:, 5:], state)
    torch.testing.assert_close(logits, model(x)[:, -1])


@pytest.mark.parametrize("recurrent", ["lstm", "rnn"])
def test_recurrent_models_have_no_longest_input(recurrent):
    assert make(recurrent)(tokens(1, 5 * CONTEXT)).shape == (1, 5 * CONTEXT, V)


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.zeros(4, dtype=torch.int64), r"tokens must be .* \[B, T\], got torch.int64 \[4\]"),
        (torch.zeros(2, 4), r"tokens must be int64 or int32 \[B, T\], got torch.float32"),
        (torch.zeros(2, 0, dtype=torch.int64), r"at least one token, got \[2, 0\]"),
        (torch.full((2, 4), V), rf"tokens must be in \[0, {V}\), got {V}"),
        (torch.tensor([[1, -1]]), rf"tokens must be in \[0, {V}\), got -1"),
    ],
)
def test_wrong_tokens_are_refused(name, x, named):
    model = make(name)
    with pytest.raises(UserError, match=named):
        model(x)
    with pytest.raises(UserError, match=named):
        model.generate(x, 1)


@pytest.mark.parametrize("targets", [tokens(2, 3), tokens(2, 4).float()])
def test_wrong_targets_are_refused(name, targets):
    with pytest.raises(UserError, match=r"targets must be int64 \[2, 4\] like tokens"):
        make(name)(tokens(2, 4), targets)


def test_gpt_refuses_more_than_its_context():
    with pytest.raises(UserError, match="at most the context of 8 long, got 9"):
        make("gpt")(tokens(2, CONTEXT + 1))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: LSTMConfig(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (lambda: RNNConfig(vocab_size=3, layers=0), "layers must be at least 1"),
        (lambda: GPTConfig(vocab_size=3, hidden=10, heads=4), "multiple of heads = 4, got 10"),
        (lambda: GPTConfig(vocab_size=3, context=0), "context must be at least 1"),
        (lambda: LSTMConfig(vocab_size=3, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_sizes_are_refused(config, named):
    with pytest.raises(UserError, match=named):
        config()


def test_the_same_seed_gives_both_backends_the_same_parameters(name):
    ours, theirs = (make(name, backend).state_dict() for backend in ("seqkern", "torch"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_backends_agree_in_loss_and_gradients(name):
    results = []
    for backend in ("seqkern", "torch"):
        model = make(name, backend).double()
        _, loss = model(tokens(3, 8), tokens(3, 8, seed=2))
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-10, atol=1e-12)
    assert all(grad is not None for grad in our_grads.values())


def test_backend_picks_whose_loss_runs():
    import seqkern

    assert type(make("lstm", "seqkern").loss) is seqkern.nn.CrossEntropyLoss
    assert type(make("lstm", "torch").loss) is torch.nn.CrossEntropyLoss
    assert type(make("lstm", "seqkern").head_loss) is seqkern.nn.LinearCrossEntropyLoss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_the_loss_curve_is_that_of_the_logits(name):
    """200 steps of training with and without logits, from the same parameters and batches."""
    curves = []
    for return_logits in (False, True):
        model = make(name).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(200):
            x = tokens(4, CONTEXT + 1, seed=step % 4)
            _, loss = model(x[:, :-1], x[:, 1:], return_logits=return_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-8, atol=0)
    assert curves[0][-20:].mean() < curves[0][:20].mean() - 0.1


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="backend must be one of seqkern, torch, got 'jax'"):
        make("lstm", "jax")
    with pytest.raises(UserError, match="model must be one of lstm, rnn, gpt, got 'mlp'"):
        make("mlp")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_is_the_embedding(tied):
    model = make("gpt", tied=tied)
    assert (model.head is None) == tied
    assert ("head.weight" in model.state_dict()) != tied
    _, loss = model(tokens(1, 2), tokens(1, 2))
    loss.backward()
    untouched = [v for v in range(V) if v not in tokens(1, 2).unique()]
    # Through the head every row of the embedding has a gradient, not only the tokens read.
    assert bool((model.embedding.weight.grad[untouched] != 0).any()) == tied


def test_models_are_usable_without_the_registry():
    x = tokens(1, 3)
    assert LSTMLanguageModel(LSTMConfig(vocab_size=V, hidden=4))(x).shape == (1, 3, V)
    assert RNNLanguageModel(RNNConfig(vocab_size=V, hidden=4))(x).shape == (1, 3, V)
    assert GPT(GPTConfig(vocab_size=V, hidden=4, heads=2))(x).shape == (1, 3, V)
