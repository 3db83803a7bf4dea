"""Bad values of every flag of every command: exit status 2, one line that names the flag, and nothing begun.

The flags are found in the signatures of the commands' functions, and in the fields of TrainingArguments.
"""

import dataclasses
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.logging import get_log_levels_dict

from mixture_of_tokens.commands import cli
from mixture_of_tokens.settings.fields import given_fields
from mixture_of_tokens.settings.options import Options, as_flags
from mixture_of_tokens.settings.training import ELSEWHERE, FIXED, LogLevel, Optimizer, Schedule, TrainingSettings
from mixture_of_tokens.training import arguments
from processes import function, mot

START: dict[str, tuple[str, ...]] = {
    "train": ("train", "MoT-Nano/32E", "--dry-run"),
    "sweep": ("sweep", "MoT-Nano/32E", "--dry-run"),
    "compare": ("compare", "Transformer-Nano", "MoT-Nano/32E", "--dry-run"),
    "transition": ("transition", "nowhere", "--dry-run"),
    "upcycle": ("upcycle", "nowhere", "TC-Nano/32E/8", "--out", "made"),
    "report": ("report", "nowhere"),
    "generate": ("generate", "nowhere"),
    "evaluate": ("evaluate", "nowhere"),
    "audit": ("audit", "nowhere"),
    "export": ("export", "nowhere", "out"),
    "plan": ("plan", "MoT-Nano/32E"),
    "prepare": ("prepare", "MoT-Nano/32E"),
    "data-report": ("data-report", "nowhere"),
}
for _room, _module in (
    ("training", "compare"),
    ("generation", "generate"),
    ("evaluation", "evaluate"),
    ("evaluation", "audit"),
    ("conversion", "transition"),
    ("conversion", "export"),
    ("conversion", "upcycle"),
):
    importlib.import_module(f"mixture_of_tokens.{_room}.{_module}")  # which the fixture below looks into
HUGE = "9" * 30
WORDS = ("", "x", "1.5", "1e400", "nan", "1,5", "[", "0x10", HUGE, "9" * 5000)
BAD: dict[Any, tuple[str, ...]] = {
    int: WORDS,
    float: ("", "x", "nan", "inf", "-inf", "1e400", "1,5", "1.2.3"),
    Path: ("", "a\0b"),
    str: ("", "a\0b"),
    bool: ("=maybe",),
}
NONE_IS_LEGAL = {("transition", "steps")}  # 0 of them
NOT_POSITIVE = ("0", "-1", "-99")
LISTS = {
    "seeds": ("", "x", "1.5", "1,x", "1;2", ",", "-1", "0,99999999999"),
    "learning_rate": ("", "x", "1,x", "0", "-1"),
}


def flags_of(command: str) -> Iterator[tuple[str, Any, Any]]:
    """Names, types and defaults of a command's flags."""
    for name, parameter in inspect.signature(function(command)).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name == "stream":
            continue
        if name != "options":
            yield name, typing.get_type_hints(function(command))[name], parameter.default
            continue
        hints = typing.get_type_hints(Options)
        yield from ((field.name, hints[field.name], None) for field in dataclasses.fields(Options))


def bad_values() -> Iterator[tuple[str, str, str]]:
    """Commands, flags and values."""
    for command in START:
        for name, hint, _ in flags_of(command):
            kinds = [hint, *typing.get_args(hint)]
            origins = [typing.get_origin(kind) for kind in kinds]
            if typing.get_origin(hint) is dict:
                yield from ((command, f"{name}.no_such_field", value) for value in ("1", ""))
            elif name in LISTS and list in origins:
                yield from ((command, name, value) for value in LISTS[name])
            elif typing.Literal in origins:
                yield from ((command, name, value) for value in ("", "no-such", "1"))
            else:
                names = [str] if list in origins else kinds
                values = [value for kind in names for value in BAD.get(kind, ())]
                if int in kinds:
                    values += NOT_POSITIVE[name == "seed" or (command, name) in NONE_IS_LEGAL :]
                yield from ((command, name, value) for value in values)


