"""Directories that are whole or not there, and manifests."""

import errno
import hashlib
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from mixture_of_tokens.parallel import optimizer_state
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.utils import files, manifest


def written(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "file").write_text(text)
    manifest.write(directory, of="test")
    return directory


def test_a_directory_gets_its_name_and_what_had_it_goes(tmp_path):
    final = written(tmp_path / "final", "old")
    files.publish(written(tmp_path / "beside", "new"), final)
    assert (final / "file").read_text() == "new"
    assert manifest.fault(final) is None
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
        files.publish(beside, final)
    assert (final / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "final"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    beside, done, rename = written(tmp_path / "beside", "new"), [], Path.rename
    (beside / "below").mkdir()
    (beside / "below" / "file").touch()
    monkeypatch.setattr(files, "flush", done.append)
    monkeypatch.setattr(Path, "rename", lambda path, target: done.append("renamed") or rename(path, target))
    made = {beside, *beside.rglob("*")}
    files.publish(beside, tmp_path / "final")
    assert set(done[:-2]) == made
    assert done[-2:] == ["renamed", tmp_path]


def test_a_manifest_tells_what_has_changed(tmp_path):
    directory = written(tmp_path / "one", "text")
    assert manifest.damage(directory) is None
    (directory / "other").write_text("more is no damage")
    assert manifest.damage(directory) is None
    (directory / "file").write_text("texT")
    assert manifest.damage(directory) == "file is not what was written"
    (directory / "file").unlink()
    assert manifest.damage(directory) == "file is missing"
    assert manifest.is_of(directory, "test")
    assert not manifest.is_of(directory, "other")


def test_every_file_of_a_folder_is_in_its_manifest(tmp_path):
    directory = tmp_path / "one"
    files = [directory / name for name in ("file", ".hidden", "below/file", "below/.hidden")]
    (directory / "below").mkdir(parents=True)
    for file in files:
        file.write_text("text")
    manifest.write(directory)
    for file in files:
        file.write_text("texT")
        assert manifest.fault(directory) == f"{file.relative_to(directory)} is not what was written"
        file.write_text("text")
    assert manifest.fault(directory) is None


def test_a_hash_is_of_the_whole_file_and_tells_how_far_it_is(tmp_path):
    content, read = bytes(range(251)) * 10_000, []
    (tmp_path / "file").write_bytes(content)
    assert manifest.hash_of_file(tmp_path / "file", read.append) == hashlib.sha256(content).hexdigest()
    assert sum(read) == len(content)
    assert len(read) > 1
    with pytest.raises(OSError, match="/proc/self/mem"):  # an error of reading, which has no name of its own
        manifest.hash_of_file(Path("/proc/self/mem"))


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    directory = checkpoint(tmp_path / "checkpoint-8")
    text = (directory / manifest.NAME).read_text()
    assert checkpoints.newest(tmp_path) == directory
    for before, after in (("8,", "9,"), ('\n  "sha256"', '\n  "sHa256"'), ('"files"', '"fIles"')):
        assert before in text
        (directory / manifest.NAME).write_text(text.replace(before, after))
        assert manifest.fault(directory) == manifest.damage(directory) == "manifest.json is not what was written"
    (directory / manifest.NAME).write_text(text)
    assert manifest.fault(directory) is None


def test_an_error_of_the_disk_is_no_damage(tmp_path, capsys):
    """The older checkpoint is not gone on with, or the next save would remove the newer one."""
    for step in (8, 16):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "file").write_text("")
        manifest.write(directory, step=step)
    assert checkpoints.newest(tmp_path) == directory
    (directory / "file").unlink()
    (directory / "file").symlink_to("/proc/self/mem")  # of which nothing can be read
    with pytest.raises(OSError, match="file"):
        checkpoints.newest(tmp_path)
    assert "skipped" not in capsys.readouterr().err
    (directory / "file").unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-8"  # which is missing, and so damage


FOREIGN = ['{"name": "an app"}', '{"files": ["a", "b"]}', '{"files": {"a": 1}}', "[]"]
FOREIGN += ['{\n  "files": {\n    "a": 1}}']
NO_JSON = ["{", "", "\x80\x04N."]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_manifest_of_other_software_says_nothing(foreign, tmp_path):
    (tmp_path / manifest.NAME).write_text(foreign)
    assert manifest.damage(tmp_path) is None
    assert not manifest.is_of(tmp_path, "test")
    assert manifest.fault(tmp_path) == f"{manifest.NAME} is not what was written"  # which no resumption accepts


