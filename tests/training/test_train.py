"""`mot train` and its neighbours, as a user runs them: on the embedded corpus, through the command line."""

import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging

from mixture_of_tokens import train
from mixture_of_tokens.commands import cli
from mixture_of_tokens.data import prepare as preparing
from mixture_of_tokens.data.groups import GroupedBatches, grouped_order
from mixture_of_tokens.data.prepare import prepare_text
from mixture_of_tokens.evaluation.losses import cross_entropy, evaluate_blocks
from mixture_of_tokens.generation.sampling import Sampling, continue_prompts
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.settings.layers import LATER
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.settings.routings import SETTINGS
from mixture_of_tokens.settings.routings import TABLE as ROUTINGS
from mixture_of_tokens.training import signals, trainer
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import build
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.process import Interrupted, ended_by_sigterm
from processes import mot, rows_of
from texts import groups_with_a_document_twice

NAMES = ("Transformer-Nano", "MoT-Nano/32E/4", "TC-Nano/32E")
STEPS, ROWS = 12, 64
BYTES = 400_000  # of the embedded corpus


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(directory):
    """Runs as short as a run can be."""
    made = {}
    for name in NAMES:
        made[name] = directory / name.replace("/", "-")
        flags = ("--training.logging_steps", 2, "--training.eval_steps", 6, "--device", "cpu", "--max-bytes", BYTES)
        sizes = ("--steps", STEPS, "--batch-size", ROWS, "--scored-rows", 10**6)
        mot("train", name, "--out", made[name], *sizes, *flags)
    return made


@pytest.fixture(scope="module")
def prepared(runs):
    return prepare_text(vocab_size=512, context=64, max_bytes=BYTES)


def test_a_part_of_a_text_is_its_first_groups(runs, prepared):
    model, text = AutoModelForCausalLM.from_pretrained(runs["MoT-Nano/32E/4"] / "model"), prepared.validation
    nats, tokens = cross_entropy(model, text.batch(grouped_order(text, 32)[:2].ravel()))
    part = evaluate_blocks(model, text, group_size=32, batch_size=32, groups=2)
    assert part == {"loss": pytest.approx(nats / tokens), "tokens": 2 * 32 * 64}


