"""Dynamo, imported under acceleration, knows torch's own functions as if it were not.

In processes of their own: Dynamo makes its tables once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAD = "import torch, torch.nn.functional as F\n"
LOSS = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.loss = torch.nn.Linear(8, 11), torch.nn.CrossEntropyLoss()

    def forward(self, x, y):
        logits = self.linear(x)
        flat = logits.view(-1, 11)
        return logits, F.cross_entropy(flat, y.view(-1)) + self.loss(flat, y.view(-1))

torch.manual_seed(0)
net = torch.compile(Net(), backend="aot_eager", fullgraph=True)
_, loss = net(torch.randn(2, 3, 8), torch.randint(11, (2, 3)))
loss.backward()
print(f"{loss.item():.4f}")
"""


def run(tmp_path: Path, text: str, *python: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + text)
    done = subprocess.run(
        [sys.executable, *python, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("first", ["", "import torch._dynamo\n"])
def test_a_compiled_loss_is_ours(tmp_path: Path, first: str) -> None:
    """The usual shape of a language model: logits and loss in one compiled module."""
    ours = run(tmp_path, first + LOSS, "-m", "seqkern", "run", "--report")
    assert ours.stdout == run(tmp_path, LOSS).stdout
    assert ours.stderr.splitlines() == [
        "seqkern: calls of torch's functions",
        "  torch.nn.functional.cross_entropy          2 graphs compiled  seqkern",
    ]


def test_torchs_functions_are_known_after_a_block(tmp_path: Path) -> None:
    run(
        tmp_path,
        "import seqkern\n"
        "with seqkern.accelerate():\n"
        "    torch.compile(lambda x: x.softmax(-1), backend='eager')(torch.ones(2, 3))\n"
        "graphs = []\n"
        "def backend(graph, inputs):\n"
        "    graphs.append([node.target for node in graph.graph.nodes])\n"
        "    return graph.forward\n"
        "def f(x):\n"
        "    y = torch.Tensor.log_softmax(x, -1) + torch.softmax(x, -1) + F.softmax(x, -1)\n"
        "    return F.cross_entropy(y, y.argmax(-1))\n"
        "torch.compile(f, backend=backend, fullgraph=True)(torch.ones(2, 3))\n"
        "assert {F.cross_entropy, torch.softmax, F.softmax} <= set(graphs[0]), graphs\n",
    )


def test_without_dynamos_tables_results_are_torchs(tmp_path: Path) -> None:
    """They are private: another torch may have others."""
    hidden = (
        "import seqkern.dropin.compiling as compiling\n"
        "compiling._show_originals = lambda rules: None\n"
    )
    done = run(tmp_path, hidden + "import seqkern\nseqkern.accelerate.enable()\n" + LOSS)
    assert done.stdout == run(tmp_path, LOSS).stdout


def test_acceleration_does_not_import_dynamo(tmp_path: Path) -> None:
    run(
        tmp_path,
        "import seqkern, sys\nseqkern.accelerate.enable()\n"
        "assert 'torch._dynamo' not in sys.modules\n",
    )