@pytest.mark.parametrize("content", NO_JSON)
def test_a_manifest_that_does_not_parse_is_damage(content, tmp_path):
    (tmp_path / manifest.NAME).write_text(content, encoding="latin-1")
    assert manifest.damage(tmp_path) == f"{manifest.NAME} is not what was written"


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(Exception("No space left"), OSError), (RuntimeError("full"), OSError), (KeyError("x"), KeyError)],
    ids=repr,
)
def test_what_libraries_raise_on_a_full_disk_is_an_oserror(raised, seen, tmp_path):
    with pytest.raises(seen), files.plain_errors(tmp_path / "final"):
        raise raised


def checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "file").write_text("text")
    facts = {"step": 8, "seconds": 12.25, "reported": [[1.5, None], [0.1, 1e-7]], "corpus": "5ca1ab1e feed"}
    manifest.write(directory, **facts)
    return directory


def test_a_flipped_bit_anywhere_in_a_manifest_is_a_fault_or_changes_nothing(tmp_path):
    directory = checkpoint(tmp_path / "checkpoint-8")
    file = directory / manifest.NAME
    before, noticed = file.read_bytes(), 0
    expected = json.loads(before)
    for place in range(len(before)):
        for bit in (place % 8, 5):  # of a letter the sixth bit is its case
            flipped = bytearray(before)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            if manifest.fault(directory) is None:
                assert json.loads(file.read_bytes()) == expected
            else:
                assert manifest.damage(directory) is not None
                noticed += 1
    assert noticed > 1.5 * len(before)  # white space may become other white space
    file.write_bytes(before)
    assert manifest.fault(directory) is None


def test_a_checkpoint_of_another_step_or_that_lost_its_digest_is_passed_over(tmp_path, capsys):
    older, newer = (checkpoint(tmp_path / name) for name in ("checkpoint-8", "checkpoint-16"))
    assert checkpoints.newest(tmp_path) == older
    assert "checkpoint-16 is skipped: manifest.json is of step 8" in capsys.readouterr().err
    content = json.loads((newer / manifest.NAME).read_text()) | {"step": 16}
    del content["sha256"]
    (newer / manifest.NAME).write_text(json.dumps(content))
    assert checkpoints.newest(tmp_path) == older
    assert "checkpoint-16 is skipped: manifest.json is not what was written" in capsys.readouterr().err


def test_a_manifest_of_no_files_is_refused(tmp_path):
    directory = tmp_path / "checkpoint-8"
    directory.mkdir()
    manifest.write(directory, step=8)
    for problem in (manifest.fault(directory), manifest.damage(directory)):
        assert problem == "manifest.json lists no files"


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush", full)
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(OSError, match=r"report\.html could not be written: No space left on device"):
        files.write_text(tmp_path / "report.html", "after")
    with pytest.raises(OSError, match=r"final could not be written: No space left on device"):
        files.publish(written(tmp_path / "beside", "new"), tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "report.html"]
    assert (tmp_path / "report.html").read_text() == "before"
    with pytest.raises(OSError, match=r"missing/a\.json could not be written: No such file or directory"):
        files.write_text(tmp_path / "missing" / "a.json", "text")


def test_torch_s_words_for_a_full_disk_are_the_system_s(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        def flush(self):
            pass

    internal = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    with (
        pytest.raises(OSError, match="optimizer could not be written: File too large"),
        files.plain_errors(tmp_path / "optimizer"),
    ):
        torch.save({"a": torch.zeros(9)}, Full())
    with (
        pytest.raises(OSError, match="optimizer could not be written: No space left on device"),
        files.plain_errors(tmp_path / "optimizer"),
    ):
        raise RuntimeError(internal)

    def full(*arguments, **others):
        raise CheckpointException("failed", {0: (RuntimeError(internal), traceback.StackSummary())})

    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(optimizer_state, "save", full)
    with (
        pytest.raises(OSError, match="checkpoint-4 could not be written: No space left on device"),
        files.plain_errors(tmp_path / "checkpoint-4"),
    ):
        optimizer_state.save_optimizer(model, optimizer, tmp_path)


def test_only_a_disk_s_errors_get_a_name(tmp_path):
    with pytest.raises(BrokenPipeError), files.disk_errors(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_text_is_written_to_what_a_link_leads_to(tmp_path):
    (tmp_path / "page").write_text("old")
    (tmp_path / "link").symlink_to("page")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "page"]
