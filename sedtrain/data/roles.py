"""Rows of any dataset as one table: a column for each role, of one type, and what is wrong with each row."""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from sedtrain.data.source import Source
from sedtrain.data.tables import NOT_TEXT, PROBLEM, as_texts, in_words, is_text
from sedtrain.errors import UserError

NUMBERS_OR_TEXT = ("null", "int", "uint", "float", "decimal", "string", "large_string")
TIMES = ("seconds", "start", "end")
MOST_SECONDS = 1e9  # 32 years; no recording is longer
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # Unicode's Cc but tab, line feed, carriage return
SEPARATING = r"[\x0b\x0c\x1c-\x1f\x{85}]"  # those of them that are white space, such as a form feed


def holds(feature: Any, kinds: tuple[str, ...]) -> bool:
    """True for a column of single values of one of these kinds of Arrow types."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def is_audio(feature: Any) -> bool:
    is_both = isinstance(feature, dict) and not feature.keys().isdisjoint({"bytes", "path"})
    is_plain = holds(feature, ("null", "binary", "large_binary", "string", "large_string"))
    return is_plain or is_both or isinstance(feature, datasets.Audio)


WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (is_audio, "bytes or the path of a file"),
    "text": (partial(holds, kinds=(*NUMBERS_OR_TEXT, "bool")), "text"),
    "id": (partial(holds, kinds=(*NUMBERS_OR_TEXT, "bool")), "text or numbers"),
    **dict.fromkeys(TIMES, (partial(holds, kinds=NUMBERS_OR_TEXT), "numbers")),
}
"""Types that the column of a role may have."""


def check_columns(columns: Mapping[str, str | None], features: Mapping[str, Any], place: str) -> None:
    """Raises UserError for a missing column, with the names of the others, and for a column of another type.

    columns: the column of each role; features: what each column holds; place: where they are, for the message
    """
    if not features.keys() - {PROBLEM}:  # of a file without a readable line
        return
    for role, column in columns.items():
        if column is None:
            continue
        fits, wanted = WANTED.get(role, (lambda feature: True, ""))
        if column not in features:
            wrong = f"{place} has no column {column!r} for the {role}, it has {in_words(features)}"
            names = "audio, transcription, translation, id, speaker, language, seconds, start or end"
            write = f"write data.columns.NAME=ONE_OF_THESE, where NAME is {names}"
        elif not fits(features[column]):
            kind = str(features[column])[:80]
            wrong = f"{place} has {kind} in the column {column!r} for the {role}, expected {wanted}"
            write = f"write data.columns.NAME=COLUMN that holds {wanted}"
        else:
            continue
        raise UserError("data.columns", column, wrong, write)


def by_role(rows: datasets.Dataset, source: Source) -> pa.Table:
    """Columns audio, text, id, speaker, language, seconds, start, end and PROBLEM, null where the dataset has nothing.

    `seconds` is the length that columns give, also by start and end; `end` is also where they give start and length. Texts
    that are not UTF-8 and impossible times are null, with a problem. Columns that are as they should be are not copied:
    they stay in their file.
    """
    columns = vars(source.columns)
    used = {PROBLEM, *columns.values()}
    stored = rows.select_columns([name for name in rows.column_names if name in used]).with_format("arrow")[:]
    cells = dict.fromkeys((*columns, PROBLEM), pa.chunked_array([pa.nulls(len(rows))]))
    problems = [stored[PROBLEM].cast(pa.string())] if PROBLEM in stored.column_names else []
    for role, column in columns.items():
        if column in stored.column_names:
            cells[role], *found = cells_of(role, stored[column], column)
            problems += found
    if problems:
        cells[PROBLEM] = pc.coalesce(*problems) if len(problems) > 1 else problems[0]
    if source.columns.start or source.columns.end:
        start, end, seconds = (cells[role].cast(pa.float64()) for role in ("start", "end", "seconds"))
        given = pc.if_else(end.is_valid(), pc.subtract(end, start.fill_null(0)), seconds)
        cells["seconds"] = pc.if_else(pc.greater_equal(given, 0), given, None)
        cells["end"] = pc.coalesce(end, pc.add(start, seconds))
    return pa.table(cells)


Cells = tuple[pa.ChunkedArray, ...]
"""The cells of a column and, where something is wrong with some of them, the problem of each row."""


def cells_of(role: str, cells: pa.ChunkedArray, column: str) -> Cells:
    """Numbers of seconds, names that are not empty, texts; of audio, also bytes and objects."""
    if role in TIMES:
        return times_of(cells, column)
    if role == "audio" and not is_text(cells.type):
        return (cells,)
    texts, *problems = readable(cells, column)
    return known(texts) if role in ("speaker", "language") else texts, *problems


def readable(cells: pa.ChunkedArray, column: str) -> Cells:
    texts = as_texts(cells)
    if texts is cells or not is_text(cells.type):
        return (texts,)
    is_broken = pc.and_(cells.is_valid(), texts.is_null())
    return texts, pc.if_else(is_broken, f"text that is not UTF-8: column {column}", None)


def times_of(cells: pa.ChunkedArray, column: str) -> Cells:
    """Seconds as numbers, also where text spells them. NaN is an empty cell, as tables of pandas have it."""
    spelt, *problems = readable(cells, column) if is_text(cells.type) else (cells,)
    try:
        times = spelt.cast(pa.float64())
    except pa.ArrowInvalid:
        times = pa.chunked_array([[time_of(value) for value in spelt.to_pylist()]], pa.float64())
    is_wrong = pc.or_(pc.less(times, 0), pc.greater(times, MOST_SECONDS)).fill_null(False)
    if pc.any(is_wrong).as_py():
        shown = spelt if is_text(spelt.type) else times
        wrong = [f"impossible time: {column} = {str(value)[:12]}" for value in shown.to_pylist()]
        problems.append(pc.if_else(is_wrong, pa.array(wrong), None))
    is_empty = pc.or_(is_wrong, pc.is_nan(times))
    return pc.if_else(is_empty, None, times) if pc.any(is_empty).as_py() else times, *problems


def time_of(value: str | None) -> float | None:
    """A spelt number; infinity for what is none."""
    try:
        return value if value is None else float(value) if "_" not in value else inf
    except ValueError:
        return inf


def known(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Clean texts without spaces around them, null where they are empty."""
    clean = pc.utf8_trim_whitespace(cleaned(texts))
    names = pc.if_else(pc.not_equal(clean, ""), clean, None)
    return texts if names.equals(texts) else names


def cleaned(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts without control characters; those that separate become a space. Lists and objects stay marked as such."""
    is_unclean = unclean(texts)
    if not pc.any(is_unclean).as_py():
        return texts
    clean = pc.replace_substring_regex(pc.replace_substring_regex(texts, SEPARATING, " "), CONTROL, "")
    return pc.if_else(is_unclean, clean, texts)


def unclean(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """True for texts with control characters."""
    return pc.and_not(pc.match_substring_regex(texts, CONTROL), pc.starts_with(texts, NOT_TEXT))


def rows_where(mask: pa.ChunkedArray) -> pa.Array:
    """The numbers of the rows that a mask marks; pyarrow before 26 crashes on a mask without chunks."""
    return pc.indices_nonzero(mask.combine_chunks())
