"""Documents from every kind of source, duplicates, splits: what goes in comes out, and what cannot is refused."""

import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixture_of_tokens.data import duplicates, evaluation_text, sources, tokens
from mixture_of_tokens.data.evaluation_text import whole_text
from mixture_of_tokens.data.prepare import prepare_text
from mixture_of_tokens.data.sources import cache_directory, documents, files, fingerprint
from mixture_of_tokens.data.splits import pieces_of, split, spool
from mixture_of_tokens.data.tokenizer import train_tokenizer
from mixture_of_tokens.runs.loading import load_tokenizer_of
from mixture_of_tokens.runs.preconditions import check_resumed
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.utils.files import opened
from texts import sentences, texts

ODD = "naïve  \t<|x|> 漢字\r\n\rend of a line\x0b, 🙂\u2028 and no line end"


def read(*sources: object, field: str = "text") -> list[str]:
    return [b"".join(d).decode() for d in documents([str(source) for source in sources], field)]


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def dealt(work, given: list[str], group_size: int = 32, **options):
    """Texts of each split, in order, and what `split` says."""
    places, digests = spool(([text.encode()] for text in given), work / "text", None, len_of)
    result = split(work / "text", places, digests, group_size=group_size, work=work, progress=len_of, **options)
    with opened(work / "text") as file:
        found = {
            name: [os.pread(file, int(length), int(offset)).decode() for offset, length in part]
            for name, part in result.places.items()
        }
    return found, result


def len_of(count: int) -> None:
    assert count >= 0


# Sources


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return out.getvalue().to_pybytes()


def test_every_kind_of_source_gives_the_same_texts(tmp_path):
    given = [*texts(5), ODD]
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, text in enumerate(given):
        data = text.encode()
        where = [folder / f"{i}.txt", folder / "deep" / f"{i}.MD", folder / "deep" / "er" / f"{i}.py.gz"][i // 2]
        where.write_bytes(gzip.compress(data) if where.suffix == ".gz" else data)
    (folder / ".hidden.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\0")
    (folder / "empty.py").write_bytes(b"")
    rows = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(given)]
    table = "\n\n".join(rows)
    (tmp_path / "rows.jsonl").write_text(table, encoding="utf-8-sig")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(table.encode()))
    (folder / "more.txt.zst").write_bytes(zstd(b"in frame one, ") + zstd(b"and two"))
    pq.write_table(pa.table({"id": range(6), "body": given}), tmp_path / "rows.parquet")
    assert sorted(text for text in read(folder) if text) == sorted([*given, "in frame one, and two"])
    assert sorted(read(tmp_path / "folder" / "**" / "[0-9].*")) == sorted(given)
    assert read(tmp_path / "rows.jsonl") == read(tmp_path / "rows.jsonl.gz") == given
    assert read(tmp_path / "rows.jsonl.zst") == given
    assert read(tmp_path / "rows.parquet", field="body") == given
    (tmp_path / "any.suffix").write_bytes(ODD.encode())
    assert read(tmp_path / "any.suffix", tmp_path / "rows.jsonl") == [ODD, *given]


def test_a_large_file_is_read_in_parts_and_characters_may_lie_across_them(tmp_path):
    text = "é" * 2**20 + "\r\n" + "x漢" * 2**19
    (tmp_path / "large.txt").write_bytes(text.encode())
    document = next(documents([str(tmp_path / "large.txt")]))
    parts = list(document)
    assert max(map(len, parts)) <= 2**20
    assert b"".join(parts) == text.encode()


