"""A corpus in parts: which files they hold, the rows they give, and training that begins before all are prepared."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixture_of_tokens.data import streaming as module
from mixture_of_tokens.data.groups import collisions
from mixture_of_tokens.data.streaming import PartedBatches, Parts
from mixture_of_tokens.utils.files import write_text
from processes import finish, in_processes, mot, start
from texts import write_texts

GROUP, BATCH = 4, 24
HOW = {"field": "text", "tokenizer": None, "vocab_size": 512, "context": 64, "group_size": GROUP}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts of some blocks each in twelve files, four parts of three."""
    made, texts = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("texts") / "texts"
    write_texts(texts, lines=24)
    texts = sorted(texts.glob("*.txt"), key=lambda path: int(path.stem))
    for number in range(12):
        rows = [json.dumps({"text": path.read_text()}) for path in texts[25 * number : 25 * number + 25]]
        (made / f"{number:02}.jsonl").write_text("\n".join(rows))
    return made


def bytes_of_a_part(folder: Path) -> int:
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    return min(sum(sizes[start : start + 3]) for start in range(0, 12, 3)) - 5000


@pytest.fixture(scope="module")
def parts(folder) -> Parts:
    return Parts.of([str(folder)], bytes_of_a_part(folder), **HOW)


def batches(parts: Parts, steps: int = 100, seed: int = 0, first_step: int = 0) -> PartedBatches:
    sizes = {"group_size": GROUP, "batch_size": BATCH, "mixed": 1}  # of a dense model, which may have any rows
    return PartedBatches(parts, steps=steps, seed=seed, first_step=first_step, **sizes)


def test_every_file_is_in_one_part_in_order(parts, folder):
    assert [[Path(file).name[:2] for file in part] for part in parts.files] == [
        ["00", "01", "02"],
        ["03", "04", "05"],
        ["06", "07", "08"],
        ["09", "10", "11"],
    ]
    assert Parts.of([str(folder)], 1, **HOW).files == [[str(file)] for file in sorted(folder.iterdir())]


