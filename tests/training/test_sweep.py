"""`mot sweep`: the grid, what it skips, what it calls the best."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from mixture_of_tokens import Options, sweep, train
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.training import train as training
from mixture_of_tokens.training.sweep import Cell, Outcome
from processes import mot


@pytest.fixture(scope="module")
def flags(small_corpus):
    short = ("--steps", 4, "--batch-size", 32, "--training.eval_steps", 2, "--device", "cpu", "--data", small_corpus)
    return ("MoT-Nano/4E/2", "--learning-rate", "1e-30,1e-2", "--seeds", "0,1", *short)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, flags):
    out = tmp_path_factory.mktemp("sweeps") / "one"
    mot("sweep", *flags, "--out", out)
    return out


def test_the_best_has_the_lowest_mean_over_seeds_on_text_kept_for_tuning(swept):
    written = json.loads((swept / "sweep.json").read_text())
    assert written["evaluated_on"] == "tuning"
    best, worst = written["cells"]
    assert best["settings"] == {"--learning-rate": 0.01}
    assert best["loss"] < worst["loss"]
    for cell in written["cells"]:
        facts = [json.loads((swept.parent / run["directory"] / "run.json").read_text()) for run in cell["runs"]]
        assert [fact["seed"] for fact in facts] == [0, 1]
        assert {fact["evaluated_on"] for fact in facts} == {"tuning"}
        losses = [fact["final_loss"] for fact in facts]
        for run, loss in zip(cell["runs"], losses, strict=True):
            directory = str(swept.parent / run["directory"])
            kept = text_of(directory).tuning
            again = evaluate_blocks(load_model(directory, device="cpu"), kept, group_size=32, batch_size=32)
            assert loss == pytest.approx(again["loss"], abs=1e-6)
        assert cell["loss"] == pytest.approx(sum(losses) / 2)
        assert cell["spread"] == pytest.approx(abs(losses[0] - losses[1]))


def test_a_report_names_the_text_kept_for_tuning(swept, tmp_path, capsys):
    mot("report", next(swept.rglob("run.json")).parent, "--out", tmp_path / "page.html")
    assert "\nLosses are of the tuning text.\n" in capsys.readouterr().out


def test_a_report_of_its_directory_has_a_line_for_each_setting(swept, tmp_path, capsys):
    mot("report", swept, "--out", tmp_path / "page.html", "--json")
    models = json.loads(capsys.readouterr().out)["models"]
    assert [(model["label"], len(model["runs"])) for model in models] == [
        ("MoT-Nano/4E/2 (learning_rate 0.01)", 2),
        ("MoT-Nano/4E/2 (learning_rate 1e-30)", 2),
    ]


def test_called_again_it_trains_nothing_and_prints_the_same(swept, flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.name != "sweep.json"}
    mot("sweep", *flags, "--out", swept)
    out = capsys.readouterr().out
    best = next(line for line in out.splitlines() if line.startswith("Best: "))
    assert best.startswith("Best: mot train MoT-Nano/4E/2 --learning-rate 0.01 --steps ")
    mot(*shlex.split(best.removeprefix("Best: mot ")), "--dry-run")
    capsys.readouterr()
    assert "Its rate is at the edge of the grid" in out
    assert {p: p.stat().st_mtime_ns for p in swept.rglob("*") if p.name != "sweep.json"}.items() >= before.items()
    mot("sweep", *flags, "--out", swept, "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((swept / "sweep.json").read_text())


def test_another_grid_in_the_same_place_says_what_it_leaves_out(swept, flags, tmp_path, capsys):
    there = tmp_path / "all"
    shutil.copytree(swept, there)
    words = ["1e-2" if word == "1e-30,1e-2" else word for word in flags]
    mot("sweep", *words, "--out", there)
    told = capsys.readouterr().err.partition("\n")[0]
    gone = "learning-rate=1e-30-seed=0, learning-rate=1e-30-seed=1"
    what = f"mot: {there / 'sweep.json'} now has this sweep alone, without {gone}"
    assert told == f"{what}; given together, what is finished is not trained again"
    mot("sweep", *flags, "--out", there)
    assert "without" not in capsys.readouterr().err
    assert len(json.loads((there / "sweep.json").read_text())["cells"]) == 2


@pytest.mark.slow
def test_a_larger_grid_keeps_what_is_finished(swept, flags, capsys):
    finished = next(swept.rglob("run.json"))
    before = finished.stat().st_mtime_ns
    words = ["1e-30,1e-2,1e30" if word == "1e-30,1e-2" else word for word in flags]
    mot("sweep", *words, "--out", swept, "--training.max_grad_norm", 0.5)
    assert finished.stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert "diverged" in out
    assert "Best: mot train MoT-Nano/4E/2 --learning-rate 0.01" in out
    assert "edge of the grid" not in out


def test_a_setting_of_which_one_seed_diverged_has_no_loss():
    ended = Outcome(seed=0, directory="a", loss=2.0, seconds=1.0)
    diverged = Outcome(seed=1, directory="b", diverged="the loss is nan")
    assert Cell.of({}, [ended]).loss == 2
    for runs in ([ended, diverged], [diverged, ended]):
        cell = Cell.of({}, runs)
        assert (cell.runs, cell.loss, cell.spread) == (runs, None, None)


@pytest.mark.slow
def test_a_sweep_of_which_nothing_is_left_fails(flags, tmp_path, capsys):
    words = ["1e30,1e31" if word == "1e-30,1e-2" else 0 if word == "0,1" else word for word in flags]
    with pytest.raises(SystemExit) as stopped:
        mot("sweep", *words, "--out", tmp_path / "diverges", "--training.max_grad_norm", 0)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out.count("diverged") == 2
    assert err.endswith("mot: every setting diverged: try lower learning rates\n")


def test_fields_of_the_model_are_settings_too(flags, tmp_path, capsys):
    kinds = '["dense", "dense", "dense", "mixture_of_tokens"]'
    words = ["--model.router_temperature", "0.25,1", "--model.mlp_layer_types", kinds, "--dry-run"]
    mot("sweep", *flags, "--out", tmp_path / "grid", *words)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 * 2 * 2
    directory = tmp_path / "grid" / "learning-rate=0.01-router_temperature=0.25-seed=1"
    assert any(line.startswith(f"{directory}: 4 steps, learning rate 0.01, ") for line in shown)
    assert not (tmp_path / "grid").exists()


def test_a_value_that_is_given_twice_is_one_setting(flags, tmp_path, capsys):
    mot("sweep", *flags, "--out", tmp_path / "grid", "--model.router_temperature", "0.25,1, 0.25", "--dry-run")
    assert len(capsys.readouterr().out.splitlines()) == 2 * 2 * 2


def test_runs_on_another_text_are_not_ranked_with_it(swept, flags, capsys):
    changed = next(swept.rglob("run.json"))
    before = changed.read_text()
    changed.write_text(before.replace(json.loads(before)["corpus"]["hash"], "another"))
    with pytest.raises(SystemExit, match="2"):
        mot("sweep", *flags, "--out", swept)
    changed.write_text(before)
    shown = capsys.readouterr().err
    assert "saw different text (" in shown
    assert "no loss of theirs compares; take another --out" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "1e-3,fast"], "--learning-rate: 'fast' is no number"),
        (["--seeds", "0,one"], "--seeds: 'one' is no whole number"),
        (["--learning-rate", "1e-3,-1"], "--learning-rate must be positive, not -1"),
        (["--model.vocab_size", "300,512"], "they differ in --model.vocab_size: 300 and 512"),
        (["--model.router_temperature", "[]"], "--model.router_temperature [] has an empty value"),
        (["--model.capacity_factor", "1.0,"], "--model.capacity_factor 1.0, has an empty value"),
        (["--training.weight_decay", "0,,1"], "--training.weight_decay 0,,1 has an empty value"),
        (["--model.router_temperature", "1,0"], "--model.router_temperature must be at least 1e-20, not 0"),
        (
            ["--model.max_position_embeddings", "32,64"],
            "cannot be compared, they differ in --model.max_position_embeddings: 32 and 64",
        ),
    ],
)
def test_the_whole_grid_is_checked_before_the_first_run(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        mot("sweep", "MoT-Nano/4E", *words, "--out", tmp_path / "grid")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_granularity_one_is_the_same_directory_as_none(monkeypatch):
    monkeypatch.setattr(training, "run_merged", lambda merged, out, *, resume, begin: out)
    for name in ("MoT-Nano/4E/1", "MoT-Nano/4E"):
        assert train(name, seed=3) == Path("runs/MoT-Nano-4E-seed3")
        (run,) = sweep(name, dry_run=True).runs
        assert run.directory == "runs/sweep-MoT-Nano-4E/seed=0"


def test_no_rate_is_no_sweep():
    with pytest.raises(ValueError, match="learning_rate takes at least one rate"):
        sweep("MoT-Nano/4E", learning_rate=[], dry_run=True)


def test_values_are_lists_from_python_and_in_a_file_too(tmp_path, capsys):
    given = {"model": {"router_temperature": [0.5, 1]}, "training": {"weight_decay": (0, 0.1)}}
    of_python = [run.directory for run in sweep("MoT-Nano/4E", options=Options(**given), dry_run=True).runs]
    assert len(of_python) == 4
    file = tmp_path / "flags.yaml"
    file.write_text("model: {router_temperature: [0.5, 1]}\ntraining: {weight_decay: [0, 0.1]}\n")
    mot("sweep", "MoT-Nano/4E", "--config", file, "--dry-run", "--json")
    assert [run["directory"] for run in json.loads(capsys.readouterr().out)["runs"]] == of_python
    with pytest.raises(ValueError, match=r"router_temperature takes one value, not '0.5,1.0'; mot sweep tries several"):
        train("MoT-Nano/4E", options=Options(**given))