def test_rows_of_a_hub_data_set_read_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    given = texts(7)
    for part in range(2):
        rows = [json.dumps({"text": text, "url": "u"}) for text in given[part::2]]
        (folder / f"train-{part}.jsonl").write_text("\n".join(rows))
    assert read(f"hf:{folder}") == given[0::2] + given[1::2]
    marks = [fingerprint(source, lambda size: None) for source in (str(folder), f"hf:{folder}", f"hf:{folder}:other")]
    assert len(set(map(tuple, marks))) == 3  # each is another text
    (folder / "train-1.jsonl").rename(folder / "test.jsonl")
    assert fingerprint(f"hf:{folder}", lambda size: None) != marks[1]  # of another split
    (folder / "test.jsonl").rename(folder / "train-1.jsonl")
    with pytest.raises(ValueError, match=r"row 1 has no field 'body'; it has 'text', 'url'"):
        read(f"hf:{folder}", field="body")
    folder.rename(f"{folder}@v1")
    assert read(f"hf:{folder}@v1") == given[0::2] + given[1::2]
    Path(f"{folder}@v1").rename(folder)
    (folder / "train-1.jsonl").write_text(json.dumps({"text": given[1], "url": "u"}) + '\n{"text": broken')
    with pytest.raises(ValueError, match=r"hf:.*set cannot be read beyond row \d+: "):
        read(f"hf:{folder}")
    with pytest.raises(ValueError, match=r"hf:.*nowhere cannot be read"):
        read(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=f"{folder} is a folder here, and has no revisions"):
        read(f"hf:{folder}@v1")
    with pytest.raises(ValueError, match="hf: names no data set"):
        read("hf:")


def test_the_default_is_the_standard_library():
    library = read()
    assert len(library) > 500
    assert any("class JSONDecoder" in text for text in library)