def test_a_file_that_is_named_twice_is_in_one_part(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    names = [str(folder), f"{folder.name}/00.jsonl", f"./{folder.name}/0*.jsonl"]
    assert Parts.of(names, 1, **HOW).files == Parts.of([str(folder)], 1, **HOW).files
    assert len(Parts.of([str(folder)], 10**9, **HOW).files) == 1
    size = (folder / "00.jsonl").stat().st_size
    left_over = Parts.of([str(folder)], 5 * size, **HOW).files  # 5 or 6 files, and what is left is less than half of it
    assert sum(map(len, left_over)) == 12
    assert len(left_over[-1]) > 2


@pytest.mark.parametrize(
    ("sources", "size", "message"),
    [
        ([], 10, "--part-bytes is for files: name them"),
        (["packages"], 10, "--part-bytes is for files"),
        (["hf:name"], 10, "--part-bytes is for files"),
        (["x"], 0, "--part-bytes must be positive, not 0"),
        (["nowhere"], 10, "nowhere: there is no such file or folder"),
    ],
)
def test_text_that_is_not_in_files_is_refused(sources, size, message):
    with pytest.raises(ValueError, match=message):
        Parts.of(sources, size, **HOW)


def test_a_file_without_text_is_no_error_in_a_part(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "corpus")
    (tmp_path / "corpus" / "04b.jsonl").write_text("")
    made = Parts.of([str(tmp_path / "corpus")], bytes_of_a_part(folder), **HOW)
    assert sum(map(len, made.files)) == 13
    assert all(len(made.prepare(number).train) for number in range(4))


def test_a_later_part_without_text_is_passed_over(folder, tmp_path):
    files = sorted(folder.iterdir())
    for number, file in enumerate((files[0], None, files[1])):
        text = '{"text": ""}\n' * 1000 if file is None else file.read_text()
        (tmp_path / f"{number}.jsonl").write_text(text)
    made = Parts.of([str(tmp_path)], 5000, **HOW)
    assert list(map(len, made.files)) == [1, 1, 1]
    assert len(made.prepare(1).train) == 0
    rows = len(made.prepare(0).train) // GROUP * GROUP
    assert batches(made).place(rows) == (0, 2, 0)
    with pytest.raises(ValueError, match="there is no text in the corpus"):
        Parts.of([str(tmp_path / "1.jsonl")], 5000, **HOW).first()


def test_a_turn_reads_every_block_of_every_part_once_and_the_next_in_another_order(parts):
    rows, blocks = batches(parts), [parts.prepare(number).train for number in range(4)]
    counts = [len(each) // GROUP * GROUP for each in blocks]
    total = sum(counts)
    ids = torch.cat(
        [rows.__getitems__(list(range(at, min(at + 50, 2 * total))))["input_ids"] for at in range(0, 2 * total, 50)]
    )
    assert rows.rows_of_parts == counts
    place, turns = 0, []
    for turn in range(2):
        orders = []
        for each, count in zip(blocks, counts, strict=True):
            own = ids[place : place + count]
            place += count
            known = {tuple(row): i for i, row in enumerate(each.batch(np.arange(len(each)))["input_ids"].tolist())}
            order = [known[tuple(row)] for row in own.tolist()]
            assert len(set(order)) == count, turn
            assert not collisions(each, np.array(order).reshape(-1, GROUP))
            orders.append(order)
        turns.append(orders)
    assert all(first != second for first, second in zip(*turns, strict=True))
    # Parts share one tokenizer, and text of a later one is what it was.
    tokenizer = parts.prepare(0).tokenizer
    assert parts.prepare(3).facts["tokenizer"] == parts.prepare(0).facts["tokenizer"]
    written = tokenizer.decode(ids[total - 1].tolist())
    assert any(
        written[10:60] in json.loads(line)["text"]
        for file in parts.files[3]
        for line in Path(file).read_text().splitlines()
    )


def test_what_is_measured_of_the_text_is_of_the_first_part_whatever_is_read(parts):
    rows = batches(parts)
    first = rows.blocks
    rows.__getitems__(list(range(len(first), len(first) + 8)))
    assert rows.place(len(first) + 7)[1] == 1
    assert rows.blocks is first


def test_a_part_that_is_too_short_for_groups_is_passed_over(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "corpus")
    short = Path(tmp_path / "corpus" / "99.jsonl")
    text, size = (folder / "00.jsonl").read_text().splitlines(), bytes_of_a_part(folder)
    count = 0
    while count < GROUP:  # blocks: more than a group's rows, and fewer than two groups'
        short.write_text("\n".join([short.read_text(), text.pop()] if short.exists() else [text.pop()]))
        made = Parts.of([str(tmp_path / "corpus")], size, **HOW)
        made = replace(made, files=[made.files[0], [str(short)], *made.files[1:-1]])
        count = len(made.prepare(1).train)
    assert count < 2 * GROUP
    rows = batches(made)
    after = rows.place(rows.rows_of_parts[0])
    assert (rows.rows_of_parts[1], after) == (0, (0, 2, 0))
    rows.__getitems__(list(range(rows.rows_of_parts[0], rows.rows_of_parts[0] + GROUP)))


def test_a_first_part_without_text_to_evaluate_on_is_refused_and_another_is_not(folder, small_corpus, tmp_path, capsys):
    (tmp_path / "00.txt").write_text((small_corpus / "0.txt").read_text()[:200])
    for path in sorted(folder.glob("0[0-2].jsonl")):
        shutil.copy(path, tmp_path / f"1{path.name}")
    flags = ("--data", tmp_path, "--part-bytes", 150, "--model.group_size", GROUP)
    with pytest.raises(SystemExit, match="2"):
        mot("prepare", "MoT-Nano/4E", *flags)
    assert "less than a block of 64: give more text" in capsys.readouterr().err
    (tmp_path / "00.txt").rename(tmp_path / "2.txt")
    (tmp_path / "3.jsonl").write_text(json.dumps({"text": (small_corpus / "1.txt").read_text()}))
    mot("prepare", "MoT-Nano/4E", *flags)
    assert "Part 4 of 5 is ready" in capsys.readouterr().err


def test_rows_of_parts_are_refused_too_where_they_are_no_whole_groups(parts):
    rows = PartedBatches(parts, group_size=GROUP, batch_size=BATCH, steps=100, seed=0)
    assert len(rows.__getitems__(list(range(GROUP, 3 * GROUP)))["input_ids"]) == 2 * GROUP
    with pytest.raises(ValueError, match=f"no whole groups of {GROUP}"):
        rows.__getitems__(list(range(1, GROUP + 1)))


def test_rows_depend_on_seed_and_number_alone(parts):
    rows, others = batches(parts), batches(parts, seed=1)
    numbers = list(range(rows.rows_of_parts[0] - 6, rows.rows_of_parts[0] + 6))  # over the edge of two parts
    whole = rows.__getitems__(numbers)
    halves = [batches(parts).__getitems__(part) for part in (numbers[:7], numbers[7:])]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([half[name] for half in halves]))
    assert not torch.equal(whole["input_ids"], others.__getitems__(numbers)["input_ids"])
    later = batches(parts, first_step=3)
    assert torch.equal(later.__getitems__([2])["input_ids"], rows.__getitems__([2 + 3 * BATCH])["input_ids"])


def test_another_last_part_is_another_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "corpus")
    size = bytes_of_a_part(folder)
    before = Parts.of([str(tmp_path / "corpus")], size, **HOW)
    hashes = {before.first().facts["hash"]}
    with (tmp_path / "corpus" / "11.jsonl").open("a") as file:
        file.write('\n{"text": "one more line"}')
    after = Parts.of([str(tmp_path / "corpus")], size, **HOW)
    assert after.files == before.files
    assert hashes.isdisjoint({after.first().facts["hash"]})


