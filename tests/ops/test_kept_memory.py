"""CPU ops keep scratch and large activations from call to call: nobody's may become another's."""

import threading

import torch
from torch import Tensor

import seqkern
from seqkern import ops

T, B, H, WIDTH = 64, 64, 512, 8  # 32 MB of gates, the least that is kept


def _weights() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    w_ih = (torch.randn(4 * H, WIDTH) / 4).requires_grad_()
    w_hh = (torch.randn(4 * H, H) / H**0.5).requires_grad_()
    return w_ih, w_hh


def test_graphs_alive_at_once_have_gates_of_their_own() -> None:
    weights = _weights()
    inputs = [torch.randn(T, B, WIDTH) for _ in range(6)]  # more than are kept

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum(), weights)

    alone = [gradients(ops.lstm(x, None, *weights)[0]) for x in inputs]
    outputs = [ops.lstm(x, None, *weights)[0] for x in inputs]
    together = [gradients(output) for output in reversed(outputs)][::-1]
    for some, others in zip(alone, together, strict=True):
        for a, b in zip(some, others, strict=True):
            assert torch.equal(a, b)


def test_gates_that_outlive_their_graph_stay() -> None:
    weights = [w.detach() for w in _weights()]
    x = torch.randn(T, B, WIDTH)
    arguments = (None, None, *weights, None, None, None, None, False, True, False)
    gates = torch.ops.seqkern.lstm_forward(x, *arguments)[4]
    before = gates.clone()
    for _ in range(6):
        torch.ops.seqkern.lstm_forward(torch.randn(T, B, WIDTH), *arguments)
    assert torch.equal(gates, before)


def test_threads_have_scratch_of_their_own() -> None:
    module = seqkern.nn.LSTM(32, 48)
    inputs = [torch.randn(20, 3, 32) for _ in range(8)]
    with torch.no_grad():
        expected = [module(x)[0] for x in inputs]
    wrong: list[int] = []

    def repeat(n: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(module(inputs[n])[0], expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=repeat, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
