import pytest
import torch

from seqkern.data import (
    BlockSampler,
    make_corpus,
    pad_rows,
    train_tokenizer,
    unigram_entropy,
)
from seqkern.data import validation_batches as batches
from seqkern.errors import UserError


def test_targets_are_the_inputs_moved_by_one():
    tokens = torch.randperm(50)
    inputs, targets = BlockSampler(tokens, context=7, batch_size=5, seed=3).draw()
    place = {int(token): i for i, token in enumerate(tokens)}
    starts = torch.tensor([place[int(first)] for first in inputs[:, 0]])
    expected = tokens[starts[:, None] + torch.arange(8)]
    assert inputs.dtype == targets.dtype == torch.int64
    torch.testing.assert_close(inputs, expected[:, :-1])
    torch.testing.assert_close(targets, expected[:, 1:])


def test_every_start_is_drawn_and_none_outside():
    sampler = BlockSampler(torch.arange(10), context=4, batch_size=600, seed=0)
    inputs, targets = sampler.draw()
    assert inputs[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert int(targets.max()) == 9


def test_same_seed_same_batches_and_another_seed_others():
    tokens = torch.arange(1000)
    first, again, other = (BlockSampler(tokens, 8, 4, seed).draw()[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_restored_sampler_continues_where_it_was():
    sampler = BlockSampler(torch.arange(1000), 8, 4, seed=1)
    sampler.draw()
    state = sampler.state()
    expected = [sampler.draw()[0] for _ in range(3)]
    fresh = BlockSampler(torch.arange(1000), 8, 4, seed=99)
    fresh.restore(state)
    assert all(torch.equal(fresh.draw()[0], batch) for batch in expected)


def test_sampler_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    BlockSampler(torch.arange(100), 8, 4, seed=1).draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_text_of_exactly_one_block_is_enough_and_one_token_less_is_not():
    inputs, _ = BlockSampler(torch.arange(9), context=8, batch_size=2, seed=0).draw()
    assert inputs.tolist() == [list(range(8))] * 2
    with pytest.raises(UserError, match=r"has 8 tokens, less than one block of context \+ 1 = 9"):
        BlockSampler(torch.arange(8), context=8, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("tokens", "context", "batch_size", "named"),
    [
        (torch.arange(9).float(), 2, 2, "tokens must be int64"),
        (torch.zeros(3, 3, dtype=torch.int64), 2, 2, "tokens must be int64"),
        (torch.arange(9), 0, 2, "context"),
        (torch.arange(9), 2, 0, "batch_size"),
    ],
)
def test_sampler_refuses(tokens, context, batch_size, named):
    with pytest.raises(UserError, match=named):
        BlockSampler(tokens, context, batch_size, seed=0)


@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 6, 20, 21, 40])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_predicts_each_token_but_the_first_once_in_order(length, batch_size):
    tokens = torch.arange(length)
    pairs = list(batches(tokens, context=4, batch_size=batch_size))
    targets = torch.cat([y.flatten() for _, y in pairs]) if pairs else tokens[:0]
    assert targets.tolist() == list(range(1, length))
    assert all(torch.equal(y, x + 1) and x.shape[0] <= batch_size for x, y in pairs)


def test_unigram_entropy_of_a_uniform_and_of_a_constant_text():
    assert unigram_entropy(torch.arange(8)) == pytest.approx(2.0794415, abs=1e-6)
    assert unigram_entropy(torch.zeros(8, dtype=torch.int64)) == 0


def test_corpus_splits_and_measures():
    text = "abcd" * 25
    corpus = make_corpus(text, train_tokenizer("char", text), val_fraction=0.2, context=8)
    assert (len(corpus.training), len(corpus.validation)) == (80, 20)
    assert corpus.tokens_per_character == 1
    assert corpus.unigram_entropy == pytest.approx(1.3862944, abs=1e-6)


@pytest.mark.parametrize(
    ("length", "fraction", "message"),
    [
        (8, 0.0, r"8 training tokens, less than one block of context \+ 1 = 9"),
        (10, 0.2, r"8 training tokens"),
        (19, 0.1, r"holds out 1 tokens, less than 2"),
    ],
)
def test_corpus_too_short_is_refused_with_numbers(length, fraction, message):
    text = "a" * length
    with pytest.raises(UserError, match=message):
        make_corpus(text, train_tokenizer("char", text), fraction, context=8)


def test_rows_are_padded_in_their_order():
    padded, lengths = pad_rows([[1, 2], [], torch.tensor([3, 4, 5])])
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert lengths.tolist() == [2, 0, 3]
    records, _ = pad_rows([torch.ones(1, 2), torch.ones(3, 2)])
    assert records.tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row, got none"),
        ([[1, 2], [1.5]], r"got torch.float32 \[1\] in row 1"),
        ([torch.ones(1, 2), torch.ones(3, 3)], r"\[3, 3\] in row 1"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        pad_rows(rows)
