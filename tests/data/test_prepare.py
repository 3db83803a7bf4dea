"""Prepared data: every byte of the text is in the tokens, made once, and never half of it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from mixture_of_tokens import data_report
from mixture_of_tokens.data import prepare as preparing
from mixture_of_tokens.data import tokens
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.data.prepare import prepare_text
from mixture_of_tokens.data.report import EPOCHS, _facts
from mixture_of_tokens.data.splits import SPLITS, Splits, split, spool
from mixture_of_tokens.data.tokenizer import load_tokenizer, train_tokenizer
from mixture_of_tokens.data.tokens import TokenFile, tokenize
from mixture_of_tokens.utils.manifest import hash_of_file
from mixture_of_tokens.utils.progress import say_once
from processes import finish, start
from texts import groups_with_a_document_twice, sentences, texts

END = "<|endoftext|>"
pytestmark = pytest.mark.usefixtures("fresh_cache")


def write(path: Path, given: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
    return str(path)


@pytest.fixture
def source(tmp_path) -> str:
    return write(tmp_path / "rows.jsonl", texts(100))


def decoded(prepared, name: str) -> list[str]:
    tokens, ends = getattr(prepared, name).tokens, np.load(prepared.directory / f"{name}.ends.npy")
    ids = torch.from_numpy(tokens[np.arange(len(tokens))].astype(np.int64))
    return [prepared.tokenizer.decode(part) for part in torch.tensor_split(ids, torch.from_numpy(ends))[:-1]]


def snapshot(cache: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(cache)): (p.stat().st_mtime_ns, p.read_bytes()) for p in cache.rglob("*") if p.is_file()}


# Tokens


def test_the_tokens_hold_every_byte_of_the_text_once(source, tmp_path):
    odd = "naïve  \t<|x|> 漢字\r\n\r\x00end of a line\x0b, 🙂 and <|endoftext|> in it\r\n \n"
    given = [*texts(100), odd + sentences(1000, 40)]
    prepared = prepare_text([write(tmp_path / "odd.jsonl", given)], vocab_size=300, context=16)
    found = [text for name in SPLITS for text in decoded(prepared, name)]
    assert all(text.endswith(END) for text in found)
    assert sorted(text.removesuffix(END) for text in found) == sorted(given)
    for name in SPLITS:
        facts, blocks = prepared.facts[name], getattr(prepared, name)
        own = [text.removesuffix(END) for text in decoded(prepared, name)]
        assert facts["documents"] == len(own)
        assert facts["tokens"] == len(blocks.tokens) == blocks.ends[-1]
        assert facts["bytes"] == blocks.bytes == sum(len(text.encode()) for text in own)
        # The end of text closes documents and stands nowhere else, whatever a text says.
        tokens = blocks.tokens[np.arange(len(blocks.tokens))]
        assert (tokens == prepared.tokenizer.eos_token_id).sum() == len(own)


def test_documents_and_pieces_may_cross_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("mixture_of_tokens.data.tokens.PIECE", 1000)
    monkeypatch.setattr("mixture_of_tokens.data.tokens.BATCH", 5000)
    given = [*texts(50), sentences(77, 600)]
    (tmp_path / "work").mkdir()
    documents = ([text.encode()] for text in given)
    places, digests = spool(documents, tmp_path / "text", None, lambda n: None)
    splits = split(tmp_path / "text", places, digests, group_size=2, work=tmp_path / "work", progress=lambda n: None)
    tokenizer = train_tokenizer(given, 300)
    manifest = tokenize(tmp_path / "text", splits, tokenizer, tmp_path / "work", group_size=2)
    count = 0
    for name in SPLITS:
        path = tmp_path / "work" / f"{name}.tokens"
        tokens = TokenFile(path, "uint16", manifest["facts"][name]["tokens"])
        assert path.stat().st_size == 2 * len(tokens)
        ends = np.load(tmp_path / "work" / f"{name}.ends.npy")
        ids = tokens[np.arange(len(tokens))].astype(np.int64)
        for text in [tokenizer.decode(part) for part in np.split(ids, ends)[:-1]]:
            assert any(whole.startswith(text.removesuffix(END)) for whole in given)
            count += 1
    assert count == 51


def test_a_document_within_its_share_of_bytes_may_be_beyond_it_in_tokens_and_is_cut_again(tmp_path):
    rng = np.random.default_rng(0)
    words = ["whatever", "everybody", "somewhere", "before", "between", "language"]
    prose = [" ".join(rng.choice(words, 60)) + "\n" + sentences(i, 3) for i in range(1200)]
    numbers = " ".join(str(n) for n in rng.integers(0, 10**9, 1000))
    prepared = prepare_text([write(tmp_path / "rows.jsonl", [*prose, numbers])], context=8, group_size=32)
    assert prepared.facts["segments"] == 0
    assert prepared.facts["documents_cut"] >= 1
    assert any(numbers.startswith(text.removesuffix(END)) for name in SPLITS for text in decoded(prepared, name))


def test_a_document_of_which_its_share_of_tokens_leaves_no_character_is_left_out(tmp_path):
    tokenizer = train_tokenizer(["ab"] * 30, 258)
    text = "\n".join(["\u20ac"] + ["ab"] * 120).encode()
    (tmp_path / "text").write_bytes(text)
    places = np.array([[0, 3], *([4 + 3 * number, 2] for number in range(120))], dtype=np.int64)
    none = places[:0]
    cut = {"train": np.zeros(len(places), bool), "tuning": np.zeros(0, bool), "validation": np.zeros(0, bool)}
    splits = Splits({"train": places, "tuning": none, "validation": none}, cut, 0, len(text))
    (tmp_path / "work").mkdir()
    manifest = tokenize(tmp_path / "text", splits, tokenizer, tmp_path / "work", group_size=32)
    ends = np.load(tmp_path / "work" / "train.ends.npy")
    assert manifest["facts"]["train"]["documents"] == len(ends) == 120
    assert manifest["facts"]["train"]["tokens"] == ends[-1] > 0
    assert (np.diff(ends, prepend=0) > 0).all()


# Groups


def test_one_document_of_a_tenth_of_the_corpus_meets_itself_nowhere(tmp_path, capsys):
    given = texts(1000, lines=10)
    given.append(sentences(5000, sum(text.count("\n") + 1 for text in given) // 9))
    prepared = prepare_text([write(tmp_path / "rows.jsonl", given)], context=16)
    assert prepared.facts["documents_cut"] == 1
    kept = sum(prepared.facts[name]["bytes"] for name in SPLITS)
    assert prepared.facts["bytes_cut"] == sum(len(text.encode()) for text in given) - kept > 0
    assert prepared.facts["segments"] == 0
    error = capsys.readouterr().err
    assert "too few documents" not in error
    assert "bytes are cut" not in error
    for epoch in range(5):
        assert not groups_with_a_document_twice(prepared.train, grouped_order(prepared.train, 32, epoch=epoch))
    for name in SPLITS:
        grouped_order(getattr(prepared, name), 32, everything=True)


def test_where_much_of_the_text_is_cut_away_that_is_told_with_the_bytes(tmp_path, capsys):
    given = [*texts(200, lines=10), *(sentences(10**5 + 300 * number, 200) for number in range(10))]
    path = write(tmp_path / "rows.jsonl", given)
    facts = prepare_text([path], context=16).facts
    whole = sum(len(text.encode()) for text in given)
    assert facts["bytes_cut"] == whole - sum(facts[name]["bytes"] for name in SPLITS) > 0.2 * whole
    cut = f"{facts['bytes_cut']:,} of {whole:,} bytes are cut from the ends of documents"
    assert capsys.readouterr().err.count(f"rows.jsonl: {cut}: no document may be more than 1.2% of its split") == 1
    say_once.cache_clear()  # as another process, which reads it from the cache
    assert prepare_text([path], context=16).facts == facts
    assert capsys.readouterr().err == ""


def test_one_file_is_divided_and_its_far_apart_segments_count_as_documents(tmp_path, capsys):
    text = sentences(0, 5000)
    (tmp_path / "one.txt").write_text(text)
    prepared = prepare_text([str(tmp_path / "one.txt")], context=16)
    told = capsys.readouterr().err
    assert all(part in told for part in ("one.txt: ", "groups of 32", f"{prepared.facts['segments']:,} segments"))
    assert told.count("\n") == 1
    say_once.cache_clear()  # as another process
    assert prepare_text([str(tmp_path / "one.txt")], context=16).facts == prepared.facts
    assert capsys.readouterr().err == ""
    assert prepared.facts["documents_cut"] == 0
    assert "".join("".join(decoded(prepared, name)).removesuffix(END) for name in SPLITS) == text
    for blocks in (prepared.train, prepared.validation):
        nearest = len(blocks)
        for order in (grouped_order(blocks, 32, epoch=3), grouped_order(blocks, 32, everything=True)):
            number = np.sort(np.where(order < 0, -len(blocks) * np.arange(1, 33), order), axis=1)
            nearest = min(nearest, np.diff(number, axis=1).min())
        assert nearest > len(blocks) // 32 // 2


def test_little_text_works_as_far_as_it_can(tmp_path, capsys):
    (tmp_path / "little.txt").write_text(sentences(0, 200))
    prepared = prepare_text([str(tmp_path / "little.txt")], context=8)
    assert len(prepared.train) >= 64
    grouped_order(prepared.train, 32)
    grouped_order(prepared.validation, 32, everything=True)
    assert "segments" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the validation split has \d+ tokens, less than a block of 1000"):
        prepare_text([str(tmp_path / "little.txt")], context=1000)
    (tmp_path / "twins.jsonl").write_text(1000 * (json.dumps({"text": sentences(0, 8)}) + "\n"))
    with pytest.raises(ValueError, match=r"give more text \(999 documents were dropped as duplicates\)"):
        prepare_text([str(tmp_path / "twins.jsonl")], context=64)
    assert capsys.readouterr().err == ""  # what has no text for training has an error alone
    (tmp_path / "line.txt").write_text("one line\n")
    tiny = prepare_text([str(tmp_path / "line.txt")], context=1)  # its tuning split is shorter than a block
    assert len(tiny.tuning) == 0
    with pytest.raises(ValueError, match="0 blocks of 1 tokens"):
        grouped_order(tiny.tuning, 32)
    assert "segments" in capsys.readouterr().err


# Cache


def test_preparing_again_reads_the_cache(source, fresh_cache, tmp_path):
    first = prepare_text([source], vocab_size=300, context=16)
    before = snapshot(fresh_cache)
    again = prepare_text([source], vocab_size=300, context=16, group_size=16)
    assert prepare_text([source], vocab_size=300, context=8).train.context == 8
    (tmp_path / "elsewhere").mkdir()
    moved = prepare_text([shutil.copy(source, tmp_path / "elsewhere" / "name.jsonl")], vocab_size=300, context=16)
    assert snapshot(fresh_cache) == before
    assert first.facts == again.facts == {**moved.facts, "source": [source]}
    assert not [name for name in before if ".partial" in name]


def test_another_text_or_option_is_prepared_anew(source, fresh_cache, tmp_path):
    base = {"vocab_size": 300, "context": 16}
    hashes = {prepare_text([source], **base).facts["hash"]}
    longer = write(tmp_path / "longer.jsonl", texts(101))
    for given, options in [([longer], {}), ([source, longer], {}), ([source], {"max_bytes": 90_000})]:
        hashes.add(prepare_text(given, **base | options).facts["hash"])
    prepare_text([source], **base | {"vocab_size": 301})
    prepare_text([source], **base | {"group_size": 48})
    assert len(hashes) == 3  # of `source` and `longer` together the duplicates go, and `longer` is left
    assert len(list(fresh_cache.glob("tokens-*/manifest.json"))) == 6


def test_another_field_kind_of_file_or_tokenizer_is_prepared_anew(tmp_path, fresh_cache):
    rows = tmp_path / "rows.jsonl"
    fields = zip(texts(100), texts(200)[100:], strict=True)
    rows.write_text("".join(json.dumps({"text": text, "body": body}) + "\n" for text, body in fields))
    base, one_text = {"vocab_size": 300, "context": 16}, shutil.copy(rows, tmp_path / "rows.txt")
    given = [(rows, {}), (rows, {"field": "body"}), (one_text, {})]
    assert len({prepare_text([str(file)], **base | options).facts["hash"] for file, options in given}) == 3
    directories = set()
    for seed in range(2):
        train_tokenizer([sentences(seed, 500)], 300).save_pretrained(tmp_path / str(seed))
        options = {"tokenizer": str(tmp_path / str(seed)), "vocab_size": None}
        directories.add(prepare_text([str(rows)], **base | options).directory)
    assert len(directories) == 2


def flip(path: Path, place: int = -1) -> None:
    """Change a byte, and neither the size nor the time of change."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


