"""Turns rows of any dataset into one table with a typed column for each role and a column of problems."""

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
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # Unicode's Cc except tab, line feed, carriage return
SEPARATING = r"[\x0b\x0c\x1c-\x1f\x{85}]"  # control characters that are white space, such as a form feed


def holds(feature: Any, kinds: tuple[str, ...]) -> bool:
    """True for a column of scalars whose Arrow type starts with one of `kinds`."""
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
"""For each role, a test of the column's type, and the allowed types in words."""


def check_columns(columns: Mapping[str, str | None], features: Mapping[str, Any], place: str) -> None:
    """Raises UserError for a missing column, with the names of the others, and for a column of a wrong type.

    columns: column names by role; features: types by column name; place: file or split, for the message
    """
    if not features.keys() - {PROBLEM}:  # no line of the file was readable
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
    """Columns audio, text, id, speaker, language, seconds, start, end and PROBLEM; null where the dataset has no value.

    If the dataset has start and end, `seconds` is their difference. If it has start and seconds, `end` is their sum.
    Texts that are not UTF-8 and impossible times become null, with a problem. Correct columns are not copied: they stay
    memory-mapped.
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
"""The cells of a column; if some are wrong, also the problem of each row."""


def cells_of(role: str, cells: pa.ChunkedArray, column: str) -> Cells:
    """Times as seconds; speakers and languages as clean names or null; other roles as text; audio also as bytes or objects."""
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
    """Seconds as numbers, also from text. NaN becomes null, because pandas writes empty cells as NaN."""
    spelt, *problems = readable(cells, column) if is_text(cells.type) else (cells,)
    try:
        times = spelt.cast(pa.float64())
    except pa.ArrowInvalid:
        times = pa.chunked_array([[time_of(value) for value in spelt.to_pylist()]], pa.float64())
    is_wrong = pc.or_(pc.less(times, 0), pc.greater(times, MOST_SECONDS)).fill_null(False)
    if pc.any(is_wrong).as_py():
        shown = (spelt if is_text(spelt.type) else times).filter(is_wrong)
        wrong = [f"impossible time: {column} = {str(value)[:12]}" for value in shown.to_pylist()]
        nothing = pa.nulls(len(times), pa.string())
        problems.append(pa.chunked_array([pc.replace_with_mask(nothing, is_wrong.combine_chunks(), pa.array(wrong))]))
    is_empty = pc.or_(is_wrong, pc.is_nan(times))
    return pc.if_else(is_empty, None, times) if pc.any(is_empty).as_py() else times, *problems


def time_of(value: str | None) -> float | None:
    """The number that a text spells; infinity for other text."""
    try:
        return value if value is None else float(value) if "_" not in value else inf
    except ValueError:
        return inf


def known(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Clean texts without surrounding spaces; empty ones become null."""
    clean = pc.utf8_trim_whitespace(cleaned(texts))
    names = pc.if_else(pc.not_equal(clean, ""), clean, None)
    return texts if names.equals(texts) else names


def cleaned(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Removes control characters from texts; separating ones become a space. Keeps the NOT_TEXT mark of lists and objects."""
    is_unclean = unclean(texts)
    if not pc.any(is_unclean).as_py():
        return texts
    clean = pc.replace_substring_regex(pc.replace_substring_regex(texts, SEPARATING, " "), CONTROL, "")
    return pc.if_else(is_unclean, clean, texts)


def unclean(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """True for texts with control characters."""
    return pc.and_not(pc.match_substring_regex(texts, CONTROL), pc.starts_with(texts, NOT_TEXT))


def rows_where(mask: pa.ChunkedArray) -> pa.Array:
    """Indices of the rows where the mask is true; pyarrow before 26 crashes on a mask without chunks."""
    return pc.indices_nonzero(mask.combine_chunks())
