"""One token file, several processes: each trains on its own blocks, together on one model.

    torchrun --nproc-per-node 2 examples/distributed.py          # two processes on this machine
    python examples/distributed.py --small                       # one process, seconds

The page beside it: docs/large_data.md.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from seqkern import data, models


def train(tokens: Path, small: bool, rank: int, world_size: int) -> None:
    """The training loop of one process."""
    hidden, steps = (16, 3) if small else (128, 200)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if _on_gpu() else "cpu"
    torch.manual_seed(0)  # the same parameters everywhere
    vocab_size = data.TokenFile(tokens).tokenizer.vocab_size
    model: nn.Module = models.LSTMLanguageModel(models.LSTMConfig(vocab_size, hidden)).to(device)
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    # The same seed everywhere: one order of blocks, of which each rank takes its turn.
    blocks = data.blocks(tokens, 32, 8, seed=0, rank=rank, world_size=world_size)
    for step in range(1, steps + 1):
        block = blocks.draw().to(device)  # [B, n + 1]
        _, loss = model(block[:, :-1], block[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged over the ranks
        optimizer.step()
        if rank == 0 and step % max(1, steps // 4) == 0:
            print(f"step {step}: {loss.item():.3f} nats per token on rank 0 of {world_size}")

    where = blocks.state_dict()  # beside the model in a checkpoint: the same on all ranks
    weights = sum(float(p.detach().double().sum()) for p in model.parameters())
    ends = [f"rank {rank}: {where}, sum of all parameters {weights:.9f}"]
    if world_size > 1:  # one process prints: lines of several may run into one another
        gathered: list[str | None] | None = [None] * world_size if rank == 0 else None
        distributed.gather_object(ends[0], gathered)
        ends = [str(end) for end in gathered or []]
    for end in ends:
        print(end)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and "LOCAL_RANK" in os.environ


def main() -> None:
    """Prepare the tokens once, wait for them, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    launched = "RANK" in os.environ  # by torchrun
    if launched:
        if _on_gpu():  # where collectives put what they carry
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if _on_gpu() else "gloo")
    rank, world_size = (
        (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
    )
    with TemporaryDirectory() as folder:
        shared = [folder]  # in earnest a path that all machines see
        if launched:
            distributed.broadcast_object_list(shared)
        tokens = Path(shared[0]) / "tokens.bin"
        if rank == 0:
            text = data.embedded_text()[: 20_000 if small else None]
            (Path(folder) / "text.txt").write_text(text, encoding="utf-8")
            tokenizer = data.train_tokenizer("char", text)
            data.write_token_file(Path(folder) / "text.txt", tokenizer, tokens)
        if launched:
            distributed.barrier()
        train(tokens, small, rank, world_size)
        if launched:
            distributed.barrier()  # rank 0 removes the folder
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
