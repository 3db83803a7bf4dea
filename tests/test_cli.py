"""The command line over the functions: help, what is printed, and that a notebook gets the same."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mixture_of_tokens
from mixture_of_tokens.commands import cli
from mixture_of_tokens.data.prepare import prepare_text
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.runs.run import Run
from processes import function, mot


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_public_function_whose_docstring_is_its_help(name, capsys):
    command = function(name)
    assert getattr(mixture_of_tokens, name.replace("-", "_")) is command
    doc = inspect.getdoc(command) or ""
    assert doc.partition("\n")[0] == cli.COMMANDS[name]
    mot(name, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--json" in shown
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in ("stream", "options"):
            flag = "from" if parameter.name == "start" else parameter.name.replace("_", "-")  # from is a word of Python
            assert f"--{flag}" in shown or parameter.name.upper() in shown


def test_an_error_shows_where_it_was_raised_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("MOT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no-such-run"):
        cli.main(["evaluate", "no-such-run"])


def test_the_list_of_commands_has_a_line_for_each(capsys):
    mot("--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f" {name} {line}" in shown for name, line in cli.COMMANDS.items())


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("evaluate", {"regroupings": 1}, ["--regroupings", "1"]),
        ("audit", {"batches": 1}, ["--batches", "1"]),
        ("generate", {"prompt": ["a", "b"], "temperature": 0}, ["--prompt=a", "--prompt=b", "--temperature=0"]),
    ],
)
def test_what_a_function_returns_is_what_the_command_prints(name, arguments, words, tiny_runs, capsys):
    run = str(tiny_runs["TC-Nano/4E"])
    result = function(name)(run, **arguments)
    assert capsys.readouterr().out == ""
    mot(name, run, *words, "--json")
    printed = capsys.readouterr().out
    timed = ("seconds_per_group", "tokens_per_second")
    lines = (text.splitlines() if name == "generate" else [text] for text in (printed, result.to_json()))
    written, expected = (list(map(json.loads, own)) for own in lines)
    for each in (*written, *expected):
        for line in each.get("lines", []):
            assert all(line.pop(key) > 0 for key in timed)
    assert written == expected
    mot(name, run, *words)
    shown = capsys.readouterr().out
    assert shown.split()[:2] == str(result).split()[:2]
    without_numbers = [re.sub(r"[\d.,]+", "", text).split() for text in (shown, str(result))]
    assert without_numbers[0] == without_numbers[1]


def test_a_dry_run_returns_the_configuration_and_a_finished_run_itself(tiny_runs, small_corpus):
    directory = tiny_runs["MoT-Nano/4E/2"]
    flags = {"steps": 30, "batch_size": 32, "device": "cpu", "training": {"eval_steps": "10"}}
    options = mixture_of_tokens.Options(**flags, data=[str(small_corpus)])
    planned = mixture_of_tokens.train("MoT-Nano/4E/2", options=options, dry_run=True)
    assert isinstance(planned, RunConfig)
    assert planned == RunConfig.read(directory / "config.yaml")
    run = mixture_of_tokens.train("MoT-Nano/4E/2", options=options, out=str(directory), resume=True)
    assert isinstance(run, Run)
    facts = json.loads((directory / "run.json").read_text())
    assert facts == {"format": 1} | asdict(run.facts)
    assert f"loss {run.facts.final_loss:.4f} nats a token" in str(run)


def test_a_run_s_configuration_is_a_file_of_flags(tiny_runs, tmp_path, capsys):
    config = tiny_runs["MoT-Nano/4E/2"] / "config.yaml"
    mot("train", "--config", config, "--out", tmp_path / "again", "--dry-run")
    assert capsys.readouterr().out == config.read_text()


def test_a_run_s_configuration_serves_another_group_size(tmp_path, capsys):
    """What followed from the first one's follows from the other's."""
    file, few = tmp_path / "config.yaml", ("--steps", 5, "--dry-run")
    mot("train", "MoT-Nano/4E", "--batch-size", 32, *few)
    file.write_text(capsys.readouterr().out)
    shown = []
    for words in (["MoT-Nano/64E", "--batch-size", 64], ["--batch-size", 64, "MoT-Nano/64E"]):
        mot("train", *words, "--config", file, *few)
        shown.append(capsys.readouterr().out)
    mot("train", "MoT-Nano/64E", "--batch-size", 64, *few)
    assert shown == [capsys.readouterr().out] * 2


def test_text_of_a_configuration_is_text_when_it_is_read_again(tmp_path, monkeypatch, capsys):
    """YAML 1.1 and 1.2 take other words for numbers, and 1.1 some for dates."""
    monkeypatch.chdir(tmp_path)
    names = ["1e3", "0o17", "010", "no", "2024-03-01T10:00:00Z", "2024-13-45", "1_000", "1:30"]
    for name in names:
        Path(name).write_text("text")
    flags = [word for name in names for word in ("--data", name)]
    mot("train", "MoT-Nano/4E", *flags, "--dry-run")
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["data"] == names
    Path("config.yaml").write_text(shown)
    mot("train", "--config", "config.yaml", "--dry-run")
    assert capsys.readouterr().out == shown
    assert RunConfig.read(Path("config.yaml")).data == names


def test_a_flag_goes_before_a_file_s_however_it_is_spelled(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("name: MoT-Nano/4E\nbatch_size: 64\n")
    for flag in ("--batch-size", "--batch_size"):
        mot("train", "--config", file, flag, 32, "--dry-run", "--json")
        assert json.loads(capsys.readouterr().out)["batch_size"] == 32


@pytest.mark.parametrize(
    ("words", "entry", "said"),
    [
        (["audit", "runs/mine"], 'alone: "off"', "alone takes true or false, not 'off'"),
        (
            ["compare", "MoT-Nano/32E"],
            "dry_run: Transformer-Nano",
            "dry-run takes true or false, not 'Transformer-Nano'",
        ),
        (["plan", "MoT-Nano/32E"], "gated: 0", "gated takes true or false, not 0"),
        (["plan", "MoT-Nano/32E"], "json: maybe", "json takes true or false, not 'maybe'"),
        (["train", "MoT-Nano/32E"], "steps: true", "steps takes a value, not true"),
        (["compare"], "names: [MoT-Nano/32E, null]", "is no file of flags: names holds null, which is no single value"),
        (["train", "MoT-Nano/32E"], "field: 010", "field takes text, and 10 is a number: put it in quotes"),
        (["train", "MoT-Nano/32E"], "data: [a, 1.5]", "data takes text, and 1.5 is a number: put it in quotes"),
        (["train", "MoT-Nano/32E"], "out: 7", "out takes text, and 7 is a number: put it in quotes"),
        (["train", "MoT-Nano/32E"], "steps: [1, 2]", "steps takes one value, not [1, 2]"),
        (["report"], "runs: [[a], b]", 'is no file of flags: runs holds ["a"], which is no single value'),
        (
            ["generate", "runs/mine"],
            "max_new_tokens: 3\nmax-new-tokens: 6",
            "is no file of flags: max-new-tokens stands there twice",
        ),
        (
            ["sweep", "MoT-Nano/32E"],
            "format: 1\nsteps: 3",
            "is of a run: mot train, mot prepare and mot plan take it; mot sweep takes a file of its own flags",
        ),
    ],
)
def test_an_entry_that_a_flag_does_not_take_is_named(words, entry, said, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(entry)
    with pytest.raises(SystemExit, match="2"):
        mot(*words, "--config", file)
    between = "" if said.startswith("is ") else ":"
    assert capsys.readouterr().err == f"mot: error: --config {file}{between} {said}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_system_s_errors_name_the_file_first(tiny_runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("report", tiny_runs["Transformer-Nano"], "--out", "/proc/missing/page.html")
    assert capsys.readouterr().err == "mot: error: /proc/missing: No such file or directory\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_an_unknown_command_has_no_help(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("trian", word)
    shown = capsys.readouterr()
    assert (shown.out, shown.err[:58]) == ("", 'mot: error: Unknown command "trian". Did you mean "train"?')


def test_an_interrupted_command_is_one_line_and_has_the_status_of_a_signal(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        mot("plan", "MoT-Nano/4E")
    assert capsys.readouterr() == ("", "mot: stopped\n")


def test_sigterm_lets_a_command_clean_up(monkeypatch, capsys):
    ended, before = [], signal.getsignal(signal.SIGTERM)

    def terminated(words):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append(words[0])

    monkeypatch.setattr(cli, "_run", terminated)
    with pytest.raises(SystemExit, match="143"):
        mot("plan", "MoT-Nano/4E")
    assert ended == ["plan"]
    assert capsys.readouterr() == ("", "mot: stopped\n")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_that_is_closed_as_by_a_daemon_is_no_error(closed):
    command = f'"{sys.executable}" -m mixture_of_tokens plan MoT-Nano/4E {closed}'
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("MoT-Nano/4E" in ended.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("words", [("plan", "MoT-Nano/4E"), ("train", "--help"), ("--help",)], ids=" ".join)
def test_output_that_nobody_reads_any_more_ends_the_command_without_a_word(words, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:  # a line at a time
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGPIPE)):
            mot(*words)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "status", "said"),
    [(None, 128 + signal.SIGPIPE, ""), ("/dev/full", 2, "mot: error: No space left on device\n")],
    ids=["closed pipe", "full disk"],
)
def test_output_that_cannot_be_written_ends_a_process_with_a_status_of_its_own(file, status, said):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(writer if file is None else file, "w") as stream:
        ended = subprocess.run(
            [sys.executable, "-m", "mixture_of_tokens", "plan", "MoT-Nano/4E"],
            env=environment,
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (ended.returncode, ended.stderr) == (status, said)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("model: 3", "--model is given by its fields, as --model.FIELD VALUE, in a file model: {FIELD: VALUE}"),
        ("model: {router_temperature: {a: 1}}", "--model.router_temperature takes a number, not {'a': 1}"),
    ],
)
def test_what_fields_take_is_told(entry, said, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(entry)
    with pytest.raises(SystemExit, match="2"):
        mot("sweep", "MoT-Nano/4E", "--config", file, "--dry-run")
    assert capsys.readouterr().err == f"mot: error: {said}\n"


def test_a_file_of_flags_holds_the_names_too_and_words_go_before_it(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("names: [MoT-Nano/4E, Transformer-Nano]\nsteps: 7\n")
    shown = []
    for words in ([], ["TC-Nano/4E"], ["--seeds", 0, "TC-Nano/4E"]):
        mot("compare", *words, "--config", file, "--dry-run", "--json")
        runs = json.loads(capsys.readouterr().out)["runs"]
        shown.append([(Path(run["directory"]).name, run["steps"]) for run in runs])
    one = [("TC-Nano-4E-seed0", 7)]
    assert shown == [[("MoT-Nano-4E-seed0", 7), ("Transformer-Nano-seed0", 7)], one, one]


def test_a_file_of_flags_may_name_a_field_with_a_dot_and_ask_for_json(tmp_path, capsys):
    file, shown = tmp_path / "flags.yaml", []
    for text in ("model: {router_temperature: 0.5}", "model.router_temperature: 0.5"):
        file.write_text(f"name: MoT-Nano/4E\njson: true\n{text}\n")
        mot("sweep", "--config", file, "--learning-rate", "0.1,0.2", "--dry-run")
        shown.append(json.loads(capsys.readouterr().out))
        mot("train", "--config", file, "--dry-run")
        assert json.loads(capsys.readouterr().out)["model"]["router_temperature"] == 0.5
    assert shown[0] == shown[1]


@pytest.mark.usefixtures("tiny_cache")
def test_text_is_prepared_for_the_configuration_of_a_run(tiny_runs, capsys):
    mot("prepare", "--config", tiny_runs["MoT-Nano/4E/2"] / "config.yaml", "--json")
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_a_file_of_flags_has_those_that_are_on_by_default_too(tmp_path, capsys):
    shown = {}
    for name, value in {"plain": "false", "gated": "true"}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"gated: {value}\njson: false\n")
        for word in ("", "--gated", "--no-gated"):
            mot("plan", "MoT-Medium/32E", "--config", file, *filter(None, [word]))
            shown[name, word] = capsys.readouterr().out
    assert shown["plain", ""] == shown["plain", "--no-gated"] == shown["gated", "--no-gated"]
    assert shown["gated", ""] == shown["gated", "--gated"] == shown["plain", "--gated"] != shown["plain", ""]
    for line, same in {"no-gated: true": "plain", "no_gated: false": "gated"}.items():
        file.write_text(line)
        mot("plan", "MoT-Medium/32E", "--config", file)
        assert capsys.readouterr().out == shown[same, ""]


def test_a_file_with_a_format_and_no_name_is_one_of_flags(tmp_path, capsys):
    for text in ("format: 1\nsteps: 3", "format: 1\nconfig: {steps: 3}"):
        (tmp_path / "some.yaml").write_text(text)
        mot("train", "MoT-Nano/4E", "--config", tmp_path / "some.yaml", "--dry-run", "--json")
        assert json.loads(capsys.readouterr().out)["steps"] == 3


@pytest.mark.usefixtures("tiny_cache")
def test_from_python_one_value_is_as_good_as_a_list_of_one(tiny_runs, small_corpus):
    run = tiny_runs["TC-Nano/4E"]
    one = mixture_of_tokens.generate(run, prompt="a b", temperature=0)
    assert one == mixture_of_tokens.generate(str(run), prompt=["a b"], temperature=0)
    assert [each.prompt for each in one.continuations] == ["a b"]
    fields = {"model": {"router_temperature": 0.5}, "training": {"weight_decay": 0.05, "logging_steps": 3}}
    options = mixture_of_tokens.Options(steps=4, data=str(small_corpus), **fields)
    words = {"model": {"router_temperature": "0.5"}, "training": {"weight_decay": "0.05", "logging_steps": "3"}}
    assert options == mixture_of_tokens.Options(steps=4, data=[str(small_corpus)], **words)
    names = ["MoT-Nano/4E", "TC-Nano/4E"]
    assert mixture_of_tokens.compare(names, seeds=1, learning_rate=0.01, options=options, dry_run=True) == (
        mixture_of_tokens.compare(*names, seeds=[1], learning_rate=[0.01], options=options, dry_run=True)
    )


def test_a_number_from_python_is_a_number():
    for given in ("60", 1.5, True):
        with pytest.raises(ValueError, match=f"batch_size takes a whole number, not {given!r}"):
            mixture_of_tokens.Options(batch_size=given)
    assert mixture_of_tokens.Options(steps=np.int64(3)).steps == 3


@pytest.mark.parametrize("field", ["model", "training"])
@pytest.mark.parametrize("key", [None, 1])
def test_names_of_fields_from_python_are_text(field, key):
    with pytest.raises(ValueError, match=f"a key of {field} takes text, not {key}"):
        mixture_of_tokens.Options(**{field: {key: 1}})


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["a"], {"vocab_size": "300"}, "vocab_size takes a whole number, not '300'"),
        (["a"], {"context": 4.5}, "context takes a whole number, not 4.5"),
        (["a"], {"max_bytes": True}, "max_bytes takes a whole number, not True"),
        (["a"], {"context": 2**80}, "context "),
        (["a"], {"context": 10**400}, "context "),
        (["a"], {"context": 10**5000}, "context "),  # which Python refuses to print
        (["a"], {"tokenizer": object}, "tokenizer takes text or a path, not"),
        (b"a", {}, "sources takes text or a path, or a list of such, not b'a'"),
        ((name for name in "ab"), {}, "sources takes text or a path, or a list of such, not <generator"),
        ("", {}, "an empty name ('') was given where a file or folder should be named"),
        ([], {}, "there are no sources"),
    ],
)
def test_arguments_of_prepare_text_are_checked(sources, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_text(sources, **options)


@pytest.mark.usefixtures("tiny_cache")
def test_no_text_to_evaluate_is_not_the_standard_library(tiny_runs):
    """Such as of a glob that matches nothing."""
    with pytest.raises(ValueError, match="data names no text; leave it out for the run's own validation text"):
        mixture_of_tokens.evaluate(tiny_runs["MoT-Nano/4E/2"], data=[])


def test_numbers_of_numpy_and_paths_are_as_good_as_plain_ones(tmp_path):
    """They are written to a configuration, which is read again."""
    options = mixture_of_tokens.Options(steps=np.int64(3), data=tmp_path)
    given = {"seed": np.int64(3), "learning_rate": np.float64(3e-3), "options": options}
    planned = mixture_of_tokens.train("MoT-Nano/4E", dry_run=True, **given)
    (tmp_path / "config.yaml").write_text(str(planned))
    assert RunConfig.read(tmp_path / "config.yaml").identity() == planned.identity()
    assert (planned.steps, planned.seed, planned.learning_rate, planned.data) == (3, 3, 3e-3, [str(tmp_path)])


def test_a_tilde_is_the_home_directory_where_no_shell_has_seen_it(tmp_path, monkeypatch, small_corpus):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = mixture_of_tokens.Options(steps=2, data=small_corpus, device="cpu", batch_size=4)
    run = mixture_of_tokens.train("Transformer-Nano", out="~/run", options=options)
    assert run.directory == tmp_path / "run"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["run"]
    assert mixture_of_tokens.report("~/run").page == str(tmp_path / "run" / "report.html")


def test_fields_of_options_take_what_python_has_for_them():
    options = mixture_of_tokens.Options(
        model={"dtype": torch.bfloat16, "rope_parameters": {"rope_type": "default", "rope_theta": np.float32(1e6)}},
        training={"weight_decay": np.float32(0.25), "run_name": Path("again")},
    )
    planned = mixture_of_tokens.train("MoT-Nano/4E", dry_run=True, options=options)
    assert planned.model["dtype"] == "bfloat16"
    assert "rope_theta: 1000000.0" in str(planned)
    assert (planned.training["weight_decay"], planned.training["run_name"]) == (0.25, "again")


@pytest.mark.parametrize(
    ("command", "given", "options", "told"),
    [
        ("train", [5], {}, "name takes text, not 5"),
        ("train", ["MoT-Nano/4E"], {"seed": "a"}, "seed takes a whole number, not 'a'"),
        ("train", ["MoT-Nano/4E"], {"learning_rate": "1e-3"}, "learning_rate takes a number, not '1e-3'"),
        ("train", ["MoT-Nano/4E"], {"options": {"steps": 5}}, r"options takes Options\(...\), not {'steps': 5}"),
        ("compare", ["MoT-Nano/4E"], {"seeds": "0,1"}, "seeds takes a whole number, or a list of such, not '0,1'"),
        ("compare", ["MoT-Nano/4E", 5], {}, "names takes text, or a list of such, not"),
        ("audit", ["runs/mine"], {"expect": "safe"}, "expect takes causal or private or separate, not 'safe'"),
        ("audit", ["runs/mine"], {"alone": "yes"}, "alone takes True or False, not 'yes'"),
        ("export", ["runs/mine", 5], {}, "out takes a path, not 5"),
        ("export", ["runs/mine", "a\0b"], {}, r"out takes a path, and 'a\\x00b' has a NUL in it"),
        ("generate", ["runs/mine"], {"prompt": "a", "out": "a\0b"}, "out takes a path, and .* has a NUL in it"),
        ("export", ["runs/mine", "out"], {"scores": "top"}, "scores takes softmax or sigmoid, not 'top'"),
        ("transition", ["runs/mine"], {"calibrate": "no"}, "calibrate takes distil or none, not 'no'"),
        ("generate", ["runs/mine"], {"prompt": ["a", 5]}, r"prompt takes text, or a list of such, not \['a', 5\]"),
        ("train", [Path("MoT-Nano/4E")], {}, "name takes text, not .*Path"),
        ("report", [["runs/mine", 5]], {}, "runs takes a path, or a list of such, not"),
        ("generate", ["runs/mine"], {"prompt": []}, "give either prompt, which may be repeated, or prompts_file"),
        ("evaluate", ["runs/mine"], {"data": [5]}, r"data takes text or a path, or a list of such, not \[5\]"),
        ("config_from_name", [None], {}, "name takes text, not None"),
        ("Options", [], {"device": "gpu"}, "device takes cpu or cuda, not 'gpu'"),
        ("Options", [], {"evaluate_on": "test"}, "evaluate_on takes validation or tuning, not 'test'"),
        ("Options", [], {"model": "router_temperature"}, "model takes a dictionary, not 'router_temperature'"),
        ("train", ["MoT-Nano/4E"], {"out": ""}, "out is empty$"),
        ("read_run", [5], {}, "directory takes text or a path, not 5"),
        ("read_run", [None], {}, "directory takes text or a path, not None"),
        (
            "GroupedBatches",
            [5],
            {"group_size": 4, "batch_size": 4, "steps": 1, "seed": 0},
            r"blocks takes Blocks\(...\), not 5",
        ),
        ("BalanceCallback", [5], {}, "model takes a MixtureOfTokensForCausalLM, not 5"),
        ("config_from_name", ["MoT-Nano/32E"], {"hidden_size": "x"}, "hidden_size takes a whole number, not 'x'$"),
        ("MixtureOfTokensConfig", [], {"num_experts": "x"}, "num_experts takes a whole number, not 'x'$"),
        (
            "MixtureOfTokensConfig",
            [],
            {"num_experts": torch.ones(3, 2)},
            "num_experts takes a whole number, not a Tensor$",
        ),
        ("MixtureOfTokensConfig", [], {"id2label": b"x"}, "id2label .*$"),
        ("MixtureOfTokensConfig", [], {"group_size": torch.ones(3, 2)}, "group_size .*$"),
        ("MixtureOfTokensConfig", [], {"threshold_scores": torch.ones(3, 2)}, "threshold_scores .*$"),
        ("config_from_name", ["MoT-Nano/32E"], {"gated": torch.zeros(0)}, "gated .*$"),
        ("config_from_name", ["MoT-Nano/32E"], {"vocab_size": 10**400}, "vocab_size .*$"),
        ("generate", ["runs/mine"], {"prompt": "a", "temperature": 10**400}, "temperature .*$"),
        ("MixtureOfTokensConfig", [], {"dtype": "float31"}, "dtype 'float31' is none of torch's types$"),
    ],
)
def test_from_python_a_wrong_value_is_told_by_its_argument(command, given, options, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        getattr(mixture_of_tokens, command)(*given, **options)


def test_a_checked_function_is_still_itself():
    """For help, documentation and type checkers."""
    signature = inspect.signature(mixture_of_tokens.train)
    assert list(signature.parameters)[:3] == ["name", "out", "seed"]
    assert mixture_of_tokens.train.__doc__.startswith("Train one model and write a run directory.")
    with pytest.raises(TypeError, match=r"^train\(\) got an unexpected keyword argument 'sed'$"):
        mixture_of_tokens.train("MoT-Nano/4E", sed=1)


def test_a_flag_that_is_a_field_of_options_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"argument 'steps'; give options=Options\(steps=3, data='a'\)$"):
        mixture_of_tokens.train("MoT-Nano/4E", seed=1, steps=3, data="a")


def test_a_layer_shows_what_it_is_made_of():
    shown = repr(mixture_of_tokens.MixtureOfTokens(8, 7, 6, 5, temperature=0.25))
    for part in ("group_size=5", "hidden_size=8", "num_experts=6", "temperature=0.25"):
        assert part in shown
