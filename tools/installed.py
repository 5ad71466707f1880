"""What an installed seqkern does, seen from another folder: right numbers, and from where."""

import torch

import seqkern

logits = torch.randn(5, 50257, requires_grad=True)
target = torch.tensor([0, 1, 2, -100, 50256])
loss = seqkern.ops.cross_entropy(logits, target)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
print("seqkern", seqkern.__version__, "from", seqkern.__file__)
