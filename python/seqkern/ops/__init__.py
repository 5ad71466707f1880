"""The ops: pure functions on tensors, each backed by a hand-written kernel on every device."""