TABLE = list(dict.fromkeys(bad_values()))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    """Whatever a flag lets through: no model, no text, no run."""

    def never(*words, **settings):
        raise AssertionError("nothing may be loaded")

    for module in [module for name, module in sys.modules.items() if name.startswith("mixture_of_tokens.")]:
        for what in ("load_model", "run_merged", "whole_text"):
            if hasattr(module, what):
                monkeypatch.setattr(module, what, never)
    monkeypatch.chdir(tmp_path)


def refused(words: tuple[str, ...], capsys) -> str:
    """The line about words that are refused before anything is begun."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        mot(*words)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if "Warning" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("mot: error: ")
    assert len(lines[0]) < 1200
    assert sorted(Path().rglob("*")) == before
    return lines[0]


def test_the_table_is_of_hundreds_of_values_and_of_every_command():
    assert len(TABLE) > 400
    assert {command for command, _, _ in TABLE} | {"report", "export"} == set(cli.COMMANDS)


# Of the values all, or one of so many.
EVERY = pytest.mark.parametrize("every", [pytest.param(4, id="few"), pytest.param(1, id="all", marks=pytest.mark.slow)])


@EVERY
@pytest.mark.parametrize("command", START)
def test_a_bad_value_of_a_flag_is_one_line_that_names_it(command, every, capsys):
    for _, name, value in [row for row in TABLE if row[0] == command][::every]:
        flag = f"--{name.replace('_', '-')}" if "." not in name else f"--{name}"
        words = (flag + value,) if value.startswith("=") else (f"{flag}={value}",)
        needed = ("--prompt", "a") if command == "generate" and name not in ("prompts_file", "prompt", "out") else ()
        line = refused((*START[command], *needed, *words), capsys)
        named = (flag, flag.lstrip("-"), name.rpartition(".")[2], flag.removesuffix("s"))
        assert any(each in line for each in named), (words, line)


@pytest.mark.parametrize(("command", "words"), [("train", ("",)), ("export", ("a", "")), ("data-report", ("a", ""))])
def test_a_positional_word_is_not_empty(command, words, capsys):
    assert " is empty" in refused((command, *words), capsys)


DEEP = "[" * 1200
TRAIN = ("train", "MoT-Nano/32E", "--dry-run")
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
OF_TRAINING = [
    *((field, value) for field in ("weight_decay", "max_grad_norm", "warmup_steps") for value in ("-1", "nan", "x")),
    *((field, value) for field in ("adam_beta1", "adam_beta2") for value in ("1", "2", "-0.1", "1e400", "true")),
    *(("adam_epsilon", value) for value in ("0", "-1", "nan", "")),
    *((field, value) for field in ("save_total_limit", "torch_empty_cache_steps") for value in ("0", "-1", "1.5")),
    *((field, value) for field in ("logging_steps", "eval_steps", "save_steps") for value in ("-1", "2.5", "9" * 30)),
    *((field, value) for field in ("log_level", "log_level_replica") for value in ("foo", "3", "Info")),
    *(
        (field, value)
        for field in ("eval_strategy", "save_strategy", "logging_strategy")
        for value in ("foo", "1", "[]")
    ),
    *(("logging_strategy", value) for value in ("no", "epoch")),
    ("eval_strategy", "epoch"),
    *(("lr_scheduler_type", value) for value in ("reduce_lr_on_plateau", "greedy", "foo", "1")),
    *(("lr_scheduler_kwargs", value) for value in ("{foo: 1}", "1", "foo", "{min_lr_rate: x}", "{min_lr: 5}")),
    *(("optim", value) for value in ("adamw_bnb_8bit", "foo", "1", "lomo", "schedule_free_adamw", "galore_adamw")),
    *(("optim_args", value) for value in ("foo", "a=1", "1")),
    *(
        ("report_to", value)
        for value in ("foo", "3", "null", "[tensorboard, foo]", "[tensorboard, none]", "[[1]]", "{a: 1}")
    ),
    ("ddp_backend", "gloo"),
    *(("dataloader_num_workers", value) for value in ("-1", "1.5", "x", "null")),
    *((field, "1") for field in ("dataloader_persistent_workers", "dataloader_prefetch_factor")),
    *(("dataloader_multiprocessing_context", value) for value in ("fork", "foo")),
    *(
        (field, value)
        for field in ("torch_compile_backend", "torch_compile_mode", "ddp_backend")
        for value in ("x", "1")
    ),
    ("torch_compile_backend", "tensorrt"),  # which is not installed
    *((field, value) for field in ("ddp_timeout", "ddp_bucket_cap_mb") for value in ("0", "-1", "x")),
    *(
        ("gradient_checkpointing_kwargs", value)
        for value in ("{foo: 1}", "3", "{use_reentrant: false}", "{use_reentrant: true}")
    ),
    *(
        (field, "x")
        for field in ("bf16", "fp16", "tf32", "torch_compile", "full_determinism", "gradient_checkpointing")
    ),
    *((field, value) for field in ("eval_delay", "neftune_noise_alpha") for value in ("-1", "nan", "1e400", "x")),
    *((field, value) for field in ("lr_scheduler_kwargs", "eval_steps") for value in (DEEP, "{", "2001-13-45x: ]")),
    *(("lr_scheduler_kwargs", value) for value in ("&a [*a]", "!!timestamp 2001-13-45")),
]
OF_MODEL = [
    *(("rms_norm_eps", value) for value in ("0", "-1", "nan", "1e400", "x")),
    *(("rope_parameters", value) for value in (DEEP, "&a [*a]", "{rope_type: default, rope_theta: -1}", "3")),
    *(
        ("rope_parameters", f"{{rope_theta: 1e4, {rest}}}")
        for rest in ("rope_type: nope", "rope_type: linear, factor: 0.5")
    ),
    ("rope_parameters", "{rope_theta: 1e4, rope_type: llama3, factor: 2.0}"),
    *(
        (field, value)
        for field in ("hidden_size", "num_experts", "group_size")
        for value in ("9" * 30, "0", "1.5", "{")
    ),
    *(("router_temperature", value) for value in ("0", "-1", "nan", "inf", "1e400")),
    *(("capacity_factor", value) for value in ("0", "-1", ".nan", "1e400")),
    *(("dtype", value) for value in ("nan", "[]", "x", "float16", "float8")),
    *(("vocab_size", value) for value in ("256", "100000000")),
    ("num_hidden_layers", "1000000000"),
    *((field, "-1") for field in ("router_aux_loss_coef", "initializer_scale", "attention_dropout")),
]


def test_every_setting_of_a_training_is_a_field_of_training_arguments():
    assert TrainingSettings.__annotations__.keys() <= FIELDS.keys()
    assert not TrainingSettings.__annotations__.keys() & {*ELSEWHERE, *FIXED}
    assert {*ELSEWHERE, *FIXED} <= FIELDS.keys()
    assert set(typing.get_args(Optimizer)) <= {each.value for each in OptimizerNames}
    assert set(typing.get_args(Schedule)) <= {each.value for each in SchedulerType}
    assert set(typing.get_args(LogLevel)) == {"passive", *get_log_levels_dict()}


def test_another_field_of_training_arguments_is_refused_with_those_that_are_taken(capsys):
    for field in FIELDS.keys() - TrainingSettings.__annotations__.keys() - FIXED.keys():
        line = refused((*TRAIN, f"--training.{field}", "7"), capsys)
        told = (
            (f"has a flag of its own: {ELSEWHERE[field]}",) if field in ELSEWHERE else ("weight_decay", "did you mean")
        )
        assert f"--training.{field} " in line
        assert any(each in line for each in told)


def test_a_fixed_field_may_be_given_with_the_value_that_it_has(capsys):
    words = [(f"--training.{field}", json.dumps(value)) for field, value in FIXED.items()]
    mot(*TRAIN)
    plain = capsys.readouterr().out
    mot(*TRAIN, *(word for pair in words for word in pair))
    assert capsys.readouterr().out == plain
    assert "--training.disable_tqdm" in refused((*TRAIN, "--training.disable_tqdm", "false"), capsys)


@EVERY
@pytest.mark.parametrize(("kind", "rows"), [("training", OF_TRAINING), ("model", OF_MODEL)])
def test_a_bad_value_of_a_field_is_one_line_that_names_it(kind, rows, every, capsys):
    for field, value in rows[::every]:
        assert f"--{kind}.{field}" in refused((*TRAIN, "--device=cpu", f"--{kind}.{field}={value}"), capsys), value


def test_weights_are_of_a_type_that_is_named(capsys):
    what = "mot: error: --model.dtype 'float8' is unknown; legal are float32, bfloat16, float64"
    assert refused((*TRAIN, "--model.dtype", "float8"), capsys) == what
    mot(*TRAIN, "--model.dtype", "bfloat16")
    assert "dtype: bfloat16" in capsys.readouterr().out


def test_a_field_s_value_is_refused_by_every_command_that_trains(capsys):
    for command in ("sweep", "compare"):
        assert "--training.data_seed has a flag of its own" in refused(
            (*START[command], "--training.data_seed", "1"), capsys
        )
        assert "--model.rms_norm_eps" in refused((*START[command], "--model.rms_norm_eps", "-1"), capsys)


def test_other_schedules_need_no_arguments_and_bounds_are_legal(capsys):
    """A schedule without a least rate is not given the default's."""
    for words in (
        ("lr_scheduler_type", "linear"),
        ("adam_beta1", "0"),
        ("max_grad_norm", "0"),
        ("warmup_steps", "0.5"),
    ):
        mot(*TRAIN, f"--training.{words[0]}", words[1])
    told = capsys.readouterr().err.splitlines()
    assert all("GiB" in line for line in told)  # the memory that a dry run needs, and nothing else


