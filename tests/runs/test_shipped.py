"""The trained model that comes with the library."""

import math
from pathlib import Path

import pytest
import torch

import mixture_of_tokens
from mixture_of_tokens import generate
from mixture_of_tokens.runs.loading import SHIPPED, load_model, load_tokenizer_of, run_directory


def test_it_is_small_and_whole():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.6e6
    model = load_model("nano", device="cpu")
    assert model.dtype == torch.float32
    assert model.config.group_size == 32
    assert run_directory("nano") is None


def test_it_writes_alone_and_in_a_group_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ["def ", "class ", "import "]
    how = {"temperature": 0.0, "max_new_tokens": 12, "device": "cpu"}
    alone, own = (
        [each.text for each in generate("nano", prompt=some, alone=True, experts=8, **how).continuations]
        for some in (prompts, prompts[:1])
    )
    mixed = [each.text for each in generate("nano", prompt=prompts, **how).continuations]
    assert alone[0] == own[0]  # whatever else is in the batch
    assert all(mixed)
    assert alone != mixed


@torch.no_grad()
def test_it_has_learned_python():
    model, tokenizer = load_model("nano", alone=True, experts=8, device="cpu"), load_tokenizer_of("nano")
    tokens = tokenizer(Path(mixture_of_tokens.__file__).read_text())["input_ids"]
    rows = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
    assert float(model(rows, labels=rows).loss) < 0.65 * math.log(model.config.vocab_size)


def test_what_is_here_comes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    with pytest.raises(ValueError, match="nano is no model"):
        load_model("nano")