ALTERED, SHORT = "is not what was written: the prepared", "is not what was written: it has "
DAMAGE = {
    "tokens are missing": (Path.unlink, "train.tokens", "is missing: the prepared"),
    "tokens are short": (lambda p: os.truncate(p, p.stat().st_size - 2), "train.tokens", SHORT),
    "a token is another": (flip, "train.tokens", ALTERED),
    "a document ends elsewhere": (flip, "tuning.ends.npy", ALTERED),
    "the head of an array is broken": (lambda p: flip(p, 3), "train.ends.npy", ALTERED),
    "a word of the tokenizer is another": (lambda p: flip(p, 3000), "tokenizer.json", ALTERED),
    "no manifest": (Path.unlink, "manifest.json", "is missing: the prepared"),
    "an empty manifest": (lambda p: p.write_text(""), "manifest.json", ALTERED),
    "a manifest of another kind": (lambda p: p.write_text("[]"), "manifest.json", ALTERED),
    "a deep manifest": (lambda p: p.write_text("[" * 10**5), "manifest.json", ALTERED),
    "another count in the manifest": (
        lambda p: p.write_text(p.read_text().replace('"documents_cut": 0', '"documents_cut": 1')),
        "manifest.json",
        ALTERED,
    ),
    "no files in the manifest": (
        lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"files": {}})),
        "manifest.json",
        ALTERED,
    ),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def entry(tmp_path_factory) -> Path:
    """A cache with one entry, and the text that it is made of beside it."""
    base = tmp_path_factory.mktemp("entry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(base / "cache"))
        prepare_text([write(base / "rows.jsonl", texts(60))], vocab_size=300, context=16)
    return base


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_named_and_made_again(entry, tmp_path, fresh_cache, monkeypatch, damage, capsys):
    shutil.copytree(entry / "cache", fresh_cache)
    monkeypatch.setattr("mixture_of_tokens.data.prepare._HASHED", {})
    (directory,) = fresh_cache.glob("tokens-*[0-9a-f]")
    before = contents(directory)
    harm, name, message = DAMAGE[damage]
    harm(directory / name)
    assert contents(directory) != before
    prepare_text([str(entry / "rows.jsonl")], vocab_size=300, context=16)
    error = capsys.readouterr().err
    assert error.startswith(f"{directory} is damaged: {name} {message}")
    assert "the prepared text is made again.\n" in error
    assert contents(directory) == before


def test_an_entry_is_checked_once_in_a_process_unless_it_changes(entry, fresh_cache, monkeypatch, capsys):
    shutil.copytree(entry / "cache", fresh_cache)
    hashed: list[str] = []
    for module in ("data.sources", "utils.manifest"):
        where = f"mixture_of_tokens.{module}.hash_of_file"
        monkeypatch.setattr(where, lambda path, read: hashed.append(path.name) or hash_of_file(path, read))
    monkeypatch.setattr("mixture_of_tokens.data.prepare._HASHED", {})

    def again() -> set[str]:
        hashed.clear()
        directory = prepare_text([str(entry / "rows.jsonl")], vocab_size=300, context=16).directory
        assert set(hashed) - {"rows.jsonl"} <= {path.name for path in directory.iterdir()}
        return set(hashed) - {"rows.jsonl"}

    (directory,) = fresh_cache.glob("tokens-*[0-9a-f]")
    assert again() == {path.name for path in directory.iterdir()} - {"manifest.json"}
    assert again() == set()
    os.utime(directory / "train.tokens", ns=(1, 1))
    assert again() == {"train.tokens"}
    shutil.copy2(directory / "train.tokens", fresh_cache / "other")  # of the same size and time
    (fresh_cache / "other").rename(directory / "train.tokens")
    assert again() == {"train.tokens"}
    assert "made again" not in capsys.readouterr().err
    (directory / "train.tokens").unlink()
    assert again() == set(contents(directory)) - {"manifest.json"}  # hashed as they are made
    assert again() == set()


def test_an_entry_is_on_the_disk_before_it_has_its_name(source, fresh_cache, monkeypatch):
    flushed = []
    monkeypatch.setattr("mixture_of_tokens.utils.files.flush", lambda path: flushed.append(path.name))
    assert set(contents(prepare_text([source], vocab_size=300, context=16).directory)) < set(flushed)


def test_what_killed_processes_leave_of_other_texts_goes_too(source, fresh_cache):
    fresh_cache.mkdir()
    for name in ("tokens-1.partial", "tokens-2.partial"):
        (fresh_cache / name).mkdir()
        (fresh_cache / name / "text").write_text("half")
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n  print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, fresh_cache / "tokens-2.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:  # ends with its input
        busy.stdout.readline()
        (fresh_cache / "tokens-3.lock").touch()
        made = prepare_text([source], vocab_size=300, context=16).directory
        left = {path.name for path in fresh_cache.iterdir()}
        assert left == {"tokens-2.partial", "tokens-2.lock", made.name}


def slowly(source: str) -> None:
    """So slow that it is not done before it is killed."""
    encoded, preparing.TRAINING_BYTES, tokens.BATCH = tokens.encoded, 10**5, 1
    tokens.encoded = lambda *arguments: (time.sleep(0.05), encoded(*arguments))[1]
    print(prepare_text([source], vocab_size=300, context=16).facts["hash"], flush=True)


def test_what_a_killed_process_leaves_is_thrown_away(source, fresh_cache, tmp_path, monkeypatch):
    killed = start(slowly, source, log=tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list(fresh_cache.glob("*.partial/train.tokens")):
        assert killed.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    assert finish(killed) == -signal.SIGKILL
    (left,) = fresh_cache.glob("*.partial")
    assert not list(fresh_cache.glob("tokens-*/manifest.json"))
    (left / "train-00007.tokens").write_bytes(b"what an older one has left")
    after = prepare_text([source], vocab_size=300, context=16)
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "fresh"))
    fresh = prepare_text([source], vocab_size=300, context=16)
    assert list(fresh_cache.iterdir()) == [after.directory]
    assert after.facts == fresh.facts
    files = [{p.name: p.read_bytes() for p in prepared.directory.iterdir()} for prepared in (after, fresh)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_of_two_at_once_one_works_and_the_other_waits(source, fresh_cache, tmp_path):
    logs = [tmp_path / "one", tmp_path / "other"]
    both = [start(slowly, source, log=log) for log in logs]
    assert [finish(process) for process in both] == [0, 0]
    said = [log.read_text() for log in logs]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert sorted("waiting for it" in each for each in said) == [False, True]
    (made,) = fresh_cache.iterdir()
    assert (made / "manifest.json").is_file()


def on_full_disks(source: str, told: str) -> None:
    """Too small for the text, and then for the tokenizer; appends what is told of each to a file."""
    said = []
    for size in (10, 1000, 10_000, 50_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            prepare_text([source], vocab_size=2000, context=16)
            said.append("worked")
        except OSError as error:
            said.append(" ".join(str(error).split()))
    Path(told).write_text("\n".join(said))


def test_a_full_disk_is_an_error_that_names_the_cache_and_leaves_nothing(tmp_path, fresh_cache):
    source = write(tmp_path / "rows.jsonl", [sentences(0, 600)])
    assert finish(start(on_full_disks, source, str(tmp_path / "told"), log=tmp_path / "log")) == 0
    said = (tmp_path / "told").read_text().splitlines()
    assert len(said) == 5
    assert all(str(fresh_cache) in line for line in said), said
    assert any("[Errno 27] File too large" in line for line in said)
    assert any("the tokenizer cannot be written" in line for line in said)
    assert list(fresh_cache.iterdir()) == []


# Tokenizers


def test_tokenizer_gives_any_bytes_back():
    tokenizer = train_tokenizer([sentences(0, 50)], 300)
    text = "naïve  \t<|x|> 漢字\r\n\x00 end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_a_vocabulary_without_room_for_the_bytes_is_refused(source):
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["text"], 200)
    with pytest.raises(ValueError, match="at least 257"):
        prepare_text([source], vocab_size=256)


def test_a_tokenizer_is_taken_from_a_file_or_folder(source, tmp_path):
    trained = train_tokenizer([sentences(1, 500)], 400)
    trained.backend_tokenizer.enable_truncation(5)  # many a tokenizer.json holds one, which must not cut documents
    trained.save_pretrained(tmp_path / "folder")
    shutil.copy(tmp_path / "folder" / "tokenizer.json", tmp_path / "alone.json")
    places = [tmp_path / "folder", tmp_path / "folder" / "tokenizer.json", tmp_path / "alone.json"]
    found = [prepare_text([source], context=16, tokenizer=str(place), vocab_size=None) for place in places]
    assert found[0].facts == found[1].facts == found[2].facts
    assert len(found[0].tokenizer) == 400
    assert found[0].tokenizer.padding_side == "left"
    assert sum(prepared.facts["train"]["bytes"] for prepared in found) / 3 > 80_000
    assert sorted(t.removesuffix(END) for name in SPLITS for t in decoded(found[2], name)) == sorted(texts(100))
    for enough in ({}, {"vocab_size": 500}):
        assert prepare_text([source], context=16, tokenizer=str(places[0]), **enough).facts == found[0].facts
    with pytest.raises(ValueError, match=r"vocab_size 399 is less than the 400 ids of .*folder"):
        prepare_text([source], context=16, tokenizer=str(places[0]), vocab_size=399)


def test_a_vocabulary_has_room_for_the_greatest_id_of_a_tokenizer(source, tmp_path):
    train_tokenizer([sentences(1, 500)], 400).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["model"]["vocab"]["unheard-of"] = 600
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="vocab_size 500 is less than the 601 ids of"):
        prepare_text([source], context=16, tokenizer=str(file), vocab_size=500)
    assert len(prepare_text([source], context=16, tokenizer=str(file), vocab_size=601).train)


