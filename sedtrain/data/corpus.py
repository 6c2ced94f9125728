"""A corpus: the datasets that it is made of, what of them can be used, and how much of an epoch each has."""

import atexit
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from sedtrain.batch import Skipped, UserError
from sedtrain.data.durations import durations
from sedtrain.data.limits import Limits
from sedtrain.data.mix import heated
from sedtrain.data.parts import Part, Parts, Reference, Source
from sedtrain.data.rows import UtteranceRows
from sedtrain.data.shards import BrokenShard
from sedtrain.data.skipped import SkippedUtterances
from sedtrain.data.sources import public_name
from sedtrain.ranks import is_first_of_machine


class Corpus:
    """The splits train, validation and test of one dataset or of several; each is opened when it is first asked for.

    temperature: see `heated`
    streaming:   whether the training split is read shard after shard; the others never are
    copies:      a folder for what has to be fetched or converted, which is gone when the process ends
    rewrite:     what is done to training texts before they are learnt
    """

    def __init__(
        self,
        sources: Sequence[Source],
        limits: Limits,
        skipped: SkippedUtterances,
        temperature: float,
        streaming: bool,
        copies: Path,
    ) -> None:
        self.sources, self.limits, self.skipped = list(sources), limits, skipped
        self.temperature, self.streaming, self.copies = temperature, streaming, copies
        self.rewrite: Callable[[str], str] = str
        if is_first_of_machine():  # the last of them to need the copies
            atexit.register(shutil.rmtree, copies, ignore_errors=True)
        self.parts = cache(self.load_parts)
        self.kept = cache(self.find_kept)
        self.shards = cache(self.find_shards)

    def load_parts(self, split: str) -> Parts:
        """All that `split`, which is train, validation or test, is made of; of a stream too, where it is not streamed."""
        return Parts(some([part for source in self.sources for part in self.parts_of(source, split)], split))

    def parts_of(self, source: Source, split: str) -> list[Part]:
        if self.streaming or "://" in source.path:
            return source.shards(split, self.copies / split)
        return source.whole(split)

    def texts(self, split: str) -> Iterator[str]:
        """The target texts, read one part after the other."""
        if self.streaming and split == "train":
            for part in self.shards():
                yield from self.texts_of(part)
            return
        parts = self.parts(split)
        for number in range(len(parts)):
            if rows := self.opened(parts, number):
                yield from rows.texts()

    def texts_of(self, part: Part) -> Iterator[str]:
        if part.shard is None:
            yield from part.open().texts()
            return
        try:
            yield from part.shard.texts(part.source.columns.text)
        except BrokenShard as error:
            self.skipped.broken_file(part.shard.name, part.shard.place, str(error), len(self.shards()))

    def opened(self, parts: Parts, number: int) -> UtteranceRows | None:
        """One of the parts; one that cannot be read is noted, and None."""
        try:
            return parts[number]
        except BrokenShard as error:
            shard = parts.parts[number].shard
            assert shard is not None
            self.skipped.broken_file(shard.name, shard.place, str(error), len(parts))
            return None

    def refuse_unusable(self, splits: Iterable[str]) -> None:
        """Raises one UserError of everything that is wrong with these splits; of a stream the first shard is opened."""
        errors = []
        for split in dict.fromkeys(splits):
            try:
                if self.streaming and split == "train":
                    self.refuse_broken_shards()
                else:
                    self.kept(split)
            except UserError as error:
                errors.append(error)
        if errors:
            wrong, instead = (dict.fromkeys(each) for each in zip(*(error.args for error in errors), strict=True))
            raise UserError("\n".join(wrong), "; ".join(instead)) from errors[0]

    def refuse_broken_shards(self) -> None:
        parts = Parts(self.shards(), num_rows=0)
        if all(self.opened(parts, number) is None for number in range(len(parts))):
            raise UserError(
                f"data.path={self.sources[0].path}: none of the {len(parts)} shards of 'train' can be read",
                "data.path of files that are whole",
            )

    def find_kept(self, split: str) -> dict[Reference, float]:
        """The seconds of each utterance that is not too long, too short or without text.

        Raises UserError when nothing is left of the split.
        """
        kept: dict[Reference, float] = {}
        skipped: list[Skipped] = []
        parts = self.parts(split)
        for part in range(len(parts)):
            if (rows := self.opened(parts, part)) is None:
                continue
            here, not_here = self.limits.sift(rows, range(len(rows)), durations(rows), self.rewriting(split))
            kept.update({(part, index): seconds for index, seconds in here.items()})
            skipped += not_here
        if not kept:
            self.skipped.note(skipped)
            raise none_left(self.sources, split, skipped)
        self.skipped.planned(split, len(kept) + len(skipped), skipped)
        return kept

    def rewriting(self, split: str) -> Callable[[str], str]:
        """What has to leave something of the texts of a split."""
        return self.rewrite if split == "train" else str

    def find_shards(self) -> list[Part]:
        """Those of the training split, which a stream reads."""
        return some(
            [part for source in self.sources for part in source.shards("train", self.copies / "stream")], "train"
        )

    def weights(self) -> list[float]:
        """How often each shard of a stream is seen in an epoch, or else each dataset."""
        if self.streaming:
            return [part.source.weight for part in self.shards()]
        parts = self.parts("train").parts
        sizes = Counter(parts[part].source.label for part, _ in self.kept("train"))
        factors = dict(zip(sizes, heated(list(sizes.values()), self.temperature), strict=True))
        return [part.source.weight * factors.get(part.source.label, 1.0) for part in parts]

    def has_length(self) -> bool:
        """Whether every epoch has the same utterances, so that its steps can be counted."""
        return not self.streaming and self.temperature == 1 and all(source.weight == 1 for source in self.sources)

    @property
    def public_name(self) -> str:
        """For readers elsewhere."""
        return " + ".join(dict.fromkeys(public_name(source.path) for source in self.sources))

    def training_audio(self) -> str:
        """For people: how much there is to train on."""
        if self.streaming:
            return f"streamed, {len(self.shards()):,} files"
        seconds = self.kept("train").values()
        return f"{sum(seconds) / 3600:.2f} hours, {len(seconds):,} utterances"


def some(parts: list[Part], split: str) -> list[Part]:
    """Raises UserError where no dataset of a mix has the split."""
    if not parts:
        raise UserError(f"no dataset of data.mix has a part in {split}", f"data.mix.NAME.{split}_split=SPLIT of one")
    return parts


def none_left(sources: Sequence[Source], split: str, skipped: Sequence[Skipped]) -> UserError:
    reasons = Counter(each.reason for each in skipped)
    return UserError(
        f"data.path={' + '.join(dict.fromkeys(source.path for source in sources))}: "
        f"none of the {len(skipped)} utterances of {sources[0].splits[split]!r} can be used "
        f"({', '.join(f'{count} {reason}' for reason, count in reasons.items())})",
        "data.min_seconds, data.max_seconds and data.columns that fit this dataset",
    )
