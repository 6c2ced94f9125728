"""A corpus: the datasets that it is made of, what of them can be used, and how much of an epoch each has."""

import atexit
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sedtrain.batch import Skipped
from sedtrain.data.paths import is_pattern, local_path, public_name, split_files
from sedtrain.data.readers import BrokenFile
from sedtrain.data.shards import Shard, shards_of
from sedtrain.data.skipped import SkippedUtterances
from sedtrain.data.sources import load_rows
from sedtrain.data.tables import PROBLEM
from sedtrain.data.utterances import Columns, Limits, UtteranceRows, durations
from sedtrain.errors import UserError, require
from sedtrain.launch import is_first_of_machine
from sedtrain.text.tags import TASK_OF, Tags

Reference = tuple[int, int]
"""An utterance: the number of its part, and its row there."""


@dataclass(frozen=True)
class Source:
    """One dataset.

    splits: its own names of train, validation and test; None where it has no part in one
    weight: how often its training split is seen in an epoch
    label:  its name in a mix, which its ids begin with
    """

    path: str
    columns: Columns
    splits: Mapping[str, str | None]
    name: str | None = None
    audio_folder: str | None = None
    weight: float = 1.0
    label: str = ""
    language: str | None = None
    task: str = "transcribe"

    def whole(self, split: str) -> list["Part"]:
        """A split, which is train, validation or test, in one piece."""
        name = self.splits[split]
        return [] if name is None else [Part(self, name)]

    def shards(self, split: str, copies: Path) -> list["Part"]:
        """The files of the split, or the whole of it; copies: where what is fetched or converted is kept."""
        name = self.splits[split]
        if name is None:
            return []
        found = shards_of(self.path, name, self.name, copies)
        return [Part(self, name, shard) for shard in found] or self.whole(split)


@dataclass(frozen=True)
class Part:
    """Rows that are opened together: a split of a source, or one shard of it."""

    source: Source
    split: str
    shard: Shard | None = None

    @property
    def name(self) -> str:
        """What rows without an id are named after."""
        return self.split if self.shard is None else self.shard.name

    @property
    def place(self) -> str | None:
        """The file or the URL, where it is one."""
        return file_of(self.source.path, self.split) if self.shard is None else self.shard.place

    def open(self) -> UtteranceRows:
        """Raises UserError where there is nothing, or no rows of utterances, BrokenFile where a file cannot be read."""
        source = self.source
        if self.shard is None:
            rows = load_rows(source.path, self.split, source.name)
        else:
            rows = with_columns(self.shard.rows(), source.columns)
        return UtteranceRows(
            rows,
            source.columns,
            source.path,
            self.name,
            None if source.audio_folder is None else Path(source.audio_folder).expanduser(),
            f"{source.label}/" if source.label else "",
            source.language,
            source.task,
            self.place,
        )


def with_columns(rows: datasets.Dataset, columns: Columns) -> datasets.Dataset:
    """Rows of an empty file, or of lines of which none can be read, with the columns of the others, all null."""
    if set(rows.column_names) - {PROBLEM}:
        return rows
    used = dict.fromkeys(column for column in vars(columns).values() if column)
    problems = {PROBLEM: rows[PROBLEM][:]} if len(rows) else {}
    return datasets.Dataset(pa.table({**{column: pa.nulls(len(rows)) for column in used}, **problems}))


def file_of(path: str, split: str) -> str | None:
    """The file of a folder that a split is stored in, where it is one."""
    where = local_path(path)
    files = split_files(where, split.partition("[")[0]) if where.is_dir() else []
    return str(files[0]) if len(files) == 1 else None


class Parts(Sequence[UtteranceRows]):
    """The rows of each part, opened when they are asked for.

    num_rows: how many of them stay open at least; None: all
    """

    def __init__(self, parts: Iterable[Part], num_rows: int | None = None) -> None:
        self.parts, self.num_rows = list(parts), num_rows
        self.opened: OrderedDict[int, UtteranceRows] = OrderedDict()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> UtteranceRows:  # type: ignore[override]
        if number not in self.opened:
            self.opened[number] = self.parts[number].open()
            if self.num_rows is not None:
                self.close_oldest(self.num_rows)
        self.opened.move_to_end(number)
        return self.opened[number]

    def close_oldest(self, num_rows: int) -> None:
        left = sum(map(len, self.opened.values()))
        for number, rows in list(self.opened.items())[:-1]:
            left -= len(rows)
            if left < num_rows:
                break
            del self.opened[number]

    def fetch_ahead(self, number: int) -> None:
        if shard := self.parts[number].shard:
            shard.fetch_ahead()

    def remove_copy(self, number: int) -> None:
        """What was fetched or converted to open this part is removed; it can be opened anew."""
        self.opened.pop(number, None)
        if shard := self.parts[number].shard:
            shard.remove_copy()


SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}


OWN = ("path", "name", "audio_folder", "columns", "target", "language", "weight", *SPLITS)


def sources_of(mix: Mapping[str, Mapping[str, Any]] | None, common: Mapping[str, Any]) -> list[Source]:
    """The datasets of a mix by name, or the only one; what one does not say itself is taken from `common`."""
    if mix:
        return [named_source(name, options, common) for name, options in mix.items()]
    if common["path"] is None:
        raise UserError("data.path is not set", "data.path=FOLDER_OR_FILE_OR_HUB_ID, or data.mix")
    return [source_of(common, "data")]


def each_source(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of the datasets that the group `data` names, by where they stand."""
    common = {name: data.get(name) for name in OWN}
    mix = data.get("mix") or {}
    return {f"data.mix.{name}": {**common, **options} for name, options in mix.items()} or {"data": common}


def is_same_for_all(source: Mapping[str, Any]) -> bool:
    """Whether several splits would be the same file or, by a pattern or URL without `{split}`, the same files.

    Splits that are each cut differently, such as `train[:90%]` and `train[90%:]`, are not.
    """
    path, splits = source["path"], [str(source[split]) for split in SPLITS if source[split] is not None]
    cuts = {split.partition("[")[2] for split in splits}
    if path is None or len(splits) < 2 or (len(cuts) == len(splits) and "" not in cuts):
        return False
    return Path(path).expanduser().is_file() or (stands_for_several(path) and "{split}" not in path)


def stands_for_several(path: str) -> bool:
    return is_pattern(path) or "://" in path


def named_source(name: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> Source:
    where = f"data.mix.{name}"
    if unknown := [key for key in options if key not in OWN]:
        raise UserError(f"{where}.{unknown[0]}: there is no such option", f"{where}.NAME, NAME one of {', '.join(OWN)}")
    if options.get("path", common["path"]) is None:
        raise UserError(f"{where}.path is not set", f"{where}.path=FOLDER_OR_FILE_OR_HUB_ID")
    weight = options.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    require(is_number and 0 < weight < inf, f"{where}.weight", weight, "a number above 0")
    if options.get("target", common["target"]) not in TASK_OF:
        raise UserError(
            f"{where}.target={options['target']}: there is no such target",
            f"{where}.target=ONE_OF {', '.join(TASK_OF)}",
        )
    if not isinstance(language := options.get("language"), str | None):
        raise UserError(
            f"{where}.language={language}: this is no text",
            f"{where}.language in quotes, as YAML reads no and on as values",
        )
    columns = {**common["columns"], **options.get("columns", {})}
    return source_of({**common, **options, "columns": columns, "label": name}, where)


def source_of(options: Mapping[str, Any], where: str) -> Source:
    return Source(
        path=options["path"],
        columns=Columns.of(options["columns"], options["target"], where),
        splits={split: options[option] for option, split in SPLITS.items()},
        name=options["name"],
        audio_folder=options["audio_folder"],
        weight=float(options.get("weight", 1.0)),
        label=options.get("label", ""),
        language=options["language"],
        task=TASK_OF[options["target"]],
    )


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """How often each of several datasets is seen in an epoch, so that their shares are those of size ** (1 / temperature).

    An epoch stays as long as all of them together (arXiv 1907.05019, where the shares come from).
    """
    powers = [size ** (1 / temperature) for size in sizes]
    return [sum(sizes) * power / (sum(powers) * size) for size, power in zip(sizes, powers, strict=True)]


class Corpus:
    """The splits train, validation and test of one dataset or of several; each is opened when it is first asked for.

    temperature: see `temperature_weights`
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
        except BrokenFile as error:
            self.skipped.broken_file(part.shard.name, part.shard.place, str(error), len(self.shards()))

    def opened(self, parts: Parts, number: int) -> UtteranceRows | None:
        """One of the parts; one that cannot be read is noted, and None."""
        try:
            return parts[number]
        except BrokenFile as error:
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
        factors = dict(zip(sizes, temperature_weights(list(sizes.values()), self.temperature), strict=True))
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
        except BrokenFile:
            return
