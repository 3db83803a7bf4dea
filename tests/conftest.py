import random
from pathlib import Path

import pytest
import torch

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
