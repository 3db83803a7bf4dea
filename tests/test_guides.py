"""Each guide from its first line to its last, as a reader would type it, with few steps.

The commands are the page's own but for the values in SHORT. Their text is the tests'.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixture_of_tokens.commands import cli
from mixture_of_tokens.conversion import verify
from test_docs import DOCS, GUIDES, ROOT, blocks

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SHORT = {"--steps": "2", "--distil-steps": "2", "--seeds": "1"}


def run(code: str, name: str, names: dict) -> None:
    exec(compile(code, name, "exec"), names)


def shortened(words: list[str]) -> list[str]:
    """Few steps, where a command says how many, or for how long: two, and for the ten minutes of two parts four."""
    short = [SHORT.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "--minutes" in short:
        place = short.index("--minutes")
        short[place : place + 2] = ["--steps", "4" if short[place + 1] == "10" else "2"]
    return short


@pytest.fixture
def beside_text(small_corpus, tmp_path, fresh_cache, monkeypatch) -> Path:
    (tmp_path / "my-texts").symlink_to(small_corpus)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


LONG = ("compare", "dense", "train")  # of which `test_docs.py` checks every command
WITH_LONG = [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in LONG), id=page.stem) for page in GUIDES]


@pytest.mark.parametrize("page", WITH_LONG)
def test_a_guide_runs_from_its_first_line_to_its_last(page, beside_text, monkeypatch, capsys):
    # Another process would have to import transformers, as in test_export.py.
    monkeypatch.setattr(verify, "compare_logits", lambda *given: (0.0, 1.0))
    names: dict = {}
    done = 0
    for language, code in re.findall(r"^```(python|sh)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            run(code, page.name, names)
            done += 1
            continue
        for line in code.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "mot"
            cli.main(shortened(words))
            done += 1
    assert done >= 3
    assert capsys.readouterr().out


def test_the_notebook_runs_and_keeps_no_output(beside_text, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    names: dict = {}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        run(code.replace("steps=100", "steps=2").replace("2_000_000", "200_000"), f"cell {number}", names)
    assert names["moved"][1, 5] > 0
    assert names["moved"][32:].max() == 0
    assert "alone, 8 of 256 experts" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_of_the_guide_train_on_a_cpu(beside_text):
    (line,) = (
        line
        for block in blocks(DOCS / "guide" / "gpus.md", "sh")
        for line in block.splitlines()
        if "--device cpu" in line
    )
    program, *words = shlex.split(line)
    assert program == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *shortened(words)]
    subprocess.run(command, check=True, timeout=300)
    assert (beside_text / "runs" / "two" / "model" / "model.safetensors").is_file()