def test_packages_that_are_installed_are_not_in_the_standard_library(tmp_path, monkeypatch):
    for file in ("one.py", "a/two.py", "site-packages/three.py", "a/dist-packages/b/four.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "nowhere.py")  # as Debian's may be
    monkeypatch.setattr("mixture_of_tokens.data.sources.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read() == ["one.py", "a/two.py"]


def test_a_user_without_a_home_directory_is_told(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "MIXTURE_OF_TOKENS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ValueError, match=r"^~/\.cache/mixture_of_tokens: there is no such home directory$"):
        cache_directory()


def test_no_sources_are_not_the_standard_library():
    with pytest.raises(ValueError, match="there are no sources"):
        prepare_text([])


def test_packages_are_the_modules_installed_beside_this_interpreter(tmp_path, monkeypatch):
    pure, binary = tmp_path / "pure", tmp_path / "binary"
    for file, text in {pure / "one" / "a.py": "a = 1", binary / "two.py": "b = 2", pure / "notes.txt": "no"}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (pure / "latin.py").write_bytes(b"# caf\xe9")  # test data in another encoding
    paths = {"purelib": str(pure), "platlib": str(binary)}
    monkeypatch.setattr("mixture_of_tokens.data.sources.sysconfig.get_paths", lambda: paths)
    assert sorted(read("packages")) == ["a = 1", "b = 2"]
    assert len(fingerprint("packages", len_of)) == 3
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert read("./packages") == ["mine"]
    for file in [*pure.rglob("*.py"), *binary.rglob("*.py")]:
        file.unlink()
    with pytest.raises(ValueError, match="packages: no packages are installed in"):
        read("packages")


def _parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def _twice(path):
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)


def _damaged(path):
    _parquet(path, text=["some words " * 1000 + str(i) for i in range(50)])
    content = bytearray(path.read_bytes())
    content[30:200] = bytes(170)
    path.write_bytes(content)


BAD = {
    "missing.txt": (None, "missing.txt: there is no such file or folder"),
    "none*.txt": (None, "none*.txt matches no file"),
    "folder": (lambda p: p.mkdir(), "folder holds no file of a known kind"),
    "empty.txt": (lambda p: p.write_bytes(b""), "empty.txt is empty"),
    "blank.txt": (lambda p: p.write_bytes(b" \r\n"), "blank.txt is empty"),
    "binary.txt": (lambda p: p.write_bytes(b"a" * 2**20 + b"b\0c"), "binary.txt is binary, no text: byte 1048577"),
    "latin.txt": (lambda p: p.write_bytes(b"a" * (2**20 - 1) + b"\xc3\xa9\xe9t"), "txt is not UTF-8 at byte 1048577"),
    "half.txt": (lambda p: p.write_bytes("aé".encode()[:-1]), "half.txt is not UTF-8 at byte 1"),
    "false.txt.gz": (lambda p: p.write_bytes(b"text"), "false.txt.gz is not a complete gzip file"),
    "short.txt.gz": (lambda p: p.write_bytes(gzip.compress(b"text")[:-9]), "short.txt.gz is not a complete gzip file"),
    "false.txt.zst": (lambda p: p.write_bytes(b"text"), "false.txt.zst is not a complete zstd file"),
    "short.txt.zst": (lambda p: p.write_bytes(zstd(b"text")[:-3]), "short.txt.zst is not a complete zstd file"),
    "bad.jsonl": (lambda p: p.write_text('{"text": "a"}\n\n{"text": '), "bad.jsonl:3 is no JSON: Expecting value"),
    "control.jsonl": (lambda p: p.write_text('{"a": "\t"}'), "no JSON: Invalid control character at: line 1"),
    "list.jsonl": (lambda p: p.write_text("[1]"), "list.jsonl:1 is no object"),
    "field.jsonl": (lambda p: p.write_text('{"a": "x", "b": 1}'), "jsonl:1 has no field 'text'; it has 'a', 'b'"),
    "deep.jsonl": (lambda p: p.write_text('{"text": ' + "[" * 10**5), "deep.jsonl:1 is no JSON: maximum recursion"),
    "long.jsonl": (lambda p: p.write_text('{"text": "a"}\n' + "1" * 5000), "jsonl:2 is no JSON: Exceeds the limit"),
    "number.jsonl": (lambda p: p.write_text('{"text": 7}'), "number.jsonl:1: the field 'text' is no text but int"),
    "bytes.jsonl": (lambda p: p.write_bytes(b'{"text": "\xff"}'), "can't decode byte 0xff in position 10"),
    "half.jsonl": (lambda p: p.write_text('{"text": "a\\ud83d"}'), "half.jsonl:1: character 1 of the field 'text'"),
    "empty.jsonl": (lambda p: p.write_text('{"text": ""}\n'), "empty.jsonl is empty"),
    "no.parquet": (lambda p: p.write_text("text"), "no.parquet is no parquet file"),
    "field.parquet": (lambda p: _parquet(p, a=["x"], b=[1]), "field.parquet has no field 'text'; it has 'a', 'b'"),
    "number.parquet": (lambda p: _parquet(p, text=[1]), "number.parquet: row 1: the field 'text' is no text but int"),
    "struct.parquet": (lambda p: _parquet(p, text=[{"a": "x"}]), "row 1: the field 'text' is no text but dict"),
    "nested.parquet": (lambda p: _parquet(p, text=[[["x"]]]), "row 1: the field 'text' is no text but list"),
    "twice.parquet": (lambda p: _twice(p), "twice.parquet has 2 fields 'text'"),
    "pages.parquet": (lambda p: _damaged(p), "pages.parquet is no parquet file with text after row 0"),
    "pipe.txt": (lambda p: os.mkfifo(p), "pipe.txt is no regular file but a pipe"),
    "a.txt.xz": (lambda p: p.write_bytes(lzma.compress(b"a")), "a.txt.xz is compressed in a way that is not read"),
    "null.parquet": (lambda p: _parquet(p, text=["a", None]), "row 2: the field 'text' is no text but null"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_named_in_one_line(name, tmp_path):
    make, message = BAD[name]
    if make is not None:
        make(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value)


def test_a_table_that_is_read_as_one_text_is_told(tmp_path, capsys):
    for name in ("a.csv", "b.txt"):
        (tmp_path / name).write_text("id,text\n1,a\n")
        assert len(read(tmp_path / name)) == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{tmp_path / 'a.csv'} is read as one text: rows are documents in .jsonl and .parquet"]


def test_json_lines_are_rows_whatever_their_file_is_called(tmp_path, capsys):
    given = [*texts(3), ODD]
    rows = "\n".join(json.dumps({"id": 1, "body": text}) for text in given)
    for name in ("a.ndjson", "b.json"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(rows.encode()))
    assert read(tmp_path / "*", field="body") == 3 * given
    assert capsys.readouterr().err == ""
    assert read(tmp_path, field="body") == given  # of a folder no .json, which may be settings
    others = f"{tmp_path / 'b.json'}, {tmp_path / 'c.json.gz'}"
    told = f"{tmp_path}: files of other kinds are left out, {others}; those that are named are read\n"
    assert capsys.readouterr().err == told
    for name, other in {"a.json": "[1]\n", "b.json": '{\n"body": 1}', "c.json.gz": rows}.items():
        data = other.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / "*.json*") == ["[1]\n", '{\n"body": 1}', rows]  # as they have no field "text"
    names = ", ".join(str(tmp_path / name) for name in ("a.json", "b.json", "c.json.gz"))
    told = f"{names} are read as one text each: rows are documents in .jsonl and .parquet\n"
    assert capsys.readouterr().err == told


def test_json_lines_may_begin_with_a_long_one_or_a_blank_one(tmp_path):
    long = "x" * 2**20 + ODD
    rows = [json.dumps({"text": text}) for text in (long, ODD)]
    for name, text in {"long.json": "\n".join(rows), "blank.json": "\n \n" + rows[1], "alone.json": rows[0]}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig" if name == "long.json" else "utf-8")
    found = {name: read(tmp_path / f"{name}.json") for name in ("long", "blank", "alone")}
    assert found == {"long": [long, ODD], "blank": [ODD], "alone": [long]}
    (tmp_path / "text.json").write_text("[" + "1, " * 2**19 + "1]")
    assert len(read(tmp_path / "text.json")) == 1


def test_folders_that_a_glob_matches_are_told_of(tmp_path, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "b.txt").write_text("b")
    assert read(tmp_path / "*") == ["a"]
    folder = tmp_path / "deep"
    what = f"{tmp_path}/* is read without the folders that it matches, {folder}; name them too, or use **\n"
    assert capsys.readouterr().err == what
    assert read(tmp_path / "**") == read(tmp_path / "*", folder) == ["a", "b"]
    assert capsys.readouterr().err == ""  # it is told once


def test_a_whole_text_has_no_blank_documents(tmp_path):
    given = texts(3)
    for name, between in {"dense.jsonl": [], "blank.jsonl": ["", " \n"]}.items():
        rows = [json.dumps({"text": text}) for each in given for text in (each, *between)]
        (tmp_path / name).write_text("\n".join(rows))
    tokenizer = train_tokenizer(given, 300)
    found = [whole_text([str(tmp_path / name)], tokenizer) for name in ("dense.jsonl", "blank.jsonl")]
    assert np.array_equal(found[0].tokens, found[1].tokens)
    assert found[0].bytes == found[1].bytes == sum(len(text.encode()) for text in given)


def test_a_whole_text_is_tokenized_in_pieces(tmp_path, monkeypatch):
    """Of a document that is a text of a hundred megabytes tokenizers would need a hundred times as much."""
    (text,) = texts(1)
    (tmp_path / "long.txt").write_text(text)
    tokenizer, pieces = train_tokenizer([text], 300), []

    def noted(tokenizer, batch):
        pieces.extend(len(piece) for piece, _ in batch)
        return tokens.encoded(tokenizer, batch)

    monkeypatch.setattr(tokens, "PIECE", 500)
    monkeypatch.setattr(evaluation_text, "encoded", noted)
    found = whole_text([str(tmp_path / "long.txt")], tokenizer, group_size=1)
    assert len(text) == sum(pieces) == found.bytes
    assert len(text) > 500 >= max(pieces)
    assert tokenizer.decode(found.tokens) == text + str(tokenizer.eos_token)


def test_a_vocabulary_that_cannot_be_trained_is_refused(fresh_cache):
    with pytest.raises(ValueError, match=f"vocab_size must be at most .* not {2**22 + 1}"):
        prepare_text(vocab_size=2**22 + 1)
    assert not fresh_cache.exists()


def test_a_folder_of_which_many_files_are_left_out_says_so(tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("text")
    (tmp_path / "one.bin").write_text("x")
    assert len(files(str(tmp_path))) == 4
    assert capsys.readouterr().err == ""
    (tmp_path / "two").write_text("x")
    for _ in range(2):  # it is looked at several times
        assert len(files(str(tmp_path))) == 4
    told = f"{tmp_path}: files of other kinds are left out, {tmp_path / 'one.bin'}, {tmp_path / 'two'}; those"
    assert capsys.readouterr().err.count(told) == 1


def test_what_this_library_writes_into_a_folder_of_text_is_not_read(tmp_path):
    for name in ("a.py", "inner/b.py", "inner/report.html", "config.yaml", "notes/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    before = files(str(tmp_path))
    assert [path.name for path in before] == ["a.py", "config.yaml", "b.py", "report.html", "metrics.jsonl"]
    run = tmp_path / "runs" / "mine"
    for name in ("config.yaml", "metrics.jsonl", "model/chat.jinja", "checkpoint-3/notes.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    for name in ("compare.json", "report.html", "sweep.json"):
        (tmp_path / "runs" / name).write_text("x")
    (tmp_path / "runs" / "c.py").write_text("text\n")
    assert files(str(tmp_path)) == [*before, tmp_path / "runs" / "c.py"]
    with pytest.raises(ValueError, match="holds no file of a known kind"):
        files(str(run))


def test_a_pattern_of_folders_finds_what_their_folder_would(tmp_path):
    """No link to a folder is followed, of which two in a circle would take for ever, and no run is read."""
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.py", "b/.g/h.txt", "run/config.yaml", "run/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("loop", "b/loop", "b/d/loop"):
        (tmp_path / name).symlink_to(tmp_path)
    for pattern, expected in {
        "**": ["a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.py"],
        "**/*.txt": ["a.txt", "b/c.txt", "b/d/e.txt"],
        "**/d/*": ["b/d/e.txt", "b/d/f.py"],
        "b/**/[ef].*": ["b/d/e.txt", "b/d/f.py"],
        "?/**/d/**/e.txt": ["b/d/e.txt"],
        "b/*": ["b/c.txt"],
    }.items():
        assert files(str(tmp_path / pattern)) == [tmp_path / name for name in expected], pattern
    assert files(str(tmp_path / "loop" / "**" / "c.txt")) == [tmp_path / "loop" / "b" / "c.txt"]  # which is named
    for pattern in ("**/none", "none/**"):
        with pytest.raises(ValueError, match="matches no file"):
            files(str(tmp_path / pattern))


def test_a_link_to_nothing_in_a_folder_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link\.txt is a link to nowhere, which is not there; remove it"):
        read(tmp_path)


def test_a_bad_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(ValueError, match=r"latin\.py is not UTF-8 at byte 2"):
        read(tmp_path)


def test_a_pipe_in_a_folder_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"b\.txt is no regular file but a pipe"):
            read(source)
    with pytest.raises(ValueError, match=r"b\.txt is no regular file but a pipe"):
        fingerprint(f"hf:{tmp_path}", len_of)
    (tmp_path / "b.txt").rename(tmp_path / "image.png")  # of no known kind, and so not read
    assert read(tmp_path) == ["text"]


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="an empty name"):
        read("")
    with pytest.raises(ValueError, match="~nobody-of-this-name: there is no such home"):
        read("~nobody-of-this-name")


def test_a_column_is_found_by_its_whole_name(tmp_path):
    _parquet(tmp_path / "rows.parquet", **{"text.url": ["u", "v"], "text": ["a", "b"]})
    assert read(tmp_path / "rows.parquet") == ["a", "b"]


# Duplicates


def test_exact_and_near_duplicates_are_dropped(work):
    originals = texts()
    near = originals[3] + "\none more line that no other document has"
    found, result = dealt(work, [*originals, originals[5], near, "\n", " ", "short", "a\nb", "b\na\n"])
    assert result.duplicates == 3
    kept = [text for part in found.values() for text in part]
    assert len(kept) == len(set(kept)) == 62
    assert set(originals) - set(kept) <= {originals[3]}  # of it and its near-duplicate one stays
    assert {near, originals[3]} & set(kept)


def test_documents_with_little_in_common_stay(work):
    common = "\n".join(f"this is line {i} of the license" for i in range(8))
    found, result = dealt(work, [f"{common}\n{text}" for text in texts()])
    assert result.duplicates == 0
    assert sum(map(len, found.values())) == 60


def test_a_sketch_sees_lines_and_not_where_parts_begin(tmp_path):
    text = sentences(0, 200).replace("\n", "\r\n").encode()
    (tmp_path / "text").write_bytes(b"..." + text)
    places = np.array([[3, len(text)], [3, 50]])
    whole = duplicates._sketches(tmp_path / "text", places)
    assert (duplicates._sketches(tmp_path / "text", places, part=100) == whole).all()
    assert (whole[0] != whole[1]).any()


def test_documents_from_one_template_are_left_out_and_kept_where_asked(work):
    given = [
        f"<system>\nYou help.\n</system> and now:\n{text}\n<answer>\nThis is it."
        for text in (sentences(i, 1) for i in range(100))
    ]
    left = dealt(work, given)[1]
    assert left.duplicates > 80
    found, kept = dealt(work, [*given, *given[:7]], keep_near=True)
    assert kept.duplicates == 7
    assert sorted(text for part in found.values() for text in part) == sorted(given)


def test_preparing_says_when_many_documents_are_left_out(tmp_path, fresh_cache, capsys):
    own = (sentences(i, 1) for i in range(100))
    rows = [{"text": f"<system>\nYou help.\n</system> and now:\n{text}\n<answer>"} for text in own]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    how = {"vocab_size": 300, "context": 8, "group_size": 2}
    few = prepare_text([str(tmp_path / "chats.jsonl")], **how)
    dropped = few.facts["duplicates_dropped"]
    assert 100 > dropped > 30
    what = f"{dropped} documents are left out, as they equal others or share many lines with them"
    assert what in capsys.readouterr().err
    every = prepare_text([str(tmp_path / "chats.jsonl")], **how, keep_near_duplicates=True)
    assert every.facts["duplicates_dropped"] == 0
    assert sum(every.facts[name]["documents"] for name in ("train", "tuning", "validation")) == 100
    assert "share many lines" not in capsys.readouterr().err
    asked = Options(data=[str(tmp_path / "chats.jsonl")], near_duplicates="keep", model={"vocab_size": "300"})
    kept = merge("MoT-Nano/4E", 0, None, asked).config
    assert kept.prepare().facts["duplicates_dropped"] == 0
    assert "near_duplicates: keep" in str(kept)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(str(kept))
    dropping = merge("MoT-Nano/4E", 0, None, replace(asked, near_duplicates="drop")).config
    with pytest.raises(
        ValueError, match="was started with --near-duplicates keep, now it is drop; give the same flags"
    ):
        check_resumed(tmp_path / "run", dropping)


def test_short_lines_count_where_a_document_has_next_to_nothing_else(work):
    numbers = np.random.default_rng(0).integers(10**5, size=(30, 400))
    given = ["# Readings of a day\n" + "\n".join(map(str, each)) for each in numbers]
    assert dealt(work, given)[1].duplicates == 0
    assert dealt(work, [*given, given[3] + "\n17"])[1].duplicates == 1


def test_sketches_are_the_same_for_ever(tmp_path):
    # Computed by datasketch 2.0.0, before MinHash was written out here: runs are compared where corpus hashes agree.
    (tmp_path / "text").write_bytes(sentences(0, 30).encode() + b"\nshort\n" + bytes(range(1, 256)))
    size = (tmp_path / "text").stat().st_size
    bands = duplicates._sketches(tmp_path / "text", np.array([[0, size], [size - 270, 16]]))
    assert bands[:, [0, 7, 15]].tolist() == [
        [0x40CE1D5D7A77C5AE, 0x9277B4C372A2FF98, 0x850F120D8548F974],
        [0xC72FDC881B3F14A8, 0xF0F9F57BA9C70C7E, 0x2DE21CA6EBABAEEE],
    ]


def test_sketches_of_other_processes_are_the_same(work):
    given = [*texts(200), *texts(50)]
    places, digests = spool(([text.encode()] for text in given), work / "text", None, len_of)
    here, count = duplicates.unlike(work / "text", places, digests, work, len_of)
    chunks: list[int] = []  # the usual size is larger than any test's text
    there, result = duplicates.unlike(work / "text", places, digests, work, chunks.append, chunk=80_000)
    assert len(chunks) > 2
    assert (there.tolist(), result) == (here.tolist(), 50)
    assert count == 50


# Splits


def test_a_corpus_does_not_depend_on_the_order_of_its_documents(work):
    given = [*texts(), texts()[7] + "\nand one line more than that"]
    assert dealt(work, given)[0] == dealt(work, given[::-1])[0]
    assert dealt(work, given)[0] != dealt(work, given[:-2])[0]


def test_splits_share_no_document_and_leave_none_out(work):
    found, result = dealt(work, texts())
    assert {name: len(part) for name, part in found.items()} == {"train": 51, "tuning": 3, "validation": 6}
    assert sorted(text for part in found.values() for text in part) == sorted(texts())
    assert not any(cut.any() for cut in result.cut.values())


def test_a_document_that_is_longer_than_a_held_out_split_is_in_all_of_them(work):
    huge = sentences(99, 9000)
    found, result = dealt(work, [*texts(59), huge])
    assert {name: len(part) for name, part in found.items()} == {"train": 51, "tuning": 4, "validation": 7}
    parts = {name: [text for text in part if text in huge] for name, part in found.items()}
    assert [len(part) for part in parts.values()] == [1, 1, 1]
    places = {name: part[part[:, 1].argmax()] for name, part in result.places.items()}
    assert sum(int(length) for _, length in places.values()) <= len(huge)
    assert places["train"][0] < places["tuning"][0] < places["validation"][0]
    assert int(result.places["train"][:, 1].sum()) > 0.8 * sum(int(p[:, 1].sum()) for p in result.places.values())


def test_held_out_splits_get_enough_documents_to_need_no_segments(work):
    found, _ = dealt(work, texts(300, lines=10), group_size=8)
    assert {name: len(part) for name, part in found.items()} == {"train": 230, "tuning": 30, "validation": 40}


def test_no_document_keeps_more_than_its_share(work):
    long = sentences(99, 1000) + "é" * 999
    found, result = dealt(work, [*texts(1000, lines=10), long])
    assert {name: int(cut.sum()) for name, cut in result.cut.items() if cut.any()} == {"train": 1}
    total = sum(len(text.encode()) for text in found["train"])
    assert max(len(text.encode()) for text in found["train"]) <= total / 80 + 1
    assert any(long.startswith(text) for text in found["train"])


def test_cutting_spares_a_split_that_it_would_ruin(work):
    found, result = dealt(work, [*texts(1000, lines=1), *(sentences(i + 5000, 1000) for i in range(30))])
    assert not result.cut["train"].any()
    assert max(map(len, found["train"])) > sum(map(len, found["train"])) / 80


def test_huge_documents_are_each_divided_however_many(work):
    given = [f"{i}\n" * 400 for i in range(1000, 1024)]
    found, _ = dealt(work, given, group_size=4, held_out=500)  # bytes: half a document
    assert [len(found[name]) for name in ("train", "tuning", "validation")] == [24] * 3
    assert 250 < sum(map(len, found["validation"])) < 1000


def test_few_documents_are_each_divided_at_line_ends(work):
    given = [sentences(0, 1000), sentences(1, 1), "é" * 3000, "\r\n".join(sentences(3, 900).split("\n"))]
    found, result = dealt(work, given)
    assert not any(cut.any() for cut in result.cut.values())
    rebuilt = ["".join(parts) for parts in zip(*(found[name] for name in found), strict=True)]
    assert sorted(rebuilt) == sorted(given)
    sizes = {name: sum(len(text) for text in part) / sum(map(len, given)) for name, part in found.items()}
    assert sizes == pytest.approx({"train": 0.85, "tuning": 0.05, "validation": 0.1}, abs=0.01)
    for number, text in enumerate(rebuilt):
        if text.count("\n") > 500:
            assert found["train"][number].endswith("\n")
            assert found["tuning"][number].endswith("\n")


def test_a_document_is_not_divided_at_a_line_end_of_the_next(work):
    given = ["x" * 40_000, "y\n" * 20_000, "z" * 40_000]
    found, _ = dealt(work, given, held_out=200)  # bytes: less than is searched for a line end
    pieces = [text for part in found.values() for text in part]
    assert [sum(text.count(letter) for text in pieces) for letter in "xyz"] == [40_000, 20_000, 40_000]
    assert all(len(set(text) - {"\n"}) == 1 for text in pieces)


@pytest.mark.parametrize("limit", [1, 2, 5000, 5001, 5002, 5003, 10**9])
def test_no_more_than_max_bytes_are_kept_and_no_character_is_halved(work, limit):
    given = ["漢" * 1000, "x" * 1999, "é🙂" * 1000]
    seen = []

    def some():
        for i, text in enumerate(given):
            seen.append(i)
            yield [text.encode()[:1001], text.encode()[1001:]]

    places, digests = spool(some(), work / "text", limit, len_of)
    whole = "".join(given).encode()
    assert len(digests) == len(places)
    length = int(places[:, 1].sum())
    assert limit - 4 < length <= limit or length == len(whole)
    with opened(work / "text") as file:
        kept = b"".join(os.pread(file, length, offset) for offset, length in places.tolist())
    assert kept == whole[:length]
    assert kept.decode() == "".join(given)[: len(kept.decode())]
    assert seen == [0] or limit > 4000  # nothing is read that is not needed


@pytest.mark.parametrize("largest", [4, 7, 64, 10**6])
def test_text_is_cut_into_pieces_of_whole_characters(tmp_path, largest):
    text = (ODD * 30).encode()
    (tmp_path / "text").write_bytes(b"before" + text + b"after")
    with opened(tmp_path / "text") as file:
        pieces = list(pieces_of(file, 6, len(text), largest))
    assert b"".join(pieces) == text
    assert all(0 < len(piece) <= largest for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == ODD * 30


HUB = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        sha = "def456" if self.path.endswith("/revision/v1") else "abc123"
        body = json.dumps({"id": "some/set", "sha": sha}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from mixture_of_tokens.data.sources import fingerprint
SOURCES = ("hf:some/set:en", "hf:some/set:en@v1", "hf:some/set@v1")
print(*(fingerprint(source, print) for source in SOURCES), sep="; ")
server.shutdown()
server.server_close()
print(*(fingerprint(source, print) for source in SOURCES), sep="; ")
print(*(fingerprint(source, print) for source in ("hf:other/set", "hf:other/set@v1")), sep="; ")
"""


def test_a_text_that_is_scored_whole_is_of_the_newest_commit(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    newest, read_of = ["first"], []

    def load(name, config, split, streaming, revision):
        read_of.append(revision)
        return [{"text": text} for text in texts(7)]

    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *args, **kwargs: SimpleNamespace(sha=newest[0]))
    monkeypatch.setattr("datasets.load_dataset", load)
    tokenizer = load_tokenizer_of(str(tiny_runs["Transformer-Nano"]))
    for newest[0] in ("first", "second"):
        whole_text(["hf:some/set"], tokenizer, context=8, group_size=4)
    assert read_of == ["first", "second"]


def test_a_hub_data_set_is_known_by_its_commit_which_is_remembered_without_a_network(tmp_path):
    environment = {**os.environ, "MIXTURE_OF_TOKENS_CACHE": str(tmp_path), "no_proxy": "*", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True)
    known = "['some/set', 'en', 'abc123']; ['some/set', 'en', 'def456']; ['some/set', '', 'def456']"
    assert done.stdout.splitlines() == [known, known, "['other/set', '', '']; ['other/set', '', 'v1']"]


def test_the_text_under_a_commit_is_that_commits(tmp_path, monkeypatch):
    """Also where another process learns of a newer one between the look-up and the reading."""
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    read_of = []

    def load(name, config, split, streaming, revision):
        read_of.append(revision)
        return [{"text": text} for text in texts(60)]

    def refreshed(source, progress, fingerprint=sources.fingerprint):
        found = fingerprint(source, progress)
        (note,) = (tmp_path / "cache" / "hub").iterdir()
        note.write_text("newer")
        return found

    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *args, **kwargs: SimpleNamespace(sha="older"))
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(sources, "fingerprint", refreshed)
    prepare_text(["hf:some/set"])
    assert read_of == ["older"]


@pytest.mark.parametrize(("status", "told"), [(401, True), (403, True), (404, True), (429, False), (503, False)])
def test_what_the_hub_refuses_is_told_and_what_it_cannot_do_now_is_not(status, told, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    note = tmp_path / "cache" / "hub" / "some--set"
    note.parent.mkdir(parents=True)
    note.write_text("known")

    def refuse(*arguments, **others):
        error = OSError("no")
        vars(error)["response"] = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr("huggingface_hub.dataset_info", refuse)
    if told:
        with pytest.raises(ValueError, match=f"some/set.*{status}"):
            fingerprint("hf:some/set", len_of)
    else:
        assert fingerprint("hf:some/set", len_of)[-1] == "known"


@pytest.mark.parametrize("max_bytes", [None, 20_000])
def test_a_file_that_changes_after_it_was_hashed_is_not_stored_under_that_hash(max_bytes, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts(60)):
        (folder / f"{number}.txt").write_text(text)

    def edited(source, progress, fingerprint=sources.fingerprint):
        found = fingerprint(source, progress)
        (folder / "3.txt").write_text((folder / "3.txt").read_text()[::-1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sources, "fingerprint", edited)
        with pytest.raises(ValueError, match=r"3\.txt was changed"):
            prepare_text([folder], max_bytes=max_bytes)
    assert not list((tmp_path / "cache").glob("tokens-*"))
    prepare_text([folder], max_bytes=max_bytes)
