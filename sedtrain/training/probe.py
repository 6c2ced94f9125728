"""Audio exchanged between utterances, to measure whether the decoder listens to it."""

from sedtrain.models.encoder import EncodedSpeech


class OtherAudio:
    """Exchanges the encoded audio of utterances, batch after batch."""

    def __init__(self) -> None:
        self.previous: EncodedSpeech | None = None

    def exchanged(self, encoded: EncodedSpeech) -> EncodedSpeech | None:
        """Gives each utterance the audio of the one before it in the batch; the first gets the last one's.

        A single utterance gets the first of the previous batch; None if there is no previous batch.
        """
        previous, self.previous = self.previous, encoded.rows([0])
        num_utterances = len(encoded.last_hidden_state)
        return previous if num_utterances == 1 else encoded.rows([num_utterances - 1, *range(num_utterances - 1)])