@pytest.mark.parametrize(("machine", "numbers"), [(0, [1, 3, 5]), (1, [2, 4, 6])])
def test_of_two_machines_each_prepares_every_other_part_ahead(machine, numbers, monkeypatch):
    begun = []
    process = SimpleNamespace(start=lambda: None)
    context = SimpleNamespace(Process=lambda args, **options: begun.append(args) or process)
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda way: context)
    monkeypatch.setattr(module, "place_of_machine", lambda: (machine, 2, True))
    module.prepare_ahead(Parts([], [["file"]] * 7, {}), 1, 10, GROUP)
    assert [args[1] for args in begun] == [numbers]


def test_parts_ahead_are_prepared_until_parts_like_them_are_enough(monkeypatch):
    rows, asked = [100, 100, 1000, 100, 100, 100], []

    def prepared(number):
        asked.append(number)
        return SimpleNamespace(train=range(rows[number - 1]))

    module.prepare_needed(SimpleNamespace(prepare=prepared), range(1, 7), 1900, 4)
    assert asked == [1, 2, 3, 4, 5, 6]
    asked.clear()
    module.prepare_needed(SimpleNamespace(prepare=prepared), range(1, 7), 1000, 4)
    assert asked == [1, 2, 3]


def test_a_run_that_goes_on_needs_no_part_that_it_has_left(parts, monkeypatch):
    rows = batches(parts)
    step = (rows.rows_of_parts[0] + 40) // BATCH + 1
    kept = json.loads(json.dumps(rows.position(step)))
    assert len(kept["rows_of_parts"]) == 2
    again, asked = batches(parts), []
    again.go_on_from(kept)
    prepare = Parts.prepare

    def noted(self, number):
        asked.append(number)
        return prepare(self, number)

    monkeypatch.setattr(Parts, "prepare", noted)
    numbers = list(range(step * BATCH, step * BATCH + 8))
    assert torch.equal(again.__getitems__(numbers)["input_ids"], rows.__getitems__(numbers)["input_ids"])
    assert set(asked) <= {1}
    again.go_on_from({})  # of a checkpoint of a run without parts


def command(folder: Path, out: Path, *more: object, steps: int = 30) -> list[str]:
    flags = ["--data", folder, "--part-bytes", bytes_of_a_part(folder), "--steps", steps, "--batch-size", BATCH]
    flags += ["--device", "cpu", "--training.save_steps", 12, "--training.logging_steps", 1, "--out", out]
    return [str(word) for word in ("train", "MoT-Nano/4E", *flags, *more)]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["train_loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


@pytest.mark.slow
def test_a_run_over_parts_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prepare_ahead", lambda *arguments: None)  # a process, which takes its time to start
    whole, again = tmp_path / "whole", tmp_path / "again"
    mot(*command(folder, whole))
    kept = json.loads((whole / "checkpoint-24" / "manifest.json").read_text())["rows_of_parts"]
    assert len(kept) == 2
    assert kept[0] < 24 * BATCH <= sum(kept)
    again.mkdir()
    for name in ("checkpoint-24", "config.yaml", "metrics.jsonl"):
        source = whole / name
        shutil.copytree(source, again / name) if source.is_dir() else shutil.copy(source, again)
    mot(*command(folder, again, "--resume"))
    assert losses(again) == losses(whole)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    facts = json.loads((whole / "run.json").read_text())["corpus"]
    assert facts["parts"] == 4
    assert facts["source"] == [str(folder)]
    mot("evaluate", whole, "--regroupings", 1)  # on the validation text of the first part


@pytest.mark.slow
def test_a_part_that_has_changed_since_it_was_read_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "prepare_ahead", lambda *arguments: None)
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(folder, corpus)
    mot(*command(corpus, run))
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoint-30")
    changed = corpus / "04.jsonl"  # of the second part, in which step 24 lies; with its old size
    text = changed.read_text()
    changed.write_text(text.swapcase().replace('"TEXT"', '"text"').replace("\\N", "\\n"))
    assert changed.stat().st_size == len(text.encode())
    with pytest.raises(SystemExit, match="2"):
        mot(*command(corpus, run, "--resume"))
    assert "04.jsonl, " in (said := capsys.readouterr().err)
    assert "has changed since it was trained on: put it back, or name another directory with --out" in said
    changed.write_text(text)
    mot(*command(corpus, run, "--resume"))
    assert len(losses(run)) == 30


