"""The documents in a file: text, JSON lines or parquet, parquet aside also compressed; read in parts."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any

from mixture_of_tokens.utils.files import naming
from mixture_of_tokens.utils.formatting import first_line

PART = 2**20  # bytes of a file held at once
ARCHIVES = (".7z", ".bz2", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip")
LINES = (".jsonl", ".ndjson")  # an object a line; so may be .json

Document = Iterable[bytes]  # its UTF-8 text in parts, in order, as it may not fit in memory


def documents_in(path: Path, field: str) -> Iterator[Document]:
    """Rows of JSON lines and of parquet, else all of its text. Raises ValueError, with file and line, if it is none."""
    if has_json_rows(path, field):
        yield from _json_rows(path, field)
    elif suffix(path) == ".parquet":
        yield from _parquet_rows(path, field)
    else:
        yield _text(path)


def suffix(path: Path) -> str:
    """The kind of a file by its name, whether it is compressed or not."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def has_json_rows(path: Path, field: str) -> bool:
    """By its name, or as a .json file whose first line is an object with the field."""
    if suffix(path) != ".json":
        return suffix(path) in LINES
    with _opened(path) as file:
        line = b"\n"
        while line and not line.strip():
            line = file.readline(PART)
        if line.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":  # a text, of which a line may have gigabytes
            return False
        if not line.endswith(b"\n"):
            line += file.readline()
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and field in first


def text_of_row(name: str, row: dict[str, Any], field: str) -> Document:
    """Raises ValueError, with the row's name, where the field is missing or no text."""
    if field not in row:
        raise ValueError(_without(name, field, row))
    if not isinstance(row[field], str):
        what = "null" if row[field] is None else type(row[field]).__name__
        raise ValueError(f"{name}: the field {field!r} is no text but {what}")
    try:
        return [row[field].encode()]
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start} of the field {field!r} is half a surrogate pair") from error


def _without(name: str, field: str, names: Iterable[str]) -> str:
    return f"{name} has no field {field!r}; it has {', '.join(map(repr, names)) or 'none'}"


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    kind = path.name.lower().rpartition(".")[2]
    with gzip.open(path) if kind == "gz" else _zstd(path) if kind == "zst" else path.open("rb") as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error
        except OSError as error:
            if kind == "zst" and error.errno is None:  # Arrow's, of the format
                raise ValueError(f"{path} is not a complete zstd file: {first_line(error)}") from error
            raise naming(error, path) from error


def _zstd(path: Path) -> BufferedReader:
    import pyarrow as pa  # here, as importing it takes time and few runs need it

    return BufferedReader(pa.input_stream(path, compression="zstd"), PART)  # pyright: ignore[reportArgumentType]


def _text(path: Path) -> Iterator[bytes]:
    if path.suffix.lower() in ARCHIVES:
        raise ValueError(f"{path} is compressed in a way that is not read; .gz and .zst are")
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with _opened(path) as file:
        while True:
            part = file.read(PART)
            if b"\0" in part:
                what = f"{path} is binary, no text: byte {read + part.index(0)} is NUL"
                raise ValueError(f"{what}; leave it out, or, if it is UTF-16, convert it to UTF-8")
            waiting = len(decoder.getstate()[0])  # bytes of a character whose end is in this part
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                what = f"{path} is not UTF-8 at byte {read - waiting + error.start}"
                raise ValueError(f"{what}; convert it, as iconv does, or leave it out") from error
            if not part:
                return
            read += len(part)
            yield part


def _json_rows(path: Path, field: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            name = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} is no JSON: {first_line(error)}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{name} is no object with a field {field!r}")
            yield text_of_row(name, row, field)


def _parquet_rows(path: Path, field: str) -> Iterator[Document]:
    import pyarrow as pa  # here, as importing it takes time and few runs need it
    import pyarrow.parquet as pq

    number = 0
    try:
        # Without pre_buffer a row group, which may be the whole file, is read as it is needed.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PART) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(_without(str(path), field, names))
            if names.count(field) > 1:
                raise ValueError(f"{path} has {names.count(field)} fields {field!r}: which one holds the text?")
            for batch in file.iter_batches(batch_size=64, columns=[field], use_threads=False):
                # By name: asked for `text`, pyarrow reads a column `text.x` too, which may be the first.
                for value in batch.column(field).to_pylist():
                    number += 1
                    yield text_of_row(f"{path}: row {number}", {field: value}, field)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # damaged pages are an OSError without a name
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} is no parquet file with text after row {number}: {first_line(error)}") from error
