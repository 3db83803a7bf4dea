import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoTokenizer

from mixture_of_tokens.utils.cpu import spin_briefly
from mixture_of_tokens.utils.progress import say_once, warn_once
from processes import mot
from texts import write_texts

spin_briefly()  # in all processes that are started from here on
torch.set_num_threads(1)  # the tests' matrices are tiny, and threads only wait for each other


# The files that take longest go first, or one process would be busy with them long after others: those of the slow
# tests, then others. `transition` makes `tiny_runs`, which the next ones do not need at once.
LONG = ("transition", "sharded_runs", "guides", "sharding", "train", "export", "resume", "compare", "fuzz", "kills")
LONG += ("layouts", "cost", "generate", "foreign_runs", "sweep", "upcycle", "experiments", "properties", "docs")
LONG += ("layers", "modeling", "to_gguf", "rooms", "thresholds", "hub", "timing", "flags", "evaluate", "process")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """Every test begins as a process does."""
    say_once.cache_clear()
    warn_once.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Every training looks for garbage, and takes a quarter of a second for what is imported, where there is none."""
    gc.freeze()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of the test session to need it makes for all of them."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """A folder of short texts, prepared and evaluated within a second."""
    return made_once(tmp_path_factory, "small_corpus", lambda made: write_texts(made / "texts", lines=6)) / "texts"


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, small_corpus) -> dict[str, Path]:
    """Finished runs by their models' names, trained just enough to be told apart."""
    names = ("Transformer-Nano", "MoT-Nano/4E/2", "TC-Nano/4E")

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(folder / "cache"))
            for name in names:
                out = folder / name.replace("/", "-")
                flags = ("--steps", 30, "--batch-size", 32, "--training.eval_steps", 10, "--device", "cpu")
                mot("train", name, *flags, "--data", small_corpus, "--out", out)

    folder = made_once(tmp_path_factory, "tiny_runs", make)
    return {name: folder / name.replace("/", "-") for name in names}


@pytest.fixture
def beside_a_tokenizer(tiny_runs, tmp_path) -> Callable[[str, Any], Path]:
    """Saves a model of a kind with a tokenizer and returns the directory."""

    def save(kind: str, model: Any) -> Path:
        directory = tmp_path / f"saved-{kind}"
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(tiny_runs["MoT-Nano/4E/2"] / "model").save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """Where prepared text is kept: of each module its own, and never the one of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(folder))
        yield folder


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch) -> Path:
    """Nothing is prepared."""
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_cache(tiny_runs, monkeypatch) -> None:
    """The text of `tiny_runs`, already prepared."""
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