def test_a_large_vocabulary_takes_four_bytes_a_token(source, tmp_path):
    words = {END: 70_000} | {word: i for i, word in enumerate(dict.fromkeys(" ".join(texts(100)).split()), 60_000)}
    bare = Tokenizer(
        models.WordLevel({"[UNK]": 0} | {w: i for w, i in words.items() if w != END} | {END: 90_000}, "[UNK]")
    )
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.save(str(tmp_path / "words.json"))
    prepared = prepare_text([source], context=16, tokenizer=str(tmp_path / "words.json"), vocab_size=None)
    assert prepared.facts["dtype"] == "uint32"
    assert prepared.train.tokens[prepared.train.ends - 1].tolist() == [90_000] * len(prepared.train.ends)


@pytest.mark.parametrize("lossy", [False, True])
def test_a_tokenizer_that_does_not_keep_text_is_said(source, tmp_path, capsys, lossy):
    trained = train_tokenizer([sentences(1, 500)], 400)
    if lossy:
        trained.backend_tokenizer.normalizer = normalizers.Replace("e", "E")
    trained.backend_tokenizer.save(str(tmp_path / "given.json"))
    said = []
    for _ in range(2):  # also of what is in the cache
        say_once.cache_clear()
        made = prepare_text([source], context=16, tokenizer=tmp_path / "given.json")
        said.append(capsys.readouterr().err)
    for each in said:
        told = re.search(r"given\.json does not keep text as it is: 'e.*' becomes 'E.*'\. Bits a byte", each)
        assert bool(told) is ("does not keep" in each) is lossy
    assert "altered" not in made.facts


