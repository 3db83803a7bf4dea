"""Directories that are whole or not there, and manifests."""

import errno
import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from mixture_of_tokens import disk
from mixture_of_tokens.model import sharding
from mixture_of_tokens.runs import checkpoints


def written(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "file").write_text(text)
    checkpoints.describe(directory, of="test")
    return directory


def test_a_directory_gets_its_name_and_what_had_it_goes(tmp_path):
    final = written(tmp_path / "final", "old")
    checkpoints.publish(written(tmp_path / "beside", "new"), final)
    assert (final / "file").read_text() == "new"
    assert checkpoints.fault(final) is None
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_has_the_name_is_whole_until_the_new_one_has_it(tmp_path, monkeypatch):
    final, beside = written(tmp_path / "final", "old"), written(tmp_path / "beside", "new")
    rename = Path.rename

    def interrupted(path: Path, target: Path):
        if path == beside:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.publish(beside, final)
    assert (final / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "final"]


def test_a_manifest_tells_what_has_changed(tmp_path):
    directory = written(tmp_path / "one", "text")
    assert checkpoints.damage(directory) is None
    (directory / "other").write_text("more is no damage")
    assert checkpoints.damage(directory) is None
    (directory / "file").write_text("texT")
    assert checkpoints.damage(directory) == "file is not what was written"
    (directory / "file").unlink()
    assert checkpoints.damage(directory) == "file is missing"
    assert checkpoints.is_described(directory, "test")
    assert not checkpoints.is_described(directory, "other")


@pytest.mark.parametrize("foreign", ['{"name": "an app"}', '{"files": ["a", "b"]}', '{"files": {"a": 1}}', "[]", "{"])
def test_a_manifest_of_other_software_says_nothing(foreign, tmp_path):
    (tmp_path / checkpoints.MANIFEST).write_text(foreign)
    assert checkpoints.damage(tmp_path) is None
    assert not checkpoints.is_described(tmp_path, "test")
    assert checkpoints.fault(tmp_path) == f"its {checkpoints.MANIFEST} cannot be read"  # which no resumption accepts


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(Exception("No space left"), OSError), (RuntimeError("full"), OSError), (KeyError("x"), KeyError)],
    ids=repr,
)
def test_what_libraries_raise_on_a_full_disk_is_an_oserror(raised, seen, tmp_path):
    with pytest.raises(seen), disk.plain_errors(tmp_path / "final"):
        raise raised


def checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "file").write_text("text")
    facts = {"step": 8, "seconds": 12.25, "reported": [[1.5, None], [0.1, 1e-7]], "corpus": "5ca1ab1e feed"}
    checkpoints.describe(directory, **facts)
    return directory


def test_a_flipped_bit_anywhere_in_a_manifest_is_a_fault_or_changes_nothing(tmp_path):
    directory = checkpoint(tmp_path / "checkpoint-8")
    manifest = directory / checkpoints.MANIFEST
    before, noticed = manifest.read_bytes(), 0
    expected = json.loads(before)
    for place in range(len(before)):
        for bit in (place % 8, 5):  # of a letter the sixth bit is its case
            flipped = bytearray(before)
            flipped[place] ^= 1 << bit
            manifest.write_bytes(flipped)
            if checkpoints.fault(directory) is None:
                assert json.loads(manifest.read_bytes()) == expected
            else:
                assert checkpoints.damage(directory) is not None
                noticed += 1
    assert noticed > 1.5 * len(before)  # white space may become other white space
    manifest.write_bytes(before)
    assert checkpoints.fault(directory) is None


def test_a_checkpoint_of_another_step_or_that_lost_its_digest_is_passed_over(tmp_path, capsys):
    older, newer = (checkpoint(tmp_path / name) for name in ("checkpoint-8", "checkpoint-16"))
    assert checkpoints.newest(tmp_path) == older
    assert "checkpoint-16 is skipped: its manifest.json is of step 8" in capsys.readouterr().err
    content = json.loads((newer / checkpoints.MANIFEST).read_text()) | {"step": 16}
    del content["digest"]
    (newer / checkpoints.MANIFEST).write_text(json.dumps(content))
    assert checkpoints.newest(tmp_path) == older
    assert "checkpoint-16 is skipped: its manifest.json is not what was written" in capsys.readouterr().err


def test_a_manifest_of_no_files_is_refused(tmp_path):
    directory = tmp_path / "checkpoint-8"
    directory.mkdir()
    checkpoints.describe(directory, step=8)
    for problem in (checkpoints.fault(directory), checkpoints.damage(directory)):
        assert problem == "its manifest.json lists no files"


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writes in (disk, checkpoints):
        monkeypatch.setattr(writes, "flush", full)
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(OSError, match=r"report\.html could not be written: No space left on device"):
        disk.write_text(tmp_path / "report.html", "after")
    with pytest.raises(OSError, match=r"final could not be written: No space left on device"):
        checkpoints.publish(written(tmp_path / "beside", "new"), tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "report.html"]
    assert (tmp_path / "report.html").read_text() == "before"
    with pytest.raises(OSError, match=r"missing/a\.json could not be written: No such file or directory"):
        disk.write_text(tmp_path / "missing" / "a.json", "text")


def test_torch_s_words_for_a_full_disk_are_the_system_s(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        def flush(self):
            pass

    internal = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    with (
        pytest.raises(OSError, match="optimizer could not be written: File too large"),
        disk.plain_errors(tmp_path / "optimizer"),
    ):
        torch.save({"a": torch.zeros(9)}, Full())
    with (
        pytest.raises(OSError, match="optimizer could not be written: No space left on device"),
        disk.plain_errors(tmp_path / "optimizer"),
    ):
        raise RuntimeError(internal)

    def full(*arguments):
        raise CheckpointException("failed", {0: (RuntimeError(internal), traceback.StackSummary())})

    nothing: Any = None
    monkeypatch.setattr(sharding, "save_optimizer_distributed", full)
    with (
        pytest.raises(OSError, match="checkpoint-4 could not be written: No space left on device"),
        disk.plain_errors(tmp_path / "checkpoint-4"),
    ):
        sharding.save_optimizer(nothing, nothing, tmp_path)


def test_only_a_disk_s_errors_get_a_name(tmp_path):
    with pytest.raises(BrokenPipeError), disk.disk_errors(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
