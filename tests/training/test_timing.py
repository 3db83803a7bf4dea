"""A budget in minutes: how many steps are found, that timing them changes nothing, and that a run keeps them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mixture_of_tokens import Options, compare, read_run, report, train, transition
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.training import timing
from mixture_of_tokens.training import train as training
from mixture_of_tokens.training.merging import FEWEST_SCORED, SHORT, merge
from mixture_of_tokens.training.timing import Pace, pace_of, rows_to_score, steps_within
from mixture_of_tokens.training.trainer import EVALUATION_ROWS
from processes import in_processes, mot, rows_of

NAME = "MoT-Nano/4E/2"


@pytest.fixture
def options(small_corpus) -> Options:
    return Options(batch_size=32, data=[str(small_corpus)], device="cpu")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_steps_of_a_budget_are_those_that_fit(options):
    """By hand: 600 s, of which 20 % are for scores: 3 x 1,000 rows of 0.01 s take 30 s; evaluations 10 s each."""
    pace = Pace(step=0.5, row=0.01)
    scored = rows_to_score(10, pace.row, total=1000)
    assert scored == 1000
    steps = steps_within(10, pace, scored, 1000, lambda n: merge(NAME, 0, None, replace(options, steps=n), minutes=10))
    every = merge(NAME, 0, None, replace(options, steps=steps)).config.training["eval_steps"]
    spent = 30 + 0.5 * steps + 10 * -(-steps // every)
    assert 600 - 2 * 10 < spent <= 600


def test_where_there_is_no_time_to_score_all_a_part_is_scored(options):
    few = rows_to_score(1, 0.005, total=100_000)
    assert few == int(0.2 * 60 / 0.005 / 11)
    assert rows_to_score(0.001, 0.01, total=100_000) == FEWEST_SCORED
    own, pace = replace(options, scored_rows=few), Pace(0.5, 0.005)
    steps = steps_within(1, pace, few, 100_000, lambda n: merge(NAME, 0, None, replace(own, steps=n), minutes=1))
    assert 0.75 * 60 < 0.5 * steps < 60


def test_a_budget_in_which_no_step_fits_is_told(options):
    with pytest.raises(ValueError, match=r"^--minutes 0.1: no step fits; one takes 20 s here, and an evaluation "):
        steps_within(0.1, Pace(20, 0.01), 128, 1000, lambda n: merge(NAME, 0, None, replace(options, steps=n)))


def test_a_pace_is_of_this_machine_and_model(options, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.5)
    small = pace_of(merge("Transformer-Nano", 0, None, replace(options, batch_size=32)))
    large = pace_of(merge("Transformer-Nano", 0, None, replace(options, batch_size=256)))
    assert 0 < small.row < small.step
    assert large.step > 2 * small.step


@pytest.mark.parametrize("name", [NAME, pytest.param("TC-Nano/4E", marks=pytest.mark.slow)])
def test_a_run_of_minutes_is_the_run_of_its_steps(name, options, tmp_path, monkeypatch, capsys):
    """Timing draws other random numbers and trains other weights, of which nothing is left."""
    options = replace(options, batch_size=8)
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    pace_of_it, seen = timing.pace_of, []
    monkeypatch.setattr(timing, "pace_of", lambda *given: seen.append(pace_of_it(*given)) or Pace(0.5, 1e-6))
    run = train(name, out=tmp_path / "minutes", options=options, minutes=0.1)
    assert len(seen) == 1
    assert run.config.minutes == 0.1
    assert run.config.steps == run.facts.steps == 11
    assert f"A step of {name} takes 0.5 s here: 11 steps in 0.1 min\n" in capsys.readouterr().err
    same = train(name, out=tmp_path / "steps", options=replace(options, steps=11))
    both = [weights(each.directory) for each in (run, same)]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(weight, both[1][key]) for key, weight in both[0].items())
    assert [row.get("eval_loss") for row in rows_of(run.directory)] == [
        row.get("eval_loss") for row in rows_of(same.directory)
    ]


def test_a_switched_run_of_minutes_has_the_steps_that_fit_and_keeps_them(options, tmp_path, monkeypatch, capsys):
    paces = [Pace(0.5, 1e-6), Pace(0.25, 1e-6)]
    monkeypatch.setattr(timing, "pace_of", lambda *given: paces.pop(0))
    options = replace(options, batch_size=8)
    source = train(NAME, out=tmp_path / "run", options=options, minutes=0.05)
    how = {"out": tmp_path / "switched", "distil_steps": 2, "schedule": "decay", "device": "cpu", "minutes": 0.05}
    done = transition(source.directory, **how)
    assert "A step of TC-Nano/4E/2 takes 0.25 s here: 11 steps in 0.05 min\n" in capsys.readouterr().err
    run = read_run(done.directory)
    assert (run.config.steps, run.config.minutes, run.config.first_step) == (11, 0.05, source.config.steps)
    assert run.config.scored_rows == source.config.scored_rows
    (run.directory / "run.json").unlink()
    assert transition(source.directory, **how, resume=True).steps == done.steps  # times nothing
    with pytest.raises(ValueError, match=r"was started with minutes 0\.05, now it is minutes 1"):
        transition(source.directory, **how | {"minutes": 1}, resume=True)
    with pytest.raises(ValueError, match="minutes finds the number of steps: leave out steps, or minutes"):
        transition(source.directory, **how | {"out": tmp_path / "other"}, steps=3)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_steps(options, tmp_path, monkeypatch):
    paces = [Pace(0.5, 1e-6)]
    monkeypatch.setattr(timing, "pace_of", lambda *given: paces.pop())
    out = tmp_path / "run"
    first = train(NAME, out=out, options=options, minutes=0.05)
    (out / "run.json").unlink()
    again = train(NAME, out=out, options=options, minutes=0.05, resume=True)  # times nothing
    assert again.config == first.config
    for minutes, line in ((1, f"{out} was started with minutes 0.05, now it is minutes 1; "),):
        with pytest.raises(ValueError, match=re.escape(line)):
            train(NAME, out=out, options=options, minutes=minutes, resume=True)
    other = tmp_path / "steps"
    train(NAME, out=other, options=replace(options, steps=2))
    with pytest.raises(ValueError, match=r"was started with steps 2, now it is minutes 1; "):
        train(NAME, out=other, options=options, minutes=1, resume=True)
    with pytest.raises(ValueError, match="exists already and is a finished run"):
        train(NAME, out=out, options=options, minutes=0.05)
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match="exists already; go on with resume"):
        train(NAME, out=out, options=options, minutes=0.05)
    # Its config.yaml gives the same number, and times nothing.
    repeated = tmp_path / "repeated"
    mot("train", "--config", out / "config.yaml", "--out", repeated, "--device", "cpu")
    assert read_run(repeated).config == replace(first.config, minutes=None)
    assert all(torch.equal(weight, weights(out)[key]) for key, weight in weights(repeated).items())


@pytest.mark.slow
def test_models_of_a_comparison_get_the_steps_that_fit_each(options, tmp_path, monkeypatch, capsys):
    paces = {"Transformer-Nano": Pace(0.2, 1e-6), NAME: Pace(0.4, 2e-6)}
    asked = []

    def pace(merged, *given) -> Pace:
        asked.append(merged.config.name)
        return paces[merged.config.name]

    monkeypatch.setattr(timing, "pace_of", pace)
    found = compare("Transformer-Nano", NAME, seeds=[0, 1], out=tmp_path, options=options, minutes=0.1)
    assert asked == ["Transformer-Nano", NAME]
    runs = {path.parent.name: read_run(path.parent) for path in tmp_path.glob("*/run.json")}
    assert len(runs) == 4
    steps = {name: {run.facts.steps for run in runs.values() if run.name == name} for name in paces}
    assert steps == {"Transformer-Nano": {29}, NAME: {14}}
    assert len({run.config.scored_rows for run in runs.values()}) == 1
    written = json.loads((tmp_path / "compare.json").read_text())
    assert "--minutes 0.1 " in written["command"]
    assert [model["steps"] for model in written["models"]] == [29, 14]
    assert "29" in str(found)
    assert str(report(tmp_path)).splitlines()[0] == str(found).splitlines()[0]
    # Called again it goes on, with a new model too, and times that alone.
    paces["TC-Nano/4E"] = Pace(0.3, 1e-6)
    compare("Transformer-Nano", NAME, "TC-Nano/4E", seeds=[0, 1], out=tmp_path, options=options, minutes=0.1)
    assert asked == ["Transformer-Nano", NAME, "TC-Nano/4E"]
    capsys.readouterr()
    other = train(NAME, out=tmp_path / "other", options=replace(options, steps=14, scored_rows=10**6), seed=0)
    with pytest.raises(ValueError, match=r"differ in "):
        report(tmp_path / "Transformer-Nano-seed0", other.directory)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--minutes", 0), "--minutes must be above 0 and at most 527040, not 0"),
        (("--minutes", -1), "--minutes must be above 0 and at most 527040, not -1"),
        (("--minutes", 1e9), "--minutes must be above 0 and at most 527040, not 1e+09"),
        (("--minutes", "nan"), "--minutes takes a finite number, not 'nan'"),
        (("--minutes", 1, "--steps", 3), "--minutes finds the number of steps: leave out --steps, or --minutes"),
        (("--minutes", 1, "--dry-run"), "--minutes times steps, and --dry-run makes none: mot plan NAME --measure"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_budgets_are_refused_in_a_line(command, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        mot(command, "Transformer-Nano", *words)
    told = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(told) == 1
    assert told[0].startswith(f"mot: error: {line}")
    assert not list(tmp_path.iterdir())


def test_a_short_run_scores_about_as_many_rows_as_it_trains_on(options):
    def rows(steps: int, **others) -> int | None:
        return merge(NAME, 0, None, replace(options, steps=steps, **others)).config.scored_rows

    assert rows(SHORT) is rows(1500) is None
    assert rows(4) == FEWEST_SCORED
    assert rows(4, batch_size=3200) == 3200 * 4 // 5
    assert rows(99) == 32 * 99 // 11
    assert rows(4, scored_rows=7) == 7
    assert rows(1500, scored_rows=7) == 7
    assert merge("MoT-Nano/4E", 0, None, replace(options, steps=4), first_step=100).config.scored_rows is None


@pytest.mark.slow
def test_what_was_scored_is_said(options, tmp_path, capsys):
    def made(name: str, **others) -> tuple:
        capsys.readouterr()
        run = train(NAME, out=tmp_path / name, options=replace(options, steps=3, batch_size=8, **others))
        return run, capsys.readouterr().err

    part, told = made("part", scored_rows=16)
    text = part.config.prepare().validation
    assert text.total > 32
    assert part.config.group_size == 4
    assert part.facts.scored_tokens == 16 * text.context
    assert "Evaluating on 16 rows of the validation text\n" in told
    assert f"of {part.facts.scored_tokens:,} tokens of validation text, " in str(part)
    assert part.facts.regrouping_spread is None
    every, told = made("every", scored_rows=10**6)
    assert every.facts.scored_tokens is None
    assert "Evaluating on all of the validation text, grouped in 3 ways\n" in told
    assert "of all validation text, " in str(every)
    assert every.facts.final_loss == pytest.approx(part.facts.final_loss, abs=0.2)
    assert every.facts.bits_per_byte == pytest.approx(part.facts.bits_per_byte, rel=0.1)
    both = [[row["eval_loss"] for row in rows_of(run.directory) if "eval_loss" in row] for run in (part, every)]
    assert len(both[0]) == len(both[1]) == 3
    assert both[0] != both[1]
    said = f"Final losses are of {part.facts.scored_tokens:,} tokens of validation text, not of all.\n"
    assert said in str(report(part.directory))
    assert "Final losses are of" not in str(report(every.directory))
    with pytest.raises(ValueError, match="they differ in scored_rows"):
        report(part.directory, every.directory)


def test_a_file_of_a_short_run_gives_another_number_of_steps_its_own_scores(options, tmp_path, capsys):
    mot("train", NAME, "--steps", 4, "--dry-run")
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["scored_rows"] == FEWEST_SCORED
    for steps, rows in ((4, FEWEST_SCORED), (300, None)):
        mot("train", "--config", tmp_path / "config.yaml", "--steps", steps, "--dry-run", "--json")
        assert json.loads(capsys.readouterr().out)["scored_rows"] == rows


def test_long_runs_are_evaluated_as_ever():
    for name, steps, every in (("Nano", 1500, 100), ("Micro", 6000, 200), ("Mini", 150_000, 1000)):
        config = merge(f"MoT-{name}/32E/8", 0, None, Options()).config
        assert (config.steps, config.training["eval_steps"], config.scored_rows) == (steps, every, None)
        assert config.minutes is None
    assert EVALUATION_ROWS == 1024


def test_minutes_do_not_identify_a_run(options):
    by_hand = merge(NAME, 0, None, replace(options, steps=200)).config
    found = merge(NAME, 0, None, replace(options, steps=200), minutes=2).config
    assert isinstance(found, RunConfig)
    assert found.identity() == by_hand.identity()
    assert found.conditions() != by_hand.conditions()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard", 2)])
def test_processes_agree_on_the_steps(flags, small_corpus, tmp_path):
    """Of the first one's times; where one had other steps, the others would wait for it."""
    how = ("--minutes", 0.1, "--batch-size", 32, "--device", "cpu", "--data", small_corpus, "--scored-rows", 32)
    in_processes(mot, ("train", NAME, *how, *flags, "--out", tmp_path / "run"), 2, tmp_path / "log")
    run = read_run(tmp_path / "run")
    assert run.config.minutes == 0.1
    assert run.facts.steps == run.config.steps > 1
    assert (tmp_path / "log").read_text().count(f"A step of {NAME} takes ") == 1


def test_minutes_that_were_not_used_are_told(small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "fitting", lambda _, made, given, *more: dict.fromkeys(made, replace(given, steps=2)))
    options = Options(device="cpu", data=[str(small_corpus)])
    train(NAME, out=tmp_path / "run", options=options, minutes=1)
    assert "of 1 minutes training took" in capsys.readouterr().err
