"""The benchmark of generation: it runs, and its ratios are of its speeds."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "generate.py"


def test_every_model_is_timed_at_every_batch_with_consistent_ratios(tmp_path, monkeypatch, capsys):
    models = ["Transformer-Nano", "MoT-Nano/4E"]
    flags = ["--batches", "1", "4", "--new", "3", "--rounds", "1", "--results", tmp_path / "generate.csv"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--models", *models, *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    with (tmp_path / "generate.csv").open(newline="") as file:
        rows = {(row["model"], row["batch"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(model, batch) for model in models for batch in ("1", "4")]
    speed = {key: float(row["tokens_per_second"]) for key, row in rows.items()}
    for (model, batch), row in rows.items():
        expected = speed[model, batch] / speed["Transformer-Nano", batch]
        assert float(row["share_of_first"]) == pytest.approx(expected, rel=1e-3)
    assert "MoT-Nano/4E" in capsys.readouterr().out
