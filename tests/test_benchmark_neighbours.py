"""The benchmark beside busy processes: it runs, and its ratios are of its times."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "neighbours.py"


@pytest.mark.slow
def test_all_ways_to_wait_are_timed_with_and_without_neighbours(tmp_path):
    results = tmp_path / "neighbours.csv"
    flags = ["--model", "MoT-Nano/4E", "--busy", "0", "2", "--steps", "1", "--rounds", "1", "--batch-size", "4"]
    command = [sys.executable, SCRIPT, *flags, "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with results.open(newline="") as file:
        rows = {(row["busy"], row["waiting"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(busy, waiting) for busy in ("0", "2") for waiting in ("openmp", "mot", "one thread")]
    for (_, waiting), row in rows.items():
        ratio = float(row["milliseconds"]) / float(rows["0", waiting]["milliseconds"])
        assert float(row["share_of_idle"]) == pytest.approx(ratio, rel=1e-2)
    assert "busy processes" in done.stdout
    refused = subprocess.run([*command, "--busy", "1"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "the first number must be 0" in refused.stderr.splitlines()[-1]
