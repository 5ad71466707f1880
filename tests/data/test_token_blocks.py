import pytest
import torch

from seqkern import data
from seqkern.data import Blocks, prefix_examples
from seqkern.errors import UserError


def epoch_starts(blocks):
    """First tokens of an epoch of single blocks over arange: where they start."""
    return [int(block[0]) for block in blocks]


@pytest.mark.parametrize("N", [9, 12, 17, 100, 101, 1000])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_an_epoch_has_every_token_between_its_ends_as_a_target_once(N, n):
    blocks = Blocks(torch.arange(N), n, seed=3)
    for _ in range(3):
        drawn = torch.stack(list(blocks))
        assert drawn.shape == (len(blocks), n + 1)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, drawn[:, :1] + torch.arange(n + 1))
        targets = drawn[:, 1:].flatten().sort().values
        assert torch.equal(targets, torch.arange(targets[0], targets[0] + len(targets)))
        assert len(targets) >= N - 2 * n
    assert blocks.epoch == 3


def test_every_target_comes_in_some_epoch():
    blocks = Blocks(torch.arange(50), 7, seed=0)
    seen = {int(token) for _ in range(60) for block in blocks for token in block[1:]}
    assert seen == set(range(1, 50))


def test_epochs_are_in_random_order_and_the_seed_decides():
    tokens = torch.arange(10_001)
    first = epoch_starts(Blocks(tokens, 10, seed=1))
    assert first == epoch_starts(Blocks(tokens, 10, seed=1))
    assert first != epoch_starts(Blocks(tokens, 10, seed=2))
    blocks = Blocks(tokens, 10, seed=1)
    assert first == epoch_starts(blocks)
    assert first != epoch_starts(blocks)
    # Correlation of place and start, and of neighbours' starts: 1 / sqrt(1000) by chance.
    order = torch.tensor([first], dtype=torch.float64)
    place = torch.arange(len(first), dtype=torch.float64)[None]
    assert abs(torch.corrcoef(torch.cat([order, place]))[0, 1]) < 0.13
    assert abs(torch.corrcoef(torch.cat([order[:, 1:], order[:, :-1]]))[0, 1]) < 0.13


def test_batches_are_the_blocks_in_the_same_order():
    tokens = torch.arange(100)
    single = torch.stack(list(Blocks(tokens, 4, seed=5)))
    batches = list(Blocks(tokens, 4, 3, seed=5))
    assert {batch.shape for batch in batches} == {(3, 5)}
    torch.testing.assert_close(torch.cat(batches), single[: 3 * len(batches)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_no_block_and_see_as_many(world_size):
    tokens = torch.arange(1000)
    ranks = [Blocks(tokens, 7, 4, seed=2, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        drawn = [torch.cat(list(rank)) for rank in ranks]
        assert len({len(blocks) for blocks in drawn}) == 1
        starts = torch.cat(drawn)[:, 0]
        assert len(starts.unique()) == len(starts)
        assert len(starts) > len(Blocks(tokens, 7)) - 4 * world_size


@pytest.mark.parametrize("drawn", [0, 1, 11, 12, 13, 30])
def test_loaded_state_continues_where_it_was(drawn):
    def make():
        return Blocks(torch.arange(150), 6, 2, seed=9)

    whole = make()
    expected = [whole.draw() for _ in range(drawn + 20)][drawn:]
    stopped = make()
    for _ in range(drawn):
        stopped.draw()
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert all(torch.equal(resumed.draw(), batch) for batch in expected)


def test_iterating_gives_the_rest_of_the_epoch():
    blocks = data.blocks(torch.arange(100), context=9, seed=1)
    blocks.draw()
    assert len(list(blocks)) == len(blocks) - 1
    assert len(list(blocks)) == len(blocks)


def test_blocks_come_from_a_file(tmp_path):
    text = "the quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "text.txt").write_text(text)
    tokenizer = data.train_tokenizer("char", text)
    data.write_token_file(tmp_path / "text.txt", tokenizer, tmp_path / "tokens.bin")
    of_file = list(Blocks(tmp_path / "tokens.bin", 8, 2, seed=4))
    of_tensor = list(Blocks(torch.tensor(tokenizer.encode(text)), 8, 2, seed=4))
    torch.testing.assert_close(of_file, of_tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"context": 20}, r"has 20 tokens, less than one block of context \+ 1 = 21"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 5}, "20 tokens make 4 blocks .* less than one batch on every rank: 5"),
        ({"batch_size": 3, "world_size": 2}, "every rank: 6"),
        ({"seed": -1}, "seed"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"tokens": torch.zeros(20)}, "tokens must be integers"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Blocks(**{"tokens": torch.arange(20), "context": 4, **options})


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 4}, {"epoch": -1, "position": 0}])
def test_state_of_other_blocks_is_refused(state):
    with pytest.raises(UserError, match="state must be of an epoch of 4 batches"):
        Blocks(torch.arange(20), 4).load_state_dict(state)


def test_block_stands_for_each_prefix_and_its_next_token():
    pairs = list(prefix_examples(torch.tensor([5, 6, 7, 8])))
    assert [(x.tolist(), int(y)) for x, y in pairs] == [([5], 6), ([5, 6], 7), ([5, 6, 7], 8)]
    assert list(prefix_examples("abc")) == [("a", "b"), ("ab", "c")]


@pytest.mark.parametrize(
    ("block", "message"), [(torch.zeros(2, 3), r"\[2, 3\]"), ([1], "at least 2 tokens, got 1")]
)
def test_no_block_has_no_examples(block, message):
    with pytest.raises(UserError, match=message):
        prefix_examples(block)
