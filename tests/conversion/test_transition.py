"""`mot transition`: from a run in groups to a run that serves rows alone."""

import hashlib
import json
import re
import shutil
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mixture_of_tokens.conversion import after_switch, verify
from mixture_of_tokens.conversion.transition import Transitioned
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.reports.reproduce import Places, commands_of
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.training import trainer
from mixture_of_tokens.training.trainer import RunTrainer
from processes import mot, rows_of, start
from texts import write_texts

MIXED = "MoT-Nano/4E/2"
STEPS, SOURCE_STEPS = 10, 30


def hashes(directory) -> dict:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def transitioned(tiny_runs, tmp_path_factory):
    """The new run, what the command printed, and the source's files before."""
    out = tmp_path_factory.mktemp("transition") / "run"
    before = hashes(tiny_runs[MIXED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
        mot("transition", tiny_runs[MIXED], "--steps", STEPS, "--calibrate", "none", "--out", out)
    return out, before


@pytest.fixture(scope="module")
def barely_trained(tiny_runs, small_corpus, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("barely_trained") / "run"
    flags = ("--steps", 2, "--batch-size", 32, "--device", "cpu", "--data", small_corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
        mot("train", MIXED, *flags, "--model.attn_implementation", "eager", "--out", out)
    return out


def copy_of(run, to, **changes):
    """A run directory without its checkpoints, with other settings in its config.yaml."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = yaml.safe_load((to / "config.yaml").read_text())
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    (to / "config.yaml").write_text(yaml.safe_dump(settings))
    return to


def test_the_source_is_untouched_and_its_metrics_go_on(transitioned, tiny_runs):
    run, before = transitioned
    assert hashes(tiny_runs[MIXED]) == before
    source, rows = rows_of(tiny_runs[MIXED]), rows_of(run)
    assert rows[: len(source)] == source
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == SOURCE_STEPS + STEPS
    assert rows[-1]["tokens"] == steps[-1] * 32 * 64
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows))
    facts = json.loads((run / "run.json").read_text())
    assert (facts["name"], facts["steps"]) == ("TC-Nano/4E/2", SOURCE_STEPS + STEPS)
    assert facts["seconds"] > json.loads((tiny_runs[MIXED] / "run.json").read_text())["seconds"]
    switch = json.loads((run / "switch.json").read_text())
    assert switch["flops_per_token"] == read_run(tiny_runs[MIXED]).flops


def test_the_new_model_is_dropless_token_choice_that_mixes_nothing(transitioned):
    model = AutoModelForCausalLM.from_pretrained(transitioned[0] / "model")
    assert model.config.mlp_layer_types == ["dense", "dense", "token_choice", "token_choice"]
    assert (model.config.num_experts_per_tok, model.config.capacity_factor) == (2, None)
    assert model.config.router_temperature == 1
    assert not model.shares_batch
    assert read_run(transitioned[0]).model_config.capacity_factor is None  # config.yaml says so too


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_losses_at_the_switch_are_computed_as_in_training(small_corpus, tmp_path, monkeypatch):
    seen, evaluated = [], trainer.evaluate_blocks
    monkeypatch.setattr(
        trainer, "evaluate_blocks", lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or evaluated(*a, **k)
    )
    flags = ["--steps", 2, "--batch-size", 8, "--device", "cpu", "--data", small_corpus, "--training.bf16", "true"]
    mot("train", MIXED, *flags, "--out", tmp_path / "source")
    mot("transition", tmp_path / "source", "--steps", 0, "--calibrate", "none", "--out", tmp_path / "new")
    assert len(seen) > 5
    assert all(seen)


@pytest.mark.usefixtures("tiny_cache")
def test_it_is_private_and_has_a_page(transitioned, tiny_runs, tmp_path, capsys):
    mot("audit", transitioned[0], "--expect", "private", "--batches", 1)
    mot("report", transitioned[0], "--out", tmp_path / "page.html")
    assert "MoT-Nano/4E/2, switched" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "A vertical line is where a Mixture of Tokens became Token Choice." in page
    stages = json.loads((transitioned[0] / "switch.json").read_text())
    for key in ("source_in_groups", "source_alone", "plain_switch", "at_the_switch"):
        assert f"<td>{stages[key]:.3f}</td>" in page.replace(' class="first"', "")
    source = tiny_runs[MIXED]
    assert (
        f"mot train --config {source}/config.yaml --out again/{source.name}\nmot transition again/{source.name}" in page
    )


@pytest.mark.usefixtures("tiny_cache")
def test_the_printed_table_has_each_loss_in_its_row(transitioned, tiny_runs):
    source, run = read_run(tiny_runs[MIXED]), read_run(transitioned[0])
    found = Transitioned.of(source, run)
    assert found.seconds_after == run.facts.seconds - source.facts.seconds > 0
    losses = {"source_in_groups": 2.0, "source_alone": 2.5, "plain_switch": 3.25, "at_the_switch": 2.75}
    switch, stages = replace(found.switch, **losses), replace(found.stages, tenth_loss=2.25, end_loss=1.5)
    found = replace(found, switch=switch, stages=stages, source_final_loss=2.125, final_loss=1.625)
    shown = str(replace(found, scored_tokens=None))
    table, _, rest = shown.partition("\n\n")
    assert [re.split(" {2,}", line) for line in table.splitlines()] == [
        ["", "loss", "vs first"],
        [f"{source.directory.name}, in full groups", "2.0000", "+0.0000"],
        ["the same, each row alone", "2.5000", "+0.5000"],
        ["switched, unchanged weights", "3.2500", "+1.2500"],
        ["switched, as training begins", "2.7500", "+0.7500"],
        [f"step {SOURCE_STEPS + 1}, after 1 of {STEPS}", "2.2500", "+0.2500"],
        [f"step {SOURCE_STEPS + STEPS}, the end", "1.5000", "-0.5000"],
    ]
    assert "Over all of it the first is 2.1250, this run's 1.6250." in rest
    assert "Over 4,096 tokens of it the first is 2.1250" in str(replace(found, scored_tokens=4096))


@pytest.mark.slow
def test_what_upstream_keeps_elsewhere_is_kept(barely_trained, capsys):
    mot("transition", barely_trained, "--steps", 2, "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["model"]["attn_implementation"] == "eager"


@pytest.mark.usefixtures("tiny_cache")
def test_a_report_has_the_source_beside_it(transitioned, tiny_runs, tmp_path, capsys):
    mot("report", tiny_runs[MIXED], transitioned[0], "--out", tmp_path / "page.html")
    shown = " ".join(capsys.readouterr().out.split())
    assert "After 40 steps, 10 more than MoT-Nano/4E/2, its loss is" in shown
    page = (tmp_path / "page.html").read_text()
    assert "30 steps of MoT-Nano/4E/2 and 40 steps of MoT-Nano/4E/2, switched" in page
    *made, reported = re.findall(r"^.*mot (?:train|transition|report) .*$", page, re.MULTILINE)
    outs = [re.findall(r"--out (again/\S+)", line)[-1] for line in made]
    assert f"mot report {' '.join(outs)} --out {tmp_path / 'page.html'}" in reported
    with pytest.raises(SystemExit, match="2"):
        mot("report", tiny_runs["TC-Nano/4E"], transitioned[0], "--out", tmp_path / "refused.html")
    assert "they differ in --steps: 30 and 40" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_the_switch_is_smaller_when_calibrated_and_then_mended(transitioned, tiny_runs, tmp_path, capsys):
    plain = json.loads((transitioned[0] / "switch.json").read_text())
    assert plain["source_in_groups"] < plain["at_the_switch"] == plain["plain_switch"]
    assert (plain["branch_errors"], plain["fit_seconds"]) == ({}, 0)
    words = ["--steps", 5, "--distil-steps", 30, "--json", "--out", tmp_path / "distilled"]
    mot("transition", tiny_runs[MIXED], *words)
    result = json.loads(capsys.readouterr().out)
    switch, stages = result["switch"], result["stages"]
    assert switch["fit_seconds"] > 0
    assert switch["at_the_switch"] < switch["plain_switch"] == pytest.approx(plain["plain_switch"], abs=1e-6)
    assert stages["end_loss"] < switch["at_the_switch"]
    assert {layer: after < before for layer, (before, after) in switch["branch_errors"].items()} == {
        "2": True,
        "3": True,
    }
    assert stages["last"]["dropped"] == 0
    words = ["--steps", 5, "--capacity", 1.25, "--calibrate", "none", "--optimizer", "fresh", "--json"]
    mot("transition", tiny_runs[MIXED], *words, "--out", tmp_path / "capacity")
    assert json.loads(capsys.readouterr().out)["stages"]["first"]["dropped"] > 0


@pytest.fixture
def begun(tiny_cache, tmp_path, monkeypatch):
    """The trainer of a transition before its first step."""

    class Stopped(Exception):
        pass

    def begin(*words: object) -> RunTrainer:
        def train(trainer, checkpoint):
            raise Stopped(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(RunTrainer, "train", train)
            plain = () if "--calibrate" in words else ("--calibrate", "none")
            with pytest.raises(Stopped) as stopped:
                mot("transition", *words, *plain, "--out", tmp_path / "begun")
        shutil.rmtree(tmp_path / "begun")
        return stopped.value.args[0]

    return begin


def moments_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By the name of a weight and of a moment."""
    (file,) = (checkpoint / "optimizer").glob("*.safetensors")  # of one process
    return {n.removeprefix("state."): value for n, value in load_file(file).items() if n.startswith("state.")}


def test_adams_moments_go_with_the_weights_and_their_scales(begun, tiny_runs):
    source = tiny_runs[MIXED]
    kept = moments_of(source / f"checkpoint-{SOURCE_STEPS}")
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in (2, 3)}
    trainer = begun(source)
    names = {id(parameter): name for name, parameter in trainer.causal_lm.named_parameters()}
    ordered = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {names[id(parameter)] for parameter in ordered} == set(names.values())
    for parameter in ordered:
        name = names[id(parameter)]
        scale = 4.0 if name in routers else 1.0  # one over the temperature
        assert kept[f"{name}.exp_avg"].abs().sum() > 0
        for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            found, expected = trainer.optimizer.state[parameter][moment], kept[f"{name}.{moment}"] / scale**power
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # second moments are tiny
    fresh = begun(source, "--optimizer", "fresh")
    assert fresh.optimizer is None or not fresh.optimizer.state


@pytest.mark.slow
def test_what_is_distilled_in_fp32_reaches_a_model_in_bf16(begun, tiny_runs, tmp_path):
    source = copy_of(tiny_runs[MIXED], tmp_path / "source", model={"dtype": "bfloat16"})
    model = load_model(str(source), device="cpu").bfloat16()
    model.save_pretrained(source / "model")
    (source / "model" / "manifest.json").unlink()  # with which this would be damage
    words = ("--calibrate", "distil", "--distil-steps", 1, "--optimizer", "fresh")
    distilled = dict(begun(source, *words).causal_lm.named_parameters())
    assert {parameter.dtype for parameter in distilled.values()} == {torch.bfloat16}
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, distilled[name])}
    layers = [name for name in distilled if name.startswith(("model.layers.2.mlp.", "model.layers.3.mlp."))]
    assert same == distilled.keys() - set(layers)


@pytest.mark.slow
def test_a_held_rate_another_top_k_and_a_source_without_a_name(tiny_runs, tmp_path, tiny_cache, monkeypatch):
    copy_of(tiny_runs[MIXED], tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source")
    words = ["--steps", 4, "--schedule", "continued", "--top-k", 1, "--calibrate", "none", "--optimizer", "fresh"]
    mot("transition", ".", *words)
    run = read_run(tmp_path / "source-transition")
    last = [row["learning_rate"] for row in rows_of(tiny_runs[MIXED]) if "learning_rate" in row][-1]
    rates = [row.learning_rate for row in run.rows if row.step > SOURCE_STEPS and row.learning_rate is not None]
    assert rates == pytest.approx([last] * len(rates))
    assert len(rates) == 4
    assert run.model_config.num_experts_per_tok == 1


@pytest.mark.usefixtures("tiny_cache")
def test_gates_that_sum_to_one_are_trained_so_and_made_so_again(tiny_runs, tmp_path):
    words = ["--steps", 1, "--norm-topk-prob", "--calibrate", "none", "--out", tmp_path / "new"]
    mot("transition", tiny_runs[MIXED], *words)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    assert model.config.norm_topk_prob
    layer = model.model.layers[2].mlp
    _, weights = layer(torch.randn(2, 3, model.config.hidden_size), return_weights=True)
    assert_close(weights.sum(-1), torch.ones(2, 3))
    assert "--norm-topk-prob" in commands_of(read_run(tmp_path / "new"), Places())[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_the_rate_falls_from_the_source_s_last_one(tiny_runs, tmp_path, capsys):
    out = tmp_path / "new"
    mot("transition", tiny_runs[MIXED], "--steps", 10, "--schedule", "decay", "--calibrate", "none", "--out", out)
    run = read_run(out)
    last = [row["learning_rate"] for row in rows_of(tiny_runs[MIXED]) if "learning_rate" in row][-1]
    rates = [row.learning_rate for row in run.rows if row.step > SOURCE_STEPS and row.learning_rate is not None]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(last)
    assert last / 10 <= rates[-1] < last / 5
    mot("report", out)
    assert "--schedule decay" in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_a_switch_that_is_all_trains_nothing(tiny_runs, tmp_path, monkeypatch, capsys):
    source, out = tiny_runs[MIXED], tmp_path / "new"
    words = ["--steps", 0, "--scores", "sigmoid", "--optimizer", "fresh", "--distil-steps", 20, "--out", out]
    mot("transition", source, *words, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["stages"]["end_loss"] == result["switch"]["at_the_switch"] < result["switch"]["plain_switch"]
    assert rows_of(out) == rows_of(source)
    facts, before = (json.loads((run / "run.json").read_text()) for run in (out, source))
    assert (facts["name"], facts["steps"], facts["seconds"]) == ("STC-Nano/4E/2", SOURCE_STEPS, before["seconds"])
    mot("report", source, out, "--out", tmp_path / "page.html")
    assert "MoT-Nano/4E/2, switched" in capsys.readouterr().out
    (command,) = re.findall(r"^.*mot transition again/.*$", (tmp_path / "page.html").read_text(), re.MULTILINE)
    assert "--steps 0 --scores sigmoid" in command
    assert "--learning-rate" not in command
    monkeypatch.setattr(verify, "compare_logits", lambda model, directory, ids, code: (0.0, 1.0))  # see test_export.py
    mot("export", out, tmp_path / "exported")
    assert f"{result['switch']['at_the_switch']:.4f} at the end" in (tmp_path / "exported" / "README.md").read_text()
    mot("audit", out, "--expect", "private", "--batches", 1)
    mot("transition", source, *words, "--resume")
    assert "is finished already" in capsys.readouterr().err


@pytest.mark.slow
def test_groups_that_a_short_text_does_not_fill_are_not_called_full(tmp_path, capsys):
    write_texts(tmp_path / "texts", lines=1)
    flags = ("--steps", 2, "--batch-size", 32, "--device", "cpu", "--data", tmp_path / "texts")
    mot("train", "MoT-Nano/32E", *flags, "--out", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # nothing is carried where nothing is trained
    capsys.readouterr()
    mot("transition", tmp_path / "run", "--steps", 0, "--calibrate", "none")
    shown = capsys.readouterr().out
    assert "\nrun, in groups of 6 of 32 rows  " in shown
    assert "\n0.0 s of fitting, " in shown


@pytest.mark.usefixtures("tiny_cache")
def test_a_rate_that_was_never_logged_is_asked_for(tiny_runs, tmp_path, capsys):
    source = copy_of(tiny_runs[MIXED], tmp_path / "source")
    rows = [{k: v for k, v in row.items() if k != "learning_rate"} for row in rows_of(source)]
    (source / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(SystemExit, match="2"):
        mot("transition", source, "--schedule", "decay", "--dry-run")
    assert "source has no learning rate, as no step was logged: --learning-rate names one" in capsys.readouterr().err
    mot("transition", source, "--schedule", "decay", "--learning-rate", 0.003, "--dry-run")
    assert "learning_rate: 0.003" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_cache")
def test_a_source_without_evaluations_is_evaluated_after_the_switch(tiny_runs, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_runs[MIXED], source)
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace("eval_strategy: steps", "eval_strategy: no\n  eval_delay: 99"))
    mot("transition", source, "--dry-run")
    shown = capsys.readouterr().out
    assert "eval_strategy: steps" in shown
    assert "eval_delay" not in shown


@pytest.mark.usefixtures("tiny_cache")
def test_distilled_weights_begin_with_fresh_moments(begun, tiny_runs):
    trainer = begun(tiny_runs[MIXED], "--calibrate", "distil", "--distil-steps", 1)
    names = {id(parameter): name for name, parameter in trainer.causal_lm.named_parameters()}
    kept = {names[id(parameter)] for parameter in trainer.optimizer.state}
    assert kept == {name for name in names.values() if ".2.mlp." not in name and ".3.mlp." not in name}


@pytest.mark.usefixtures("tiny_cache")
def test_rows_go_on_where_the_source_ended(tiny_runs):
    blocks = text_of(str(tiny_runs[MIXED])).train
    sizes = {"group_size": 32, "batch_size": 32, "seed": 3}
    whole = GroupedBatches(blocks, steps=50, **sizes)
    part = GroupedBatches(blocks, steps=20, first_step=30, **sizes)
    assert len(part) == 20 * 32
    assert part.block_numbers([0, 17, 639]).tolist() == whole.block_numbers([960, 977, 1599]).tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_once_begun_it_goes_on_without_the_source_s_checkpoint(tiny_runs, tmp_path, capsys):
    source = shutil.copytree(tiny_runs[MIXED], tmp_path / "source")
    words = [source, "--steps", 2, "--calibrate", "none", "--out", tmp_path / "new", "--resume"]
    mot("transition", *words)
    shutil.rmtree(source / f"checkpoint-{SOURCE_STEPS}")
    mot("transition", *words)
    assert "new is finished already" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_cache")
def test_stopped_before_its_first_step_it_says_so_and_begins_anew(tiny_runs, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    words = [tiny_runs[MIXED], "--steps", 2, "--distil-steps", 3, "--out", tmp_path / "new"]
    with monkeypatch.context() as patched:
        patched.setattr(after_switch, "distil", stopped)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            mot("transition", *words)
    assert "stopped before the first step; --resume begins anew" in capsys.readouterr().err
    mot("transition", *words, "--resume")
    assert [row["step"] for row in rows_of(tmp_path / "new")][-1] == SOURCE_STEPS + 2


@pytest.mark.slow
def test_stopped_and_resumed_it_is_what_it_would_have_been(transitioned, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
    out = tmp_path / "stopped"
    words = [str(tiny_runs[MIXED]), "--steps", str(STEPS), "--calibrate", "none", "--out", str(out), "--resume"]
    process = start(mot, "transition", *words, log=tmp_path / "log")
    give_up = time.monotonic() + 120
    while not (out / "switch.json").exists():
        assert time.monotonic() < give_up
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.terminate()
    process.join()
    mot("transition", *words)
    models = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (transitioned[0], out)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    steps = [row["step"] for row in rows_of(out)]
    assert steps == [row["step"] for row in rows_of(transitioned[0])]


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["DENSE"],
            "only a Mixture of Tokens with a router can become Token Choice; this model has dense blocks alone",
        ),
        (["missing"], "missing is no finished run: there is no such directory"),
        (["MIXED", "--top-k", "9"], "--top-k must be 1 to 8, the number of experts, not 9"),
        (["MIXED", "--steps", "-1"], "--steps must be 0 or more, not -1"),
        (["MIXED", "--top-k", "1", "--norm-topk-prob"], "--norm-topk-prob needs 2 experts a token or more"),
        (["MIXED", "--top-k", "0"], "--top-k must be at least 1, not 0"),
        (["MIXED", "--scores", "softplus"], "softplus"),
        (["MIXED", "--calibrate", "full"], "full"),
        (["MIXED", "--distil-steps", "-1"], "--distil-steps must be at least 1, not -1"),
        (["MIXED", "--calibrate", "none", "--distil-steps", "2000"], "none leaves nothing for --distil-steps"),
        (
            ["MIXED", "--steps", "0", "--schedule", "decay"],
            "--steps 0 leaves nothing for --learning-rate or --schedule",
        ),
        (["MIXED", "--scores", "sigmoid", "--capacity", "1.25"], "--capacity 1.25 is for --scores softmax"),
        (["MIXED", "--capacity", "-1"], "--capacity must be positive and finite, not -1"),
        (["MIXED", "--calibrate", "scales"], "scales"),
        (["MIXED", "--anneal", "0.1"], "--anneal"),
        (["MIXED", "--control", "router"], "--control"),
        (["MIXED", "--out", "MIXED"], "is the source itself"),
        (["MIXED", "--out", "MIXED/new"], "is the source itself, or inside it"),
        (["MIXED", "--out", "taken"], "taken exists already"),
        (["WITHOUT"], "has no optimizer state to carry: it is not there; --optimizer fresh"),
        (["WITHOUT", "--optimizer", "frsh"], "optimizer"),
        (["SGD"], "only adamw_torch, adamw_torch_fused can be carried, not the state of sgd: --optimizer fresh"),
        (["FOREIGN", "--optimizer", "fresh"], "the tokenizer of "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_use_is_one_line_and_leaves_nothing(words, message, tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    named = {"DENSE": tiny_runs["Transformer-Nano"], "MIXED": tiny_runs[MIXED], "MIXED/new": tiny_runs[MIXED] / "new"}
    changes: dict[str, dict] = {"WITHOUT": {}, "SGD": {"training": {"optim": "sgd"}}}
    if words[0] in changes:
        named[words[0]] = copy_of(tiny_runs[MIXED], tmp_path / "copy", **changes[words[0]])
    elif words[0] == "FOREIGN":
        named[words[0]] = copy_of(tiny_runs[MIXED], tmp_path / "copy")
        facts = json.loads((tmp_path / "copy" / "run.json").read_text())
        facts["corpus"]["tokenizer"] = "another"
        (tmp_path / "copy" / "run.json").write_text(json.dumps(facts))
    before = hashes(tmp_path)
    words = [named.get(word, word) for word in words]
    if "--out" not in words:
        words += ["--out", "new"]
    with pytest.raises(SystemExit, match="2"):
        mot("transition", *words)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "segments" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert hashes(tmp_path) == before
    assert not list(tmp_path.glob("new*"))
