"""Any bytes under any name are read as text, or refused by ValueError or OSError in one line that names the file."""

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixture_of_tokens.data.evaluation_text import whole_text
from mixture_of_tokens.data.prepare import prepare_text
from mixture_of_tokens.data.sources import documents
from mixture_of_tokens.data.tokenizer import load_tokenizer, train_tokenizer
from texts import sentences

few = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROWS = VALUES | st.dictionaries(st.sampled_from(["text", "id"]), VALUES, max_size=2)
ODD = {
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "a key twice": b'{"text": "a", "text": 1}',
    "a long integer": b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    "a large number": b'{"text": 1e999}',
    "no number": b'{"text": NaN}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a byte order mark": b"\xef\xbb\xbf",
    "nothing": b"\0",
}
# Lines as they should be, and some that no generator of JSON makes.
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.binary(max_size=20),
    st.sampled_from(list(ODD.values())),
)
TABLES = st.lists(LINES, max_size=4).map(b"\n".join)


def changed(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a few bytes replaced, or cut short, or with something after it."""
    place, byte = st.integers(0, len(content) - 1), st.integers(0, 255)

    def replaced(edits: list[tuple[int, int]]) -> bytes:
        result = bytearray(content)
        for where, what in edits:
            result[where] = what
        return bytes(result)

    return st.one_of(
        st.lists(st.tuples(place, byte), min_size=1, max_size=4).map(replaced),
        place.map(lambda length: content[:length]),
        st.binary(min_size=1, max_size=20).map(lambda more: content + more),
    )


def parquet(table: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


PARQUET = parquet(pa.table({"id": range(40), "text": [f"text {i % 9} and more" for i in range(40)]}), row_group_size=20)
CONTENT = {
    "rows.jsonl": TABLES,
    "any.txt": st.binary(max_size=60) | st.text(max_size=40).map(str.encode),
    "rows.jsonl.gz": TABLES.map(gzip.compress)
    | TABLES
    | changed(gzip.compress(b'{"text": "some text"}\n' * 20, mtime=0)),
    "any.py.gz": st.binary(max_size=60).map(gzip.compress) | changed(gzip.compress(b"some text\n" * 20, mtime=0)),
    "rows.jsonl.zst": TABLES.map(lambda rows: pa.compress(rows, "zstd", asbytes=True)) | TABLES,
    "any.py.zst": changed(pa.compress(b"some text\n" * 20, "zstd", asbytes=True)) | st.binary(max_size=60),
    "rows.parquet": changed(PARQUET) | st.binary(max_size=60),
}


def works_or_names(path: Path, use: Callable[[], object]) -> None:
    """Warnings are errors in these tests, so there is none of those either."""
    said = f"{path.name} is read"
    try:
        use()
    except (ValueError, OSError) as error:
        said = str(error)
    assert path.name in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", CONTENT)
def test_any_file_is_read_or_named(name, tmp_path):
    @few
    @given(CONTENT[name])
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        works_or_names(tmp_path / name, lambda: [b"".join(d).decode() for d in documents([str(tmp_path / name)])])

    check()


@pytest.mark.parametrize("line", ODD)
def test_odd_rows_are_named_by_file_and_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + ODD[line])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2\b"):
        list(documents([str(path)]))


@few
@given(st.dictionaries(st.sampled_from(["text", "text.a", "id"]), st.lists(VALUES, min_size=2, max_size=2), min_size=1))
def test_any_columns_of_parquet_are_read_or_named(tmp_path_factory, columns):
    path = tmp_path_factory.getbasetemp() / "columns.parquet"
    try:
        content = parquet(pa.table(columns))
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # not every value has a column
        return
    path.write_bytes(content)
    read: list[str] = []
    works_or_names(path, lambda: read.extend(b"".join(d).decode() for d in documents([str(path)])))
    assert read == columns["text"][: len(read)] if "text" in columns else not read


def edited(tokenizer: dict) -> st.SearchStrategy[bytes]:
    """A tokenizer.json with one of its values, at any depth, replaced or taken away."""

    def places(value: object, path: tuple = ()) -> list[tuple]:
        here = [path] if path else []
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return here + [place for key, part in list(inner)[:12] for place in places(part, (*path, key))]

    def edit(place: tuple, new: object) -> bytes:
        result = json.loads(json.dumps(tokenizer))
        holder = result
        for key in place[:-1]:
            holder = holder[key]
        if new is None:
            del holder[place[-1]]
        else:
            holder[place[-1]] = new
        return json.dumps(result).encode()

    return st.builds(edit, st.sampled_from(places(tokenizer)), VALUES)


def test_any_tokenizer_encodes_or_is_named(tmp_path, capfd):
    whole = json.loads(train_tokenizer([sentences(0, 50)], 257).backend_tokenizer.to_str())
    (tmp_path / "some.txt").write_text("some text\n" * 9)
    path = tmp_path / "tokenizer.json"

    @few
    @given(edited(whole) | st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        works_or_names(path, lambda: whole_text([str(tmp_path / "some.txt")], load_tokenizer(str(path)), group_size=1))

    check()


@settings(few, max_examples=15)
@given(TABLES)
def test_what_cannot_be_prepared_leaves_nothing(tmp_path_factory, rows):
    base = tmp_path_factory.getbasetemp()
    path = base / "rows.jsonl"
    path.write_bytes(json.dumps({"text": sentences(0, 30)}).encode() + b"\n" + rows)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(base / "cache"))
        works_or_names(path, lambda: prepare_text([str(path)], vocab_size=257, context=2))
    assert not list((base / "cache").glob("*.partial"))
