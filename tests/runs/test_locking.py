"""One writer at a time: the second is refused, and a lock dies with its process."""

import fcntl
import os
import signal
import time
from functools import partial

import pytest
from filelock import FileLock

from mixture_of_tokens.data import prepare
from mixture_of_tokens.runs import locking
from mixture_of_tokens.runs.locking import LOCK, owned, owned_file
from processes import finish, mot, start

NOW = 0.0


def hold(directory, seconds: float) -> None:
    with owned(directory):
        (directory / "held").touch()
        time.sleep(seconds)


def wait_for(path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_second_writer_of_a_directory_is_refused_until_the_first_is_done(tmp_path):
    directory = tmp_path / "run"
    with owned(directory):
        (directory / "metrics.jsonl").touch()
        with pytest.raises(ValueError, match="run is being written by another process"), owned(directory, patience=NOW):
            pass
        with owned(tmp_path / "other", patience=NOW):
            (tmp_path / "other" / "metrics.jsonl").touch()
    with owned(directory, patience=NOW):
        pass
    assert [path.name for path in directory.iterdir()] == ["metrics.jsonl"]


def test_a_directory_to_which_nothing_was_written_is_gone_again(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "was" / "there").mkdir(parents=True)
    with owned(tmp_path / "was" / "there" / "before"):
        pass
    assert (tmp_path / "was" / "there").is_dir()
    with owned_file(tmp_path / "texts.jsonl"):
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f".texts.jsonl{LOCK}"]
    assert not any(path.is_file() for path in tmp_path.iterdir())


def test_a_lock_dies_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    process = start(hold, tmp_path / "run", 600, log=tmp_path / "log")
    wait_for(tmp_path / "run" / "held")
    with pytest.raises(ValueError, match="another process"), owned(tmp_path / "run", patience=NOW):
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    with owned(tmp_path / "run", patience=NOW):
        pass


def test_a_lock_on_a_file_that_is_gone_by_then_is_taken_again(tmp_path, monkeypatch):
    """Its last owner removes it after it was opened and before it is locked."""
    lock, flock, locked = tmp_path / f".file{LOCK}", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not locked:
            lock.unlink()
        locked.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned_file(tmp_path / "file"):
        assert lock.exists()
    assert len(locked) > 1


def contend(owner, path, seconds: float, seen) -> None:
    """Take a lock again and again; the file `inside` stands as long as one process has it."""
    for module in (locking, prepare):
        module.FileLock = partial(FileLock, poll_interval=1e-4)  # in this process alone
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with owner(path):
            os.close(os.open(path.parent / "inside", os.O_CREAT | os.O_EXCL))
            (path.parent / "inside").unlink()
        seen.touch()
        time.sleep(1e-4)


@pytest.mark.parametrize("owner", [owned_file, prepare._one_at_a_time])
def test_a_lock_that_is_removed_at_its_release_still_excludes(owner, tmp_path):
    (tmp_path / "at").mkdir()
    words = [(owner, tmp_path / "at" / "file", 1.0, tmp_path / f"seen-{i}") for i in range(3)]
    processes = [start(contend, *each, log=tmp_path / "log") for each in words]
    assert [finish(process) for process in processes] == [0, 0, 0], (tmp_path / "log").read_text()
    assert all(seen.exists() for *_, seen in words)
    assert list((tmp_path / "at").iterdir()) == []


def test_a_file_that_cannot_be_there_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/out cannot be written: .*; name another --out$"),
        owned_file(tmp_path / "file" / "out"),
    ):
        pytest.fail("there can be no such file")


def test_a_cache_that_cannot_be_there_is_one_line_that_names_its_variable(small_corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "file"))
    what = "prepared text is kept in .*file, which cannot be written: .*; MIXTURE_OF_TOKENS_CACHE names another folder$"
    with pytest.raises(ValueError, match=what):
        prepare.prepare_text([str(small_corpus)], context=64, group_size=32)


def test_the_folder_of_the_cache_may_be_named_from_home(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", "~/kept")
    monkeypatch.chdir(tmp_path)
    made = prepare.prepare_text([str(small_corpus)], context=64, group_size=32)
    assert made.directory.parent == tmp_path / "home" / "kept"
    assert not (tmp_path / "~").exists()


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("command", ["train", "compare", "sweep", "generate"])
def test_what_another_process_writes_to_is_refused(command, tiny_runs, small_corpus, tmp_path, monkeypatch, capsys):
    out, owner = tmp_path / "out", owned_file if command == "generate" else owned
    training = ["--steps", 4, "--batch-size", 32, "--device", "cpu", "--data", small_corpus]
    words = {
        "train": ["Transformer-Nano", *training],
        "compare": ["Transformer-Nano", "MoT-Nano/4E", *training],
        "sweep": ["MoT-Nano/4E", "--learning-rate", "0.01,0.02", *training],
        "generate": [tiny_runs["MoT-Nano/4E/2"], "--prompts-file", small_corpus / "0.txt", "--max-new-tokens", 2],
    }
    with owner(out):
        monkeypatch.setitem(owner.__wrapped__.__kwdefaults__, "patience", NOW)
        with pytest.raises(SystemExit, match="2"):
            mot(command, *words[command], "--out", out)
    error = capsys.readouterr().err
    assert f"{out} is being written by another process: wait for it, or name another --out" in error.splitlines()[-1]
    assert error.count("mot: error:") == 1
    assert f"mot: another process writes to {out}: waiting for 0 s at most" in error
    assert not list(tmp_path.iterdir())


def test_the_next_owner_removes_what_a_killed_one_left_of_its_records(tmp_path):
    left = [tmp_path / f"{name}.123.partial" for name in ("config.yaml", "run.json", "metrics.jsonl")]
    others = [tmp_path / name for name in ("report.html.123.partial", "config.yaml", "mine.partial")]
    for file in (*left, *others):
        file.write_text("a part")
    with owned(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != LOCK) == sorted(p.name for p in others)