@pytest.mark.slow
def test_training_begins_before_all_is_prepared_and_a_bad_part_is_told_when_it_is_reached(folder, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(folder, corpus)
    (corpus / "04.jsonl").write_bytes(b'{"text": "\xff"}')
    mot(*command(corpus, tmp_path / "run", "--training.report_to", "none", steps=12))
    assert len(losses(tmp_path / "run")) == 12
    with pytest.raises(SystemExit, match="2"):
        mot(*command(corpus, tmp_path / "longer", "--training.report_to", "none"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mot: error")]
    assert len(said) == 1
    assert "04.jsonl:1 is no JSON: 'utf-8' codec can't decode byte" in said[0]
    assert (tmp_path / "longer" / "checkpoint-12").is_dir()


@pytest.mark.slow
def test_processes_prepare_different_parts(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    words = ["prepare", *command(folder, tmp_path / "none")[1:-2]]
    log = tmp_path / "log"
    in_processes(making, (words, str(tmp_path / "made")), 2, log)
    made = [sorted(json.loads(file.read_text())) for file in sorted(tmp_path.glob("made-*"))]
    assert all(made)
    assert len(made[0] + made[1]) == len(set(made[0] + made[1])) == 4  # each once
    said = log.read_text()
    assert said.count(" tokens for training in 4 parts. They are in ") == 1
    assert all(said.count(f"Part {number} of 4 is ready") == 1 for number in (1, 2, 3, 4))
    total = sum(len(Parts.of([str(folder)], bytes_of_a_part(folder), **HOW).prepare(n).train.tokens) for n in range(4))
    assert f"{total:,} tokens" in said
    # All at once, and with flags of the training that decide no text.
    mot("prepare", "MoT-Nano/4E", "--data", folder, "--batch-size", BATCH, "--shard", 8, "--expert-parallel", 4)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 5


def making(words: list[str], out: str) -> None:
    """Saves which entries of the cache this process has made, not waited for."""
    from mixture_of_tokens.data import prepare as preparing

    make, made = preparing._make, []

    def noted(directory, *arguments, **options):
        made.append(directory.name)
        time.sleep(1)  # so that the other one is not done before
        return make(directory, *arguments, **options)

    preparing._make = noted
    mot(*words)
    Path(f"{out}-{os.environ['RANK']}").write_text(json.dumps(made))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_who_prepares_ahead_makes_the_parts_and_ends_with_its_parent(killed, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))

    def made() -> int:
        return len(list((tmp_path / "cache").glob("tokens-*[0-9a-f]")))

    process = start(ahead, str(folder), str(tmp_path / "helper"), log=tmp_path / "log")
    deadline = time.monotonic() + 90
    while not (tmp_path / "helper").exists() or (made() < 4 and not killed):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    helper = int((tmp_path / "helper").read_text())
    while is_running(helper):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (made() < 4) == killed


def is_running(process: int) -> bool:
    """A zombie is not, which nobody has waited for."""
    file = Path(f"/proc/{process}/cmdline")
    try:
        return file.read_bytes() != b""
    except OSError:
        return False


def ahead(folder: str, told: str) -> None:
    parts = Parts.of([folder], bytes_of_a_part(Path(folder)), **HOW)
    parts.first()
    helper: Any = module.prepare_ahead(parts, 1, 10**6, GROUP)
    write_text(Path(told), str(helper.pid))
    time.sleep(120)