def test_a_constant_rate_takes_no_settings_of_a_schedule(capsys):
    for kind, field, value in (
        ("constant", "warmup_steps", "3"),
        ("constant", "lr_scheduler_kwargs", "{min_lr_rate: 0.5}"),
        ("constant_with_warmup", "lr_scheduler_kwargs", "{min_lr_rate: 0.5}"),
    ):
        words = ("--training.lr_scheduler_type", kind, f"--training.{field}", value)
        assert refused((*TRAIN, *words), capsys).startswith(f"mot: error: --training.{field}: {kind} ")
    mot(*TRAIN, "--training.lr_scheduler_type", "constant", "--training.warmup_steps", "0")
    assert "warmup_steps: 0" in capsys.readouterr().out
    mot(*TRAIN, "--training.lr_scheduler_type", "constant_with_warmup", "--training.warmup_steps", "3")


@pytest.mark.parametrize("name", arguments.ENVIRONMENT)
def test_a_variable_that_changes_a_training_silently_is_refused(name, monkeypatch, capsys):
    for value in ("true", "2", "fp8", "inductor"):
        monkeypatch.setenv(name, value)
        line = refused(TRAIN, capsys)
        assert line.startswith(f"mot: error: {name}={value} in the environment: ")
    for value in ("no", "False"):  # as accelerate's launcher sets them
        monkeypatch.setenv(name, value)
        mot(*TRAIN)
    assert name not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        *("a: [", "x: y: z", "- a", "3", "", "\t", "a: *b", "{a: !!python/object:os.system x}", DEEP, "a: " + DEEP),
        *(
            "training: &a {b: *a}",
            "training: {[1, 2]: 3}",
            "training: {? {a: 1} : 2}",
            "a: !!timestamp 2001-13-45",
            "a\0b",
        ),
        *("a: " + "9" * 5000, "steps: 1\nsteps: 2", "model: {gated: true, gated: false}"),
        *("a: !!map [b]", "a: !!map b"),
    ],
)
def test_a_bad_file_of_flags_is_named(text, capsys):
    Path("bad.yaml").write_text(text)
    line = refused((*TRAIN, "--config", "bad.yaml"), capsys)
    assert "--config bad.yaml" in line
    assert "unicode string" not in line


