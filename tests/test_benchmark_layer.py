"""The benchmark of the layer: it runs, what it compares is comparable, and it refuses what it cannot do."""

import json
import subprocess
import sys
from pathlib import Path

import layer as benchmark
import providers
import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = "--dtypes float32 --repeats 2 --hidden 32 --intermediate 96 --group-size 4 --tokens 48 --context 6"


def run(flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "layer.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_every_provider_is_measured_with_consistent_shares():
    done = run(f"{TINY} --no-memory --no-save --repeats 1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["provider"], row["pass"]) for row in rows] == [
        (name, kind) for name in benchmark.PROVIDERS for kind in ("forward", "forward+backward")
    ]
    took = {(row["provider"], row["pass"]): row["milliseconds"] for row in rows}
    for row in rows:
        assert tuple(row) == benchmark.COLUMNS
        assert 0 < row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
        assert row["tokens_per_second"] == pytest.approx(48e3 / row["milliseconds"], rel=0.05)  # rounded
        name, kind = row["provider"], row["pass"]
        assert row["share_of_dense"] == pytest.approx(took["dense", kind] / row["milliseconds"], rel=0.05)
        assert (row["share_of_floor"] is not None) == ("/" in name)
        if "/" in name:
            floor = took[f"matmuls/{name.partition('/')[2]}", kind]
            assert row["share_of_floor"] == pytest.approx(floor / row["milliseconds"], rel=0.05)
        assert (row["note"] == "gated, width 64") == row["provider"].startswith("qwen3")
    assert all(f"| {name} |" in done.stderr for name in benchmark.PROVIDERS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
def test_results_are_appended_and_the_latest_are_tabulated(tmp_path):
    out = tmp_path / "results.csv"
    flags = f"--dtypes float32 --gated --providers dense,mot/1 --out {out}"
    flags += " --hidden 256 --intermediate 1024 --group-size 8 --tokens 256 --context 32"
    run(f"{flags} --repeats 3")
    done = run(f"{flags} --repeats 4")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(out.read_text().splitlines()) == 1 + 2 * len(rows)
    memory = {row["provider"]: row["peak_memory_mib"] for row in rows if row["pass"] == "forward+backward"}
    assert memory["mot/1"] > 8 * 3 * 256 * 1024 * 4 / 2**20, "less than the gradients of 8 experts"
    assert 3 * 256 * 1024 * 4 / 2**20 < memory["dense"] < memory["mot/1"]
    table = run(f"--table --out {out}").stdout
    assert table.count("| mot/1 |") == 1
    assert "4 repeats" in table
    assert table in done.stderr


def test_the_literal_formulation_is_the_layer():
    torch.manual_seed(0)
    layer = providers.mot(providers.Sizes("gated", 24, 48, 4, 96, 3), 8)
    x = torch.randn(8, 3, 24)
    assert_close(providers.Literal(layer)(x), layer(x))


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("feed_forward", ["plain", "gated"])
@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
def test_the_floor_has_the_flops_of_the_layer(feed_forward, granularity, kind):
    sizes = providers.Sizes(feed_forward, 24, 48, 4, 96, 3)
    flops = []
    for name in (f"mot/{granularity}", f"matmuls/{granularity}"):
        provider = providers.build(name, sizes, torch.float32, "cpu")
        with FlopCounterMode(display=False) as counter:
            getattr(provider, kind)()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "100"], "--tokens: 100 is no multiple"),
        (["--repeats", "0"], "--repeats: must be a whole number above 0"),
        (["--providers", "dense,moe"], "'moe' is unknown; legal are dense, mot/1"),
        (["--dtypes", "int8"], "'int8' is unknown; legal are float32, bfloat16"),
        (["--intermediate", "100"], "--intermediate: 100 is no multiple of the granularity of mot/8"),
        (["--plain", "--gated"], "not allowed with"),
        (["--table", "--out", "missing.csv"], "missing.csv does not exist"),
        (["--out", str(Path(__file__))], "has other columns"),
    ],
)
def test_bad_flags_are_refused_in_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["layer.py", *flags])
    with pytest.raises(SystemExit) as exit_:
        benchmark.parse()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1
