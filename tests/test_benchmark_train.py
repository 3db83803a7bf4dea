"""The benchmark of a training step: it runs, and its ratios are of its times."""

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train.py"


@pytest.mark.slow
def test_every_model_is_timed_in_both_loops_with_consistent_ratios(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    flags = ["--steps", "2", "--rounds", "1", "--batch-size", "32", "--data", small_corpus]
    flags += ["--models", "Transformer-Nano", "MoT-Nano/4E", "--results", tmp_path / "train.csv"]
    command = [sys.executable, SCRIPT, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = {(row["model"], row["loop"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(m, loop) for m in ("Transformer-Nano", "MoT-Nano/4E") for loop in ("trainer", "loop")]
    time = {key: float(row["milliseconds"]) for key, row in rows.items()}
    for (model, loop), row in rows.items():
        assert float(row["share_of_first"]) == pytest.approx(
            time[model, loop] / time["Transformer-Nano", loop], rel=1e-3
        )
    for model in ("Transformer-Nano", "MoT-Nano/4E"):
        overhead = time[model, "trainer"] / time[model, "loop"] - 1
        assert float(rows[model, "trainer"]["overhead"]) == pytest.approx(overhead, abs=1e-3)
    assert "over the bare loop" in done.stdout


@pytest.mark.slow
def test_wider_models_are_timed_beside_their_flops(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    flags = ["--widths", "32", "64", "--steps", "1", "--rounds", "1", "--batch-size", "32", "--data", small_corpus]
    flags += ["--models", "Transformer-Nano", "MoT-Nano/4E/4", "--results", tmp_path / "train.csv"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = {(row["width"], row["model"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(w, m) for w in ("32", "64") for m in ("Transformer-Nano", "MoT-Nano/4E/4")]
    shares = [float(rows[width, "MoT-Nano/4E/4"]["flops_of_first"]) for width in ("32", "64")]
    assert shares[0] > shares[1] > 1  # mixing costs less beside a wider feed-forward
    assert "| 64 |" in done.stdout


@pytest.mark.slow
def test_two_processes_are_timed_beside_one(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    flags = ["--processes", "2", "--steps", "1", "--rounds", "1", "--batch-size", "32", "--data", small_corpus]
    flags += ["--models", "MoT-Nano/4E", "TC-Nano/4E", "--device", "cpu", "--results", tmp_path / "train.csv"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = {(row["model"], row["loop"]): row for row in csv.DictReader(file)}
    ways = ["one process", "2 processes, copies", "2 processes, shards", "2 processes, experts divided"]
    expected = [("MoT-Nano/4E", way) for way in ways] + [("TC-Nano/4E", way) for way in ways[:3]]
    assert list(rows) == expected
    for (model, _), row in rows.items():
        alone = float(rows[model, "one process"]["milliseconds"])
        assert float(row["share_of_first"]) == pytest.approx(float(row["milliseconds"]) / alone, rel=1e-2)
    assert "| ms a step | of one process |" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--models", "MoT-Giant"], "'MoT-Giant'"), (["--table", "--results", "absent.csv"], "absent.csv")],
)
def test_bad_use_is_one_line_and_leaves_nothing(script, flags, message, tmp_path, monkeypatch, capsys):
    flags = flags if "--table" in flags else [*flags, "--results", "new.csv"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT.with_name(script)), run_name="__main__")
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