def test_bad_tokenizers_are_refused_in_one_line(tmp_path, source, monkeypatch, capsys):
    (tmp_path / "false.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    bare = Tokenizer(models.BPE({"a": 0}, []))
    bare.save(str(tmp_path / "endless.json"))
    for name, message in [("false.json", "is no tokenizer"), ("endless.json", "names no end-of-text token: call it")]:
        with pytest.raises(ValueError, match=rf"{name} {message}") as raised:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    for name in ("empty", "missing.json"):
        with pytest.raises(ValueError, match=rf"^tokenizer .*{name}: there is no"):
            prepare_text([source], tokenizer=str(tmp_path / name))

    def refused(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refused)
    with pytest.raises(ValueError, match=r"nosuch: there is no such file, and as a name on the Hub .*: no connection"):
        load_tokenizer("nosuch")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="an empty name"):
        load_tokenizer("")


def test_a_tokenizer_that_cannot_encode_is_named(tmp_path, source):
    bare = Tokenizer(models.WordLevel({END: 0}, "[UNK]"))  # its word for unknown ones is not in it
    bare.save(str(tmp_path / "lacking.json"))
    with pytest.raises(ValueError, match=r"the tokenizer .*lacking\.json cannot encode the text: ") as raised:
        prepare_text([source], tokenizer=str(tmp_path / "lacking.json"), vocab_size=None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"context": 0}, {"group_size": 0}, {"max_bytes": -1}])