@pytest.mark.usefixtures("tiny_cache")
def test_curves_are_over_as_many_groups_as_make_the_rows_of_an_evaluation(small_corpus, tmp_path, monkeypatch):
    options = Options(steps=1, batch_size=8, data=[str(small_corpus)], device="cpu")
    run, arguments, placement, _ = merge("MoT-Nano/4E", 0, None, options)
    made, prepared = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    size = made.rows.group_size
    assert len(prepared.validation) > 4 * size
    monkeypatch.setattr(trainer, "EVALUATION_ROWS", 3 * size)
    losses = [
        evaluate_blocks(made.causal_lm, prepared.validation, group_size=size, batch_size=size, groups=groups)["loss"]
        for groups in (1, 3, 4)
    ]
    assert len(set(losses)) == 3
    assert made.loss_of(made.causal_lm) == pytest.approx(losses[1], rel=1e-6)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def test_metrics_have_every_logged_step_once(runs, name):
    rows = rows_of(runs[name])
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    assert [row["tokens"] for row in rows] == [row["step"] * ROWS * 64 for row in rows]
    assert [row["step"] for row in rows if "eval_loss" in row] == [6, 12]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows))
    assert all(row["learning_rate"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert all(0 < row["data_wait"] < 0.5 for row in rows)
    assert rows[0]["train_loss"] == pytest.approx(math.log(512), abs=0.3)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(("aux_loss" in row) == name.startswith("TC") for row in rows)


def slower(monkeypatch, place, name, seconds):
    """Let a function take so many seconds more, as far as the clock can tell; returns the seconds so far, in a list."""
    given, clock, late = getattr(place, name), time.perf_counter, [0.0]

    def slow(*arguments, **options):
        late[0] += seconds
        return given(*arguments, **options)

    monkeypatch.setattr(place, name, slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    return late


@pytest.mark.parametrize(
    "method", ["__getitems__", pytest.param("ready", marks=pytest.mark.slow)]
)  # batches; a part of the text
def test_time_in_which_training_waits_for_its_batches_is_told(method, small_corpus, tmp_path, monkeypatch):
    slower(monkeypatch, GroupedBatches, method, 100)
    flags = ["--steps", 4, "--batch-size", 8, "--device", "cpu", "--data", small_corpus, "--out", tmp_path / "run"]
    flags += ["--training.logging_steps", 2, "--training.eval_strategy", "no", "--training.save_strategy", "no"]
    mot("train", "MoT-Nano/4E", *flags)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert all(0.6 < row["data_wait"] <= 1 for row in rows)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_does_not_wait_for_text_that_is_still_prepared(number, small_corpus, tmp_path, monkeypatch, capsys):
    ready, waited = GroupedBatches.ready, []

    def slow(self, step):
        if step == 2:
            signal.raise_signal(number)
            waited.append(step)
        ready(self, step)

    monkeypatch.setattr(GroupedBatches, "ready", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    flags = ["--steps", 4, "--batch-size", 8, "--device", "cpu", "--data", small_corpus, "--out", tmp_path / "run"]
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            mot("train", "MoT-Nano/4E", *flags)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not waited
    what = f"stopped by {number.name} after step 2, which is saved; --resume goes on"
    assert what in capsys.readouterr().err


def test_from_python_a_signal_is_an_exception_that_names_the_run(small_corpus, tmp_path, monkeypatch, capsys):
    ready, out = GroupedBatches.ready, tmp_path / "run"
    monkeypatch.setattr(
        GroupedBatches, "ready", lambda self, step: signal.raise_signal(signal.SIGTERM) if step == 2 else ready(self, 0)
    )
    options = Options(steps=4, batch_size=8, data=small_corpus, device="cpu")
    with pytest.raises(Interrupted) as interrupted:
        train("MoT-Nano/4E", out=out, options=options)
    assert (interrupted.value.number, interrupted.value.directory) == (signal.SIGTERM, out)
    assert str(interrupted.value) == "stopped by SIGTERM after step 2, which is saved; resume goes on"
    assert "stopped by" not in capsys.readouterr().err
    monkeypatch.undo()
    assert train("MoT-Nano/4E", out=out, options=options, resume=True) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_signal_while_text_is_prepared_leaves_nothing(command, number, small_corpus, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.raise_signal(number)

    monkeypatch.setattr(preparing, "tokenize", interrupted)
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    out = ["--out", tmp_path / "run"] if command == "train" else []
    with pytest.raises(SystemExit, match=str(128 + number)):
        mot(command, "MoT-Nano/4E", "--data", small_corpus, *(["--device", "cpu"] if out else []), *out)
    assert "mot: stopped" in capsys.readouterr().err
    left = [path.name for path in tmp_path.rglob("*")]
    assert left == ["cache"]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_run_is_the_same_whatever_the_process_has_set(dtype, small_corpus, tmp_path):
    """Its default type, its progress bars, and handlers that Python has not set."""
    options = Options(steps=2, batch_size=8, data=small_corpus, device="cpu")
    plain = train("MoT-Nano/4E", out=tmp_path / "plain", options=options)
    before = torch.get_default_dtype()
    logging.enable_progress_bar()
    try:
        torch.set_default_dtype(dtype)
        other = train("MoT-Nano/4E", out=tmp_path / "other", options=options)
        assert torch.get_default_dtype() == dtype
        assert logging.is_progress_bar_enabled()
    finally:
        torch.set_default_dtype(before)
        logging.disable_progress_bar()
    weights = [load_file(run.directory / "model" / "model.safetensors") for run in (plain, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert plain.facts.final_loss == other.facts.final_loss


def test_a_handler_that_was_not_set_from_python_is_replaced(monkeypatch):
    """As of an interpreter in another program: Python says None, and does not take it back."""
    install, asked = signal.signal, []

    def told(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        asked.append(handler)
        install(number, handler)

    before = install(signal.SIGTERM, signal.SIG_DFL), install(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(signals.signal, "signal", told)
    try:
        with signals.StopOnSignal(int).installed(), ended_by_sigterm():
            assert len(asked) == 3
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        install(signal.SIGTERM, before[0])
        install(signal.SIGINT, before[1])


@pytest.mark.slow
def test_the_clock_stands_still_while_a_run_evaluates_and_saves(small_corpus, tmp_path, monkeypatch):
    late = [
        slower(monkeypatch, place, name, 1000) for place, name in ((RunTrainer, "loss_of"), (trainer, "save_optimizer"))
    ]
    flags = ["--steps", 2, "--batch-size", 8, "--device", "cpu", "--data", small_corpus, "--out", tmp_path / "run"]
    mot("train", "MoT-Nano/4E", *flags, "--training.eval_steps", 1, "--training.save_steps", 1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] < 1000
    assert late == [[5000], [2000]]  # with three ways to serve it at the end


@pytest.mark.parametrize(("strategy", "told"), [("steps", ", which is saved"), ("no", "")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_end_says_what_is_saved(number, strategy, told, small_corpus, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        if number == signal.SIGINT:  # which processes in the background ignore
            raise KeyboardInterrupt
        signal.raise_signal(number)

    monkeypatch.setattr("mixture_of_tokens.training.train._finish", interrupted)
    flags = ["--steps", 1, "--batch-size", 8, "--device", "cpu", "--data", small_corpus, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match=str(128 + number)):
        mot("train", "MoT-Nano/4E", *flags, "--training.save_strategy", strategy)
    assert f"mot: stopped after the last step{told}; --resume goes on\n" in capsys.readouterr().err


def test_the_saved_model_has_the_loss_that_the_run_reports(runs, name, prepared):
    facts = json.loads((runs[name] / "run.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(runs[name] / "model")
    again = evaluate_blocks(model, prepared.validation, group_size=32, batch_size=ROWS)
    assert again["loss"] == pytest.approx(facts["final_loss"], abs=1e-6)
    assert again["tokens"] == prepared.facts["validation"]["tokens"] - 1
    assert facts["bits_per_byte"] == pytest.approx(
        again["loss"] * again["tokens"] / math.log(2) / prepared.facts["validation"]["bytes"]
    )
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["corpus"] == prepared.facts
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["seconds"], rel=0.01)
    assert set(facts["versions"]) > {"python", "torch", "transformers"}


def test_the_spread_over_regroupings_stands_beside_the_loss_of_a_mixture(runs, name, prepared):
    spread = json.loads((runs[name] / "run.json").read_text())["regrouping_spread"]
    if name.startswith(("Transformer", "TC")):
        assert spread is None
        return
    model = AutoModelForCausalLM.from_pretrained(runs[name] / "model")
    sizes = {"group_size": 32, "batch_size": ROWS}
    losses = [evaluate_blocks(model, prepared.validation, seed=seed, **sizes)["loss"] for seed in range(3)]
    assert 0 < spread == pytest.approx(max(losses) - min(losses), abs=1e-6)


def test_the_tokenizer_is_saved_beside_the_model(runs, prepared):
    tokenizer = AutoTokenizer.from_pretrained(runs["Transformer-Nano"] / "model")
    assert tokenizer.model_max_length == 64
    text = "def f(x):\n    return x"
    assert tokenizer(text)["input_ids"] == prepared.tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_the_written_configuration_trains_the_same_model_again(runs, directory):
    first = runs["MoT-Nano/32E/4"]
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert (config["name"], config["steps"], config["batch_size"]) == ("MoT-Nano/32E/4", STEPS, ROWS)
    again = directory / "again"
    mot("train", "--config", first / "config.yaml", "--out", again, "--device", "cpu")
    assert yaml.safe_load((again / "config.yaml").read_text()) == config
    models = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (first, again)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.usefixtures("tiny_cache")
def test_another_seed_is_another_model_on_rows_in_another_order(small_corpus, tmp_path):
    options = Options(steps=2, batch_size=32, data=[str(small_corpus)], device="cpu")
    weights, rows = [], []
    for seed in (0, 1, 1):
        run, arguments, placement, _ = merge("MoT-Nano/4E/2", seed, None, options)
        trainer, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
        weights.append([parameter.detach() for parameter in trainer.causal_lm.parameters() if parameter.std()])
        rows.append(trainer.rows.block_numbers(list(range(64))).tolist())
    assert not any(torch.equal(*pair) for pair in zip(*weights[:2], strict=True))
    assert all(torch.equal(*pair) for pair in zip(*weights[1:], strict=True))
    assert rows[0] != rows[1] == rows[2]


def test_flags_and_file_reach_model_and_trainer(directory, capsys):
    file = directory / "flags.yaml"
    model = "  router_temperature: 0.25\n  capacity_factor: null\n"
    file.write_text(f"steps: 7\nmodel:\n{model}training:\n  weight_decay: 0.5\n")
    mot("train", "TC-Nano/32E", "--config", file, "--steps", 9, "--training.max_grad_norm", "1e-1", "--dry-run")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["steps"] == 9
    assert (shown["training"]["weight_decay"], shown["training"]["max_grad_norm"]) == (0.5, 0.1)
    assert shown["training"]["warmup_steps"] == 0
    assert shown["model"]["router_temperature"] == 0.25
    assert shown["model"]["capacity_factor"] is None  # not the default, which drops
    file.write_text(yaml.safe_dump(shown))
    mot("train", "--config", file, "--dry-run")
    assert yaml.safe_load(capsys.readouterr().out) == shown
    mot("train", "TC-Nano/8E", "--config", file, "--dry-run")
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "TC-Nano/8E"


@pytest.mark.parametrize(
    "name", ["Transformer-Nano", "MoT-Nano/32E/8", "TC-Nano/32E", "STC-Nano/32E", "ReMoE-Nano/32E"]
)
def test_a_configuration_has_the_settings_that_its_model_reads_and_no_others(name, capsys):
    mot("train", name, "--dry-run")
    shown = yaml.safe_load(capsys.readouterr().out)
    settings = {setting for routing in config_from_name(name).routings for setting in routing.settings}
    assert shown["model"].keys() & SETTINGS.keys() == settings - LATER.keys()
    assert not shown["model"].keys() & {"initializer_range", "decoder_sparse_step", "mlp_only_layers"}


def test_of_a_run_s_configuration_another_name_takes_what_was_chosen(directory, capsys):
    def shown(*words):
        mot("train", *words, "--dry-run")
        return yaml.safe_load(capsys.readouterr().out)

    file = directory / "of-a-run.yaml"
    chosen = ("--learning-rate", 0.003, "--model.initializer_scale", 0.5, "--training.weight_decay", 0.5)
    file.write_text(yaml.safe_dump(shown("MoT-Nano/32E/4", "--steps", 300, *chosen)))
    for name in ("MoT-Nano/8E", "TC-Nano/32E"):
        plain = shown(name, "--steps", 300)
        plain["learning_rate"] = 0.003
        plain["model"]["initializer_scale"] = 0.5
        plain["training"]["weight_decay"] = 0.5
        assert shown(name, "--config", file) == plain
    longer = shown("MoT-Nano/32E/4", "--steps", 6000, *chosen)
    assert shown("--config", file, "--steps", 6000) == longer
    assert longer["training"]["warmup_steps"] == 100 != shown("--config", file)["training"]["warmup_steps"]


@pytest.mark.parametrize(("word", "value"), [("no", False), ("off", False), ("true", True), ("yes", True)])
def test_a_word_for_a_flag_of_two_values_is_not_just_a_word(word, value, capsys):
    given = ("--model.normalize_mixture", word, "--training.torch_compile", word, "--training.eval_strategy", "no")
    mot("train", "MoT-Nano/32E", *given, "--dry-run")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["normalize_mixture"], shown["training"]["torch_compile"]) == (value, value)
    assert shown["training"]["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("field", "value", "does"),
    [
        ("initializer_range", "0.5", "--model.initializer_scale"),
        ("decoder_sparse_step", "2", "--model.mlp_layer_types"),
        ("mlp_only_layers", "[0]", "--model.mlp_layer_types"),
        ("eos_token_id", "5", "the tokenizer"),
        ("pad_token_id", "5", "the tokenizer"),
    ],
)
def test_a_field_that_would_do_nothing_is_refused_and_what_does_is_named(field, value, does):
    with pytest.raises(ValueError, match=rf"--model.{field} .* would do nothing; {does} does$"):
        merge("MoT-Nano/4E", 0, None, Options(model={field: value}))
    anyway = {"initializer_range": "0.02", "decoder_sparse_step": "1", "mlp_only_layers": "[0, 1]"}
    merge("MoT-Nano/4E", 0, None, Options(model={field: anyway.get(field, "null")}))


@pytest.mark.parametrize("field", ["return_dict", "problem_type", "architectures"])
def test_what_every_model_of_transformers_has_is_no_flag(field):
    with pytest.raises(ValueError, match=f"model.{field} is no setting"):
        merge("MoT-Nano/4E", 0, None, Options(model={field: "false"}))


def test_products_are_in_full_precision_and_only_a_gpus_batches_are_pinned():
    made = merge("MoT-Nano/4E", 0, None, Options(device="cpu", training={"torch_compile": "true"}))
    assert (made.arguments["tf32"], made.arguments["dataloader_pin_memory"]) == (False, False)
    assert "tf32" not in made.config.training
    assert merge("MoT-Nano/4E", 0, None, Options(training={"dataloader_pin_memory": "true"})).arguments[
        "dataloader_pin_memory"
    ]


@pytest.mark.slow
def test_accumulation_takes_the_same_rows_and_gives_the_same_model(directory, runs):
    out = directory / "accumulated"
    flags = ("--training.logging_steps", 2, "--training.eval_steps", 6, "--device", "cpu")
    flags += ("--training.gradient_accumulation_steps", 2, "--max-bytes", BYTES)
    mot("train", "MoT-Nano/32E/4", "--out", out, "--steps", STEPS, "--batch-size", ROWS, *flags)
    losses = []
    for run in (runs["MoT-Nano/32E/4"], out):
        losses.append([json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # sums in another order; 1e-6 after the first step


def test_no_group_of_the_embedded_corpus_holds_a_document_twice(prepared):
    for epoch in range(3):
        assert not groups_with_a_document_twice(prepared.train, grouped_order(prepared.train, 32, epoch=epoch))
    everything = grouped_order(prepared.validation, 32, everything=True)
    assert not groups_with_a_document_twice(prepared.validation, everything)
    assert groups_with_a_document_twice(prepared.train, np.arange(len(prepared.train) // 32 * 32).reshape(-1, 32))


def test_help_is_printed_once(capsys):
    mot("train", "--help")
    assert capsys.readouterr().out.count("Usage:") == 1


def test_prompts_are_continued_and_bad_ones_refused(runs, prepared):
    model = AutoModelForCausalLM.from_pretrained(runs["MoT-Nano/32E/4"] / "model")
    first = continue_prompts(model, prepared.tokenizer, ["def ", "class A:\n    "], Sampling(max_new_tokens=8))
    assert first == continue_prompts(model, prepared.tokenizer, ["def ", "class A:\n    "], Sampling(max_new_tokens=8))
    assert all(first)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        continue_prompts(model, prepared.tokenizer, ["def ", ""])
    with pytest.raises(ValueError, match="leaves no room in the context of 64"):
        continue_prompts(model, prepared.tokenizer, ["x = 1\n" * 100])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "MoT-Nan/32E"], "'Nan' is none of Nano, Micro, Mini, Medium, Base; did you mean Nano?"),
        (["train", "MoT-Nano/32E/5"], "granularity 5 does not divide the feed-forward width 96; legal are 1, 2, 3, 4,"),
        (["train", "MoT-Nano/32E", "--batch-size", 100], "group size 32; 96 or 128 would be"),
        (["train", "MoT-Nano/32E", "--batch-size", 8], "group size 32; 32 would be"),
        (
            ["train", "MoT-Nano/32E", "--batch-size", 64, "--training.gradient_accumulation_steps", 4],
            "multiples of the group size 32; give a multiple of 128 as --batch-size",
        ),
        (["train", "MoT-Nano/32E", "--training.learning_rate", 1], "has a flag of its own: --learning-rate"),
        (["train", "MoT-Nano/32E", "--steps", 0], "--steps must be positive, not 0"),
        (["train", "MoT-Nano/32E", "--learning-rate", "1e-2,2e-2"], "mot sweep and mot compare take several"),
        (
            ["train", "MoT-Nano/32E", "--model.router_temperature", "0.5,1"],
            "one value, not '0.5,1.0'; mot sweep tries several",
        ),
        (
            ["train", "MoT-Nano/32E", "--shard", 2],
            "--shard 2 is for 2 processes (torchrun --nproc-per-node), or a multiple, and there is one",
        ),
        (["data-report", "few.txt", "--context", 0], "--context must be at least 1, not 0"),
        (
            ["train", "MoT-Nano/32E", "--device", "cpu", "--model.attn_implementation", "flex_attention"],
            "flex_attention has no backward pass on a CPU; legal there are eager and sdpa",
        ),
        (["compare", "MoT-Nano/32E", "--training.eval_strategy", "no"], "eval_strategy no leaves no curves to compare"),
        (
            ["compare", "MoT-Nano/32E", "--steps", 100, "--training.eval_delay", 101],
            "--training.eval_delay is beyond the last step, which leaves no curves to compare",
        ),
        (
            ["compare", "Transformer-Nano", "MoT-Nano/64E"],
            "the size of their groups (--model.group_size N gives all the same batches): 32 and 64",
        ),
        (
            ["compare", "Transformer-Nano", "MoT-Nano/4E", "--batch-size", 16],
            "groups (--batch-size 32 or --model.group_size N gives all the same batches): 1 and 4",
        ),
        (
            ["train", "MoT-Nano/32E", "--steps", 20, "--training.warmup_steps", 21],
            "--training.warmup_steps 21 is more than the 20 steps of the training",
        ),
        (["train", "MoT-Nano/32E", "--expert-parallel", 2], "--expert-parallel 2 is for 2 processes (torchrun"),
        (["train", "MoT-Nano/32E", "--config", "."], "--config .: it is a directory"),
        (["train", "MoT-Nano/32E", "--learning-rate", "nan"], "--learning-rate takes a finite number, not 'nan'"),
        (["train", "MoT-Nano/32E", "--model.router_temprature", 1], "did you mean router_temperature?"),
        (["train", "MoT-Nano/32E", "--training.wight_decay", 1], "did you mean weight_decay?"),
        (
            ["train", "MoT-Nano/32E", "--model.router_temperature", -1],
            "router_temperature must be at least 1e-20, not -1",
        ),
        (["train", "MoT-Nano/32E", "--model.router_dtype", "half"], "legal are float32, bfloat16, float64"),
        (["train", "MoT-Nano/32E", "--model.group_size", 0], "group_size must be at least 1, not 0"),
        (["train", "MoT-Nano/32E", "--model.hidden_act", "tanh"], "legal are silu, relu, gelu"),
        (["train", "MoT-Nano/32E", "--model.gated", "maybe"], "--model.gated takes true or false, not 'maybe'"),
        (["train", "MoT-Nano/32E", "--model.hidden_size", "x"], "--model.hidden_size takes a whole number, not 'x'"),
        (["train", "MoT-Nano/32E", "--model.capacity_factor", "x"], "takes a number or null, not 'x'"),
        (
            ["train", "MoT-Nano/32E", "--model.mlp_layer_types", "[1,2,3,4]"],
            "--model.mlp_layer_types takes a list of words or null, not [1, 2, 3, 4]",
        ),
        (["train", "MoT-Nano/32E", "--model.dtype", "foo"], "--model.dtype 'foo' is unknown; legal are float32"),
        (["train", "MoT-Nano/32E", "--model.dtype", "int64"], "legal are float32, bfloat16, float64"),
        (["train", "MoT-Nano/32E", "--model.dtype", "float16"], "legal are float32, bfloat16, float64"),
        (["train", "MoT-Nano/32E", "--model.head_dim", 7], "head_dim must be even, for rotary positions, not 7"),
        (["train", "MoT-Nano/32E", "--model.num_key_value_heads", 3], "does not divide num_attention_heads 1"),
        (["train", "MoT-Nano/32E", "--seed", -1], "--seed must be 0 to 4294967295, not -1"),
        (["train", "MoT-Nano/32E", "--training.weight_decay", "x"], "--training.weight_decay takes a number, not 'x'"),
        (["train", "MoT-Nano/32E", "--training.logging_steps", 0], "--training.logging_steps must be positive, not 0"),
        (["train", "MoT-Nano/32E", "--training.gradient_accumulation_steps", -2], "must be positive, not -2"),
        (
            ["train", "MoT-Nano/32E", "--training.per_device_eval_batch_size", 8],
            "per_device_eval_batch_size 8 must be a multiple of the group size, 32",
        ),
        (["train", "MoT-Nano/32E", "--training.report_to", "no-such"], "no-such: it is not installed; there is"),
        (["train", "MoT-Nano/32E", "--training.fsdp", "full_shard"], "--training.fsdp has a flag of its own: --shard"),
        (["train", "MoT-Nano/32E", "--steps", "many"], "--steps takes a whole number, not 'many'"),
        (["train", "MoT-Nano/32E", "--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", "MoT-Nano/32E", "--device", "tpu"], 'Choose from: "cpu", "cuda"'),
        (["train", "MoT-Nano/32E", "--stps", 3], "Did you mean --steps?"),
        (
            ["train", "MoT-Nano/32E", "--config", "stps.yaml"],
            "Unknown option: --stps from stps.yaml. Did you mean --steps?",
        ),
        (["train", "MoT-Nano/32E", "--lr", 3], "Unknown option: --lr. Here it is --learning-rate."),
        (["train", "MoT-Nano/32E", "--group-size=16"], "Here the model's name has it, as in MoT-Nano/16E/8"),
        (["train", "MoT-Nano/32E", "--lora", 3], "Unknown option: --lora. mot train --help shows what is legal."),
        (["train", "MoT-Nano/32E", "--config", "wight.yaml"], "did you mean weight_decay?"),
        (["train", "MoT-Nano/32E", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "MoT-Nano/32E", "--data", "empty.txt"], "empty.txt"),
        (["train", "MoT-Nano/32E", "--data", "binary.txt"], "binary.txt"),
        (["train", "MoT-Nano/32E", "--data", "latin1.txt"], "latin1.txt"),
        (["train", "MoT-Nano/32E", "--data", "rows.jsonl", "--field", "body"], "body"),
        (["train", "MoT-Nano/32E", "--data", "short.txt"], "less than a block of 64: give more text"),
        (
            ["train", "MoT-Nano/32E", "--data", "few.txt"],
            "9 blocks of 64 tokens do not fill two groups of 32: give at least 8 times as much text",
        ),
        (["prepare", "MoT-Nano/32E", "--data", "few.txt"], "9 blocks of 64 tokens do not fill two groups of 32"),
        (["train", "MoT-Nano/32E", "--max-bytes", 0], "--max-bytes must be positive, not 0"),
        (["train", "MoT-Nano/32E", "--tokenizer", "rows.jsonl"], "rows.jsonl"),
        (["train", "MoT-Nano/32E", "--model.vocab_size", 100], "at least 257"),
        (["train", "MoT-Nano/32E", "--model.hidden_size", 0], "hidden_size"),
        (["train", "MoT-Nano/32E", "--model.num_experts", -3], "num_experts"),
        (["train", "MoT-Nano/32E", "--model.rope_parameters.rope_theta", 1e6], "a field is given whole"),
        (["train", "MoT-Nano/32E", "--out", "short.txt/run"], "short.txt is no directory that can be written to"),
        (["sweep", "MoT-Nano/32E", "--seeds", "a"], "'a' is no whole number"),
        (["sweep", "MoT-Nano/32E", "--seeds", "0,1,0"], "--seeds has 0 twice; each seed is one run"),
        (["compare", "MoT-Nano/32E", "--seeds", "1,1"], "--seeds has 1 twice"),
        (
            ["train", "MoT-Nano/32E", "--training.num_train_epochs", 3],
            "--training.num_train_epochs has a flag of its own: --steps",
        ),
        (["data-report", "nowhere"], "nowhere"),
        (
            ["train", "MoT-Nano/32E", "--data", "few.txt", "short.txt"],
            "'short.txt': a word too many; a flag with several values is repeated",
        ),
        (["train", "MoT-Nano/33E"], "a batch of 128 is no multiple of the group size 33; 99 or 132 would be"),
        (["train", "MoT-Nano/32E", "--out", "few.txt"], "few.txt is a file; name a directory with --out"),
        (["compare", "MoT-Nano/32E", "--out", "few.txt"], "few.txt cannot be made a directory: File exists"),
        (["sweep", "MoT-Nano/32E", "--learning-rate", 0.1, "--out", "few.txt"], "few.txt cannot be made a directory"),
        (["report", "few.txt"], "few.txt is no finished run: it is a file"),
        (["export", "nowhere", "out"], "nowhere: there is no such directory"),
        (["train"], "NAME is missing, such as MoT-Nano/32E/8"),
        (["sweep"], "NAME is missing, such as MoT-Nano/32E/8"),
        (["plan", "MoT-Nano/32E", "--micro-batch", 33], "legal are 32, 64, 128"),
        (["report", "nowhere"], "no finished run"),
        (["report"], "name at least one run directory"),
        (["compare"], "name at least one model"),
        (["compare", "MoT-Nano/32E", "MoT-Nano/32E"], "named twice"),
        (["compare", "Transformer-Nano", "MoT-Nan/32E"], "'Nan' is none of Nano, Micro, Mini, Medium, Base"),
        (
            ["compare", "Transformer-Nano", "Transformer-Mini"],
            "they differ in --model.max_position_embeddings: 64 and 256",
        ),
        (["compare", "Transformer-Nano", "MoT-Nano/32E", "--learning-rate", "1,2,3"], "3 rates for 2 models"),
        (
            ["compare", "Transformer-Nano", "MoT-Nano/32E", "--learning-rate", "1e-2,fast"],
            "--learning-rate: 'fast' is no number",
        ),
        (["compare", "Transformer-Nano", "MoT-Nano/32E", "--seeds", "0;1"], "--seeds: '0;1' is no whole number"),
        (["trian", "MoT-Nano/32E"], 'Did you mean "train"?'),
        (
            ["train", "MoT-Nano/4E", "--out", os.fsdecode(b"r\xe9")],
            r"--out b'r\xe9' is not UTF-8: name another directory",
        ),
    ],
)
def test_bad_input_gets_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"empty.txt": b"", "binary.txt": b"\x00\x01", "latin1.txt": b"caf\xe9", "short.txt": b"too short\nby far"}
    files |= {"rows.jsonl": b'{"text": "a"}\n', "stps.yaml": b"stps: 3", "wight.yaml": b"training: {wight_decay: 1}"}
    files["few.txt"] = b"\n".join(b"line %d is not line %d" % (i, i * i) for i in range(100))
    for name, content in files.items():
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        mot(*words)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len([line for line in err.splitlines() if "segments" not in line]) == 1
    assert err.splitlines()[-1].startswith("mot: error: ")
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == set(files)  # nothing half-written


@pytest.mark.slow
def test_one_small_file_will_do_and_the_run_says_what_counts_as_documents(directory, capsys):
    text, out = directory / "one.txt", directory / "one"
    text.write_text("\n".join(f"line {i} says {i * i % 977} and {i * 31 % 1013}" for i in range(2000)))
    mot("train", "MoT-Nano/32E", "--data", text, "--out", out, "--steps", 2, "--batch-size", 32, "--device", "cpu")
    assert "segments" in capsys.readouterr().err
    facts = json.loads((out / "run.json").read_text())
    splits = [facts["corpus"][split] for split in ("train", "tuning", "validation")]
    assert sum(split["bytes"] for split in splits) == len(text.read_bytes())
    assert (segments := facts["corpus"]["segments"]) > 0
    assert math.isfinite(facts["bits_per_byte"])
    mot("audit", out, "--batches", 1, "--device", "cpu")
    shown = capsys.readouterr().out
    assert "in a group with another of their segment: 0\n" in shown
    assert f"{segments:,} segments" in shown


def test_a_given_tokenizer_sets_the_vocabulary(runs, directory, small_corpus, capsys):
    out, tokenizer = directory / "given", runs["Transformer-Nano"] / "model"
    flags = ("--data", small_corpus, "--steps", 2, "--batch-size", 32, "--device", "cpu")
    mot("train", "TC-Nano/32E", "--tokenizer", tokenizer, "--out", out, *flags)
    assert (
        AutoTokenizer.from_pretrained(out / "model").get_vocab() == AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    )
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size == 512
    mot("train", "--config", out / "config.yaml", "--out", directory / "given-again", "--device", "cpu")
    with pytest.raises(SystemExit) as stopped:
        mot(
            "train",
            "TC-Nano/32E",
            "--tokenizer",
            tokenizer,
            "--model.vocab_size",
            300,
            "--out",
            directory / "x",
            *flags,
        )
    assert stopped.value.code == 2
    assert "vocab_size 300 is less than the 512 ids of" in capsys.readouterr().err


def test_a_run_ends_and_is_compared_where_its_tokenizer_cannot_write_the_sample_prompts(tmp_path, capsys):
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<|endoftext|>", *"ACGT"])}, merges=[]))
    made.save(str(tmp_path / "dna.json"))
    for number in range(40):
        letters = torch.randint(4, (600,), generator=torch.manual_seed(number)).tolist()
        (tmp_path / f"{number:02}.txt").write_text("".join("ACGT"[letter] for letter in letters))
    words = ["--steps", 2, "--batch-size", 8, "--data", tmp_path / "*.txt", "--tokenizer", tmp_path / "dna.json"]
    mot("train", "Transformer-Nano", *words, "--device", "cpu", "--out", tmp_path / "run")
    shown = capsys.readouterr().out
    assert "nats a token" in shown
    assert "continued" not in shown
    assert "causal" not in shown
    mot("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_too_little_memory_of_a_gpu_is_one_line(monkeypatch, capsys):
    def run(words: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SystemExit, match="2"):
        mot("train")
    way = "in training, --training.gradient_accumulation_steps N needs less"
    assert capsys.readouterr().err == f"mot: error: CUDA out of memory; {way}\n"


def test_too_little_memory_of_numpy_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda words: np.empty(2**62, dtype=np.uint8))
    with pytest.raises(SystemExit, match="2"):
        mot("data-report")
    assert re.fullmatch(r"mot: error: there is too little memory: Unable to allocate .*\n", capsys.readouterr().err)


def test_too_little_memory_of_a_cpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda words: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(SystemExit, match="2"):
        mot("train")
    said = capsys.readouterr().err
    assert "can't allocate memory: you tried to allocate 4611686018427387904 bytes; in training, --training" in said
    assert said.count("\n") == 1


def test_a_checkout_that_is_not_installed_has_no_version():
    found = provenance.versions(("torch", "not-installed-anywhere"))
    assert (found["torch"], found["not-installed-anywhere"]) == (importlib.metadata.version("torch"), None)


def test_a_checkout_whose_files_have_changed_has_a_commit_with_a_plus(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "__file__", str(file := tmp_path / "provenance.py"))
    file.write_text("one")
    git("init")
    assert provenance.commit() is None
    git("add", ".")
    git("commit", "--no-gpg-sign", "-m", "one")
    clean = provenance.commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "beside.py").write_text("in no commit")
    assert provenance.commit() == clean
    file.write_text("two")
    assert provenance.commit() == f"{clean}+"


def test_an_existing_run_is_not_overwritten(runs, capsys):
    before = {path: path.stat().st_mtime_ns for path in runs["MoT-Nano/32E/4"].rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        mot("train", "MoT-Nano/32E/4", "--out", runs["MoT-Nano/32E/4"], "--steps", STEPS)
    assert stopped.value.code == 2
    assert "exists already and is a finished run; see it by mot report" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in runs["MoT-Nano/32E/4"].rglob("*")} == before


def test_every_row_has_the_gradients_of_the_routers(directory, small_corpus):
    out, flags = directory / "first", ("--training.logging_steps", 2, "--training.logging_first_step", "true")
    mot("train", "MoT-Nano/4E", "--out", out, "--steps", 4, "--batch-size", ROWS, "--data", small_corpus, *flags)
    rows = [row for row in rows_of(out) if "train_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4]
    norms = [row["layers"]["3"]["router_gradient_norm"] for row in rows]
    assert all(norms)
    assert len(set(norms)) == 3


@pytest.mark.parametrize(
    ("training", "model", "expected"),
    [
        ({}, {}, "sdpa"),
        ({"bf16": "true"}, {}, "eager"),
        pytest.param({}, {"dtype": "bfloat16"}, "eager", marks=pytest.mark.slow),
        pytest.param({"bf16": "true"}, {"attn_implementation": "sdpa"}, "sdpa", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("tiny_cache")
def test_attention_in_half_precision_on_a_cpu_is_by_products(training, model, expected, small_corpus, tmp_path):
    options = Options(
        steps=1,
        batch_size=8,
        data=[str(small_corpus)],
        device="cpu",
        training=training | {"eval_strategy": "no"},
        model=model,
    )
    run, arguments, placement, _ = merge("MoT-Nano/4E", 0, None, options)
    trainer, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    assert trainer.causal_lm.config._attn_implementation == expected
    trainer.train()
    trainer.causal_lm.save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model")).config._attn_implementation == model.get("attn_implementation", "sdpa")


@pytest.mark.usefixtures("tiny_cache")
def test_a_second_training_in_one_process_is_refused(small_corpus, tmp_path, monkeypatch):
    """Both would draw from torch's one generator."""
    options = Options(steps=1, batch_size=8, data=[str(small_corpus)], device="cpu")
    told, trained = [], RunTrainer.train

    def second():
        with pytest.raises(ValueError, match="another thread of this process is training") as refused:
            train("MoT-Nano/4E", out=tmp_path / "second", options=options)
        told.append(str(refused.value))

    def another(self, *args):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return trained(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "train", another)
        train("MoT-Nano/4E", out=tmp_path / "first", options=options)
    assert told
    assert not (tmp_path / "second").exists()
    train("MoT-Nano/4E", out=tmp_path / "second", options=options)


@pytest.mark.usefixtures("tiny_cache")
def test_a_learned_temperature_is_not_decayed(small_corpus, tmp_path):
    options = Options(
        steps=1, batch_size=8, data=[str(small_corpus)], device="cpu", model={"learnable_temperature": "true"}
    )
    run, arguments, placement, _ = merge("MoT-Nano/4E", 0, None, options)
    trainer, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    names = {parameter: name for name, parameter in trainer.causal_lm.named_parameters()}
    decayed, kept = ({names[each] for each in group["params"]} for group in trainer.create_optimizer().param_groups)
    learned = {name for name in names.values() if name.endswith("log_temperature")}
    assert len(learned) == 2
    assert learned < kept
    assert sum(name.endswith("gate.weight") for name in decayed) == 2


@pytest.mark.usefixtures("tiny_cache")
def test_a_learned_temperature_is_in_fp32_where_weights_are_bf16(small_corpus, tmp_path):
    model = {"dtype": "bfloat16", "learnable_temperature": "true"}
    options = Options(steps=4, batch_size=8, data=[str(small_corpus)], device="cpu", model=model)
    run, arguments, placement, _ = merge("MoT-Nano/4E", 0, None, options)
    trainer, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    dtypes = {name: parameter.dtype for name, parameter in trainer.causal_lm.named_parameters()}
    learned = {name for name in dtypes if name.endswith("log_temperature")}
    assert len(learned) == 2
    assert all(dtype == (torch.float32 if name in learned else torch.bfloat16) for name, dtype in dtypes.items())


IN_BF16 = ("Transformer-Nano", *(f"{row.prefix}-Nano/4E" for row in ROUTINGS if row.sparse))
FAST = ("MoT-Nano/4E", "STC-Nano/4E", "ET-Nano/4E")  # with companions, biases and thresholds


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in IN_BF16])
@pytest.mark.usefixtures("tiny_cache")
def test_training_in_bf16_alone_has_all_weights_and_moments_in_bf16(name, small_corpus, tmp_path):
    """What thresholds and biases add up to stays in fp32, and the model that is saved is the one that was trained."""
    fields = {"eval_strategy": "no", "save_steps": "2"}
    options = Options(
        steps=4, batch_size=8, data=[str(small_corpus)], device="cpu", training=fields, model={"dtype": "bfloat16"}
    )
    run, arguments, placement, _ = merge(name, 0, None, options)
    trainer, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    model = trainer.causal_lm
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(buffer.dtype == torch.bfloat16 for buffer in model.buffers())
    moments = [moment for state in trainer.optimizer.state.values() for moment in state.values() if moment.ndim]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    assert sum(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)) > len(before) / 2
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())

    resumed, _ = build(run, TrainingArguments(str(tmp_path), **arguments), placement)
    resumed.train(tmp_path / "checkpoint-2")
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.causal_lm.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_every_run_of_a_process_is_compiled(small_corpus, tmp_path):
    """torch compiles a function for a limited number of models, and a comparison trains many of one class."""
    fields = {"torch_compile": "true", "torch_compile_backend": "eager", "eval_strategy": "no"}
    options = Options(steps=1, batch_size=8, data=[str(small_corpus)], device="cpu", training=fields)
    for seed in range(2):
        counters.clear()
        with torch._dynamo.config.patch(recompile_limit=1):
            train("Transformer-Nano", out=tmp_path / str(seed), seed=seed, options=options)
        assert counters["frames"]["ok"] > 0
