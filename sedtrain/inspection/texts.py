"""The texts of a split: what is written, how often, and what the training split has too."""

from collections import Counter
from dataclasses import dataclass

from sedtrain.inspection.reading import SplitColumns
from sedtrain.inspection.statistics import first_uses, num_repeated

NUM_RAREST, NUM_REPEATED = 12, 5


@dataclass(frozen=True)
class Use:
    """A character, how often it is there, and the first utterance with it."""

    character: str
    times: int
    id: str
    text: str


@dataclass(frozen=True)
class Texts:
    """Texts and their characters.

    num_repeated: utterances whose text another one has too
    repeated:     the most frequent texts
    unseen:       characters without ink, but for spaces
    """

    num_distinct: int
    num_repeated: int
    repeated: dict[str, int]
    num_characters: int
    rarest: list[Use]
    unseen: list[Use]


@dataclass(frozen=True)
class Overlap:
    """What a split shares with the training split: speakers, and utterances whose text is there too."""

    num_speakers: int
    num_texts: int


def texts_of(columns: SplitColumns) -> Texts:
    texts = [text.strip() for text in columns.texts]
    counts, uses = Counter(texts), first_uses(texts)
    listed = [Use(character, times, columns.ids[first], texts[first]) for character, (times, first) in uses.items()]
    return Texts(
        len(counts),
        num_repeated(texts),
        {text: count for text, count in counts.most_common(NUM_REPEATED) if count > 1},
        len(uses),
        listed[:NUM_RAREST],
        [use for use in listed if not use.character.isprintable()],
    )


def overlap(columns: SplitColumns, train: SplitColumns) -> Overlap:
    speakers = {each for each in columns.speakers if each} & {each for each in train.speakers if each}
    texts = {text.strip() for text in train.texts}
    return Overlap(len(speakers), sum(text.strip() in texts for text in columns.texts))
