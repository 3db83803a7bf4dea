import random
from pathlib import Path

import pytest
import torch

from mixture_of_tokens import cli

torch.set_num_threads(1)  # the tests' matrices are tiny, and threads only wait for each other


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """A folder of 300 texts with some structure to learn, prepared and evaluated within a second."""
    folder, choose = tmp_path_factory.mktemp("small_corpus"), random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randint(2, 7))) for _ in range(400)]
    for number in range(300):
        own = choose.sample(words, 60)
        lines = (" ".join(choose.choices(own, k=8)) for _ in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, small_corpus) -> dict[str, Path]:
    """Finished runs by their models' names, trained just enough to be told apart."""
    directory, made = tmp_path_factory.mktemp("tiny_runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(directory / "cache"))
        for name in ("Transformer-Nano", "MoT-Nano/4E/2", "TC-Nano/4E"):
            made[name] = directory / name.replace("/", "-")
            flags = ("--steps", 30, "--batch-size", 32, "--device", "cpu", "--data", small_corpus, "--out", made[name])
            cli.main(["train", name, *map(str, flags)])
    return made


@pytest.fixture
def tiny_cache(tiny_runs, monkeypatch) -> None:
    """The text of `tiny_runs`, already prepared."""
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