def test_a_file_of_flags_that_is_no_text_is_named(capsys):
    Path("bad.yaml").write_bytes(b"steps: \xff\xfe")
    assert "--config bad.yaml cannot be read" in refused((*TRAIN, "--config", "bad.yaml"), capsys)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 1.5), ("seed", 1.7), ("out", ""), ("data", ["a", ""]), ("batch-size", 32.4)]
)
def test_a_value_in_a_file_is_checked_as_on_the_command_line(key, value, capsys):
    Path("flags.yaml").write_text(yaml.safe_dump({key: value}))
    assert f"--{key} " in refused((*TRAIN, "--config", "flags.yaml"), capsys)


@pytest.mark.parametrize("value", ["1e-300", "-1e-300", "1e300", "-1", "1e-7"])
def test_a_temperature_at_which_logits_are_not_finite_is_refused(value, capsys):
    assert "--temperature must be 0 or" in refused(
        ("generate", "nowhere", "--prompt=a", f"--temperature={value}"), capsys
    )


def test_a_prompt_in_a_deep_nest_is_a_line_of_its_file(capsys):
    Path("prompts.jsonl").write_text(DEEP + "\n")
    line = refused(("generate", "nowhere", "--prompts-file", "prompts.jsonl"), capsys)
    assert "--prompts-file prompts.jsonl: line 1 is no object" in line


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("010", int, 10),
        ("1e-3", float, 1e-3),
        ("{rope_type: default, rope_theta: 1e6}", dict[str, Any], {"rope_type": "default", "rope_theta": 1e6}),
        ("[1e-3, 0x10, no, 1:30]", list[Any], [1e-3, 16, "no", "1:30"]),
        ("off", str, "off"),
        ("null", float | None, None),
    ],
)
def test_a_field_s_value_is_yaml_1_2(text, kind, value):
    read = given_fields("model", {"field": kind}, {"field": text})["field"]
    assert read == value
    assert type(read) is type(value)


