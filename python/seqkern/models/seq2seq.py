"""Many to many, unaligned: a sequence to another of any length."""

from torch import Tensor

from seqkern.models.conditional import Given, SequenceWriter
from seqkern.models.decoder import DecoderConfig
from seqkern.models.encoder import Encoder, EncoderConfig
from seqkern.models.padding import check_lengths, valid_steps


class Seq2Seq(SequenceWriter):
    """p(y | x) of a target sequence given a source sequence: encoder, attention, decoder.

    The decoder starts from the state in which the encoder ended and attends to the states of all
    source elements (Sutskever et al. 2014, Luong et al. 2015; of transformers Vaswani et al. 2017).
    Each side is an LSTM or a transformer. The length of the output is free: a sequence ends with
    the stop token, which the model adds to the vocabulary.

    Args:
        encoder: what is read; `source` is integers [B, S], or records [B, S, F].
        decoder: what is written.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = Seq2Seq(EncoderConfig(vocab_size=20, hidden=8), DecoderConfig(12, hidden=8))
        >>> source, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
        >>> _, loss = model(source, torch.tensor([[5, 6], [7, 8]]), lengths)
        >>> model.beam_search(source, 10, source_lengths=lengths).lengths.shape
        torch.Size([2])
    """

    def __init__(
        self, encoder: EncoderConfig, decoder: DecoderConfig, backend: str = "seqkern"
    ) -> None:
        """See the class."""
        super().__init__(decoder, encoder.hidden, encoder.hidden, backend)
        self.encoder = Encoder(encoder, self.decoder.layers)

    def given(self, source: Tensor, source_lengths: Tensor | None) -> Given:
        """The encoder's last state, and all its states."""
        lengths = check_lengths(source_lengths, source, "source_lengths")
        valid = valid_steps(lengths, source.shape[1])
        states = self.encoder(source, lengths, valid)  # [B, S, H]
        return self.encoder.last(states, lengths), (states, valid)