def test_sizes_must_be_positive(source, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        prepare_text([source], **options)


def test_nothing_is_left_of_bad_data(tmp_path, fresh_cache):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2 has no field 'text'"):
        prepare_text([str(tmp_path / "bad.jsonl")])
    assert list(fresh_cache.iterdir()) == []


def test_hub_data_in_a_local_folder_is_prepared_and_cached(tmp_path, fresh_cache):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", texts(100))
    prepared = prepare_text([f"hf:{tmp_path / 'set'}"], context=16)
    assert prepared.facts["hash"] == prepare_text([str(tmp_path / "set" / "train.jsonl")], context=16).facts["hash"]
    before = snapshot(fresh_cache)
    prepare_text([f"hf:{tmp_path / 'set'}"], context=16)
    assert snapshot(fresh_cache) == before
    limited = prepare_text([f"hf:{tmp_path / 'set'}"], context=16, max_bytes=50_000).facts
    assert 49_990 < sum(limited[name]["bytes"] for name in SPLITS) <= 50_000


# Report and memory


def test_the_report_says_what_is_in_the_data(source, tmp_path):
    given = [*texts(400), texts(1)[0], sentences(9999, 5000)]
    path = write(tmp_path / "rows.jsonl", given)
    report = json.loads(data_report(path, context=16).to_json())
    facts = prepare_text([path], context=16).facts
    assert (report["hash"], report["duplicates_dropped"], report["documents_cut"]) == (facts["hash"], 1, 1)
    for name in SPLITS:
        shown = report["splits"][name]
        assert {key: shown[key] for key in ("documents", "tokens", "bytes")} == facts[name]
        assert shown["collisions"] == 0
    lines = str(data_report(path, context=16)).splitlines()
    assert lines[0].split() == list(SPLITS)
    assert ["collisions", "0", "0", "0"] in [line.split() for line in lines]
    assert "duplicates dropped: 1" in lines


def test_the_report_counts_the_blocks_of_documents_and_those_that_meet_their_own():
    """A block's last target belongs to it, so most documents begin in the block before."""
    lengths = [4, 4, 4, 12, 1]  # in blocks 0, 0 to 1, 1 to 2, 2 to 5, and 5
    blocks = Blocks(np.zeros(25, dtype=np.uint16), np.cumsum(lengths), 4, 50)
    found = _facts(blocks, {"documents": 5, "tokens": 25, "bytes": 50}, group_size=3)
    assert (found["blocks per document, median"], found["blocks per document, most"]) == (2, 4)
    assert (found["blocks"], found["groups"], found["bytes per token"]) == (6, 2, 2)
    huge = _facts(blocks, {"documents": 5, "tokens": 25, "bytes": 50}, group_size=2**60)  # takes no more memory
    assert huge == _facts(blocks, {"documents": 5, "tokens": 25, "bytes": 50}, group_size=blocks.total) | {"groups": 0}
    alone = Blocks(np.zeros(65, dtype=np.uint16), np.array([65]), 4, 65)  # four groups of four blocks of one document
    found = _facts(alone, {"documents": 1, "tokens": 65, "bytes": 65}, group_size=4)
    assert found["collisions"] == (EPOCHS + 1) * 4 * 3
    divided = Blocks.of(alone.tokens, alone.ends, context=4, group_size=4, bytes=65)
    found = _facts(divided, {"documents": 1, "tokens": 65, "bytes": 65}, group_size=4)
    assert found["collisions"] == 0
    assert found["rows beside another part of their document"] == 0.75  # all but one of each group
    assert found["tokens between the two, at least"] == 8  # half of a stripe of four blocks


MEMORY = """
import resource, sys, torch, transformers
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.data.prepare import prepare_text
def peak():
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
imports = peak()
prepared = prepare_text([sys.argv[1]])
rows = GroupedBatches(prepared.train, group_size=32, batch_size=256, steps=10**5, seed=0)
for step in range(0, len(prepared.train) // 256):
    rows.__getitems__(list(range(256 * step, 256 * step + 256)))
print(peak() - imports, prepared.facts["train"]["tokens"])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(sentences(0, 2000).split())
    with (tmp_path / "rows.jsonl").open("w") as file:
        while file.tell() < 150e6:
            picked = words[(rng.random(1500) ** 2 * len(words)).astype(int)]
            text = "\n".join(" ".join(picked[i : i + 10]) for i in range(0, 1500, 10))
            file.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, "-c", MEMORY, tmp_path / "rows.jsonl"]
    megabytes, tokens = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(tokens) > 5e7
    assert float(megabytes) < 150  # measured 72; the text alone would be 150 more, the tokens 106


def test_a_report_refuses_a_vocabulary_that_the_tokenizer_exceeds(source, tmp_path):
    train_tokenizer([sentences(1, 500)], 400).backend_tokenizer.save(str(tmp_path / "given.json"))
    with pytest.raises(ValueError, match=r"vocab_size 300 is less than the 400 ids of .*given\.json"):
        data_report(source, tokenizer=str(tmp_path / "given.json"), vocab_size=300)