def test_numbers_in_a_file_of_flags_are_yaml_1_2_too(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("learning_rate: 1e-2\nmodel: {rope_parameters: {rope_type: default, rope_theta: 1e6}}\n")
    mot("train", "MoT-Nano/32E", "--config", file, "--dry-run")
    assert "1000000.0" in capsys.readouterr().out


def test_a_time_in_a_file_of_flags_is_text(capsys):
    Path("flags.yaml").write_text("name: MoT-Nano/32E\ndata: 2025-1-5T7:00:00\nout: 2001-02-03\n")
    mot("train", "--config", "flags.yaml", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["data"] == ["2025-1-5T7:00:00"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: true", "--config flags.yaml names version, which is for the command line alone"),
        ("help: true", "--config flags.yaml names help, which is for the command line alone"),
        ("format: 9", "flags.yaml has format 9, and this version reads format 1"),
        ("format: hello", "flags.yaml has format 'hello', and this version reads format 1"),
    ],
)
def test_a_file_of_flags_does_not_stand_for_something_else(text, message, capsys):
    Path("flags.yaml").write_text(f"name: MoT-Nano/32E\n{text}\n")
    assert message in refused(("train", "--config", "flags.yaml", "--dry-run"), capsys)


def test_a_name_that_begins_like_a_flag_goes_round(capsys):
    names = ["-x.txt", "--y.txt", "plain.txt"]
    mot("train", "MoT-Nano/32E", *(f"--data={name}" for name in names), "--seed", 3, "--dry-run")
    Path("config.yaml").write_text(capsys.readouterr().out)
    mot("train", "--config", "config.yaml", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["data"] == names
    mot("train", "--config", "config.yaml", "--data", "other.txt", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["data"] == ["other.txt"]
    mot("train", "MoT-Nano/32E", *as_flags(Options(data=names)), "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["data"] == names
