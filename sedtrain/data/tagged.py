"""Which languages and tasks the texts of a corpus are of, by which tags tell them apart."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from sedtrain.batch import UserError
from sedtrain.data.corpus import Corpus
from sedtrain.data.parts import Part
from sedtrain.data.shards import BrokenShard
from sedtrain.tags import Tags

Pair = tuple[str | None, str]
"""Language and task."""


def learnt_pairs(corpus: Corpus) -> set[tuple[str, str]]:
    """Those of the training split. Raises UserError where nothing says the language of a text."""
    pairs = pairs_of(corpus, "train")
    if untold := [task for language, task in pairs if language is None]:
        raise UserError(
            f"data.tags=true: nothing says in which language there are texts to {untold[0]}",
            "data.language=LANGUAGE, data.mix.NAME.language=LANGUAGE or data.columns.language=COLUMN",
        )
    return {(language, task) for language, task in pairs if language is not None}


def refuse_unlearnt(corpus: Corpus, splits: Iterable[str], tags: Tags) -> None:
    """Raises UserError where a split asks for what a model never learnt to write."""
    for split in dict.fromkeys(splits):
        for pair in pairs_of(corpus, split):
            tags.of(*pair)


def pairs_of(corpus: Corpus, split: str) -> set[Pair]:
    """Those of the texts that are used; of a stream, of all texts."""
    if corpus.streaming and split == "train":
        return {pair for part in corpus.shards() for pair in pairs_of_shard(part)}
    parts = corpus.parts(split)
    return {
        (language, parts.parts[part].source.task)
        for part, references in groupby(corpus.kept(split), itemgetter(0))
        for language in parts[part].languages([index for _, index in references])
    }


def pairs_of_shard(part: Part) -> Iterator[Pair]:
    """Read from its column of languages alone; one that cannot be read is left to who trains on it."""
    source = part.source
    if source.columns.language is None:
        yield source.language, source.task
    elif part.shard is None:
        yield from {(language, source.task) for language in part.open().languages()}
    else:
        try:
            yield from {(text or source.language, source.task) for text in part.shard.texts(source.columns.language)}
        except BrokenShard:
            return
