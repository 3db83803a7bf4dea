"""Directories that are whole or not there, and manifests."""

from pathlib import Path

import pytest

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
    with pytest.raises(seen), checkpoints.plain_errors(tmp_path / "final"):
        raise raised
