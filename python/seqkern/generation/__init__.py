"""Generation token by token: reading, drawing, stopping; `docs/generation.md` has the rules."""

from seqkern.generation.loop import generate
from seqkern.generation.reader import Decoder, window_start
from seqkern.generation.sampler import Sampling
from seqkern.generation.speculative import check_draft

__all__ = ["Decoder", "Sampling", "check_draft", "generate", "window_start"]
