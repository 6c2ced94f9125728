"""Whether the decoder listens: its loss with the audio of other utterances against its loss with their own."""

from torch import Tensor

from sedtrain.models.encoded import EncodedSpeech


class OtherAudio:
    """Gives each utterance the audio of the one before it, encoded once; the first of a batch hears the last."""

    def __init__(self) -> None:
        self.before: EncodedSpeech | None = None

    def instead_of(self, encoded: EncodedSpeech) -> EncodedSpeech | None:
        """An utterance alone in its batch hears the first of the batch before; None where there is none."""
        before, self.before = self.before, rows(encoded, [0])
        num_utterances = len(encoded.last_hidden_state)
        return before if num_utterances == 1 else rows(encoded, [num_utterances - 1, *range(num_utterances - 1)])


def rows(encoded: EncodedSpeech, order: list[int]) -> EncodedSpeech:
    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order]

    return EncodedSpeech(
        last_hidden_state=chosen(encoded.last_hidden_state), attention_mask=chosen(encoded.attention_mask)
    )
