"""The rows of a JSONL or CSV file, or of a .gz of either: where each stands, and its columns, as they are."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

MOST_IN_A_FIELD = 16 << 20  # characters of a CSV field; a quote that is never closed must not read on forever
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv")


class DataError(ValueError):
    """A data file that cannot be used: the message names the file, the line, and the mend."""


def check_text(where: str, column: str, text: str) -> None:
    """DataError for a text that holds half a character, as JSON may and an argument that is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} holds {text[error.start]!a}, half of a surrogate pair, at character "
            f"{error.start + 1}, which is no text; write the character whole, or leave it out"
        ) from None


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a JSONL or CSV file (or a .gz of either) stands, and its columns.

    Raises DataError that names the file and the line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise DataError(f"{path}: {what}; give a .jsonl or .csv file (or a .gz of one)")
    name = path.name.removesuffix(".gz")
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: expected a file ending in .jsonl or .csv (or .gz after it)")
    read, newline = (_csv, "") if name.endswith(".csv") else (_jsonl, None)
    opened: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        # -sig: a byte order mark before a quoted column of a CSV file would make its quotes part of the name
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from read(path, file)
    except UnicodeDecodeError as error:  # of a block of bytes that is read ahead
        with opened(path, "rb") as file:
            line = next(number for number, line in enumerate(file, 1) if not _is_utf8(line))
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is cut or broken inside
        raise DataError(f"{path}: cannot be read: {error}") from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _jsonl(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        # Files put together have a byte order mark within.
        fields = _parsed(where, line.removeprefix("\ufeff"), "one object a line")
        if not isinstance(fields, dict):
            raise DataError(
                f"{where}: expected a JSON object, got {type(fields).__name__}; one object a line"
            )
        yield where, fields


def _parsed(where: str, text: str, expected: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DataError(
                f"{where}: several values are named {', '.join(twice)}; rename or remove all but one"
            )
        return fields

    try:
        return json.loads(text, object_pairs_hook=once)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON at column {error.colno}: {error.msg}; {expected}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON that is nested too deeply to be read; {expected}") from None
    except ValueError as error:  # Python's limit on the digits of a number
        what = str(error).partition("; use sys.")[0]
        raise DataError(f"{where}: a number that cannot be read: {what}; write it as a string") from None


def _csv(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    limit = csv.field_size_limit(MOST_IN_A_FIELD)
    try:
        if reader.fieldnames:
            if len(reader.fieldnames) == 1 and any(sign in reader.fieldnames[0] for sign in ";\t|"):
                raise DataError(
                    f"{path}, line {reader.line_num}: one column, {reader.fieldnames[0]!r}; separate the "
                    "columns by commas"
                )
            twice = {name for name in reader.fieldnames if name and reader.fieldnames.count(name) > 1}
            if twice:
                raise DataError(
                    f"{path}, line {reader.line_num}: several columns are named {', '.join(sorted(twice))}; "
                    "rename or remove all but one"
                )
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if None in fields:
                raise DataError(f"{where}: more values than the header has columns; quote values with commas")
            if "messages" in fields:
                expected = "messages must be a JSON list of role and content"
                text = fields["messages"]
                fields["messages"] = _parsed(where, text, expected) if text else None
            yield where, fields
    except csv.Error as error:
        what = f"broken CSV: {error}"
        if "field limit" in str(error):
            what = f"a field of more than {MOST_IN_A_FIELD >> 20} MiB; close its quote, or write JSONL"
        raise DataError(f"{path}, line {reader.reader.line_num}: {what}") from None
    finally:
        csv.field_size_limit(limit)
