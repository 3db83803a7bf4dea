"""Any words given to any command, and any arguments to any public function: an answer, or one line about what is wrong.

Whatever is given: no traceback, nothing that takes 20 seconds, and nothing left behind by what is refused. A few
examples of each in the ordinary suite; ten minutes of them with `-m slow`.
"""

import contextlib
import faulthandler
import inspect
import io
import os
import shutil
import signal
import socket
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mixture_of_tokens
from mixture_of_tokens import MixtureOfTokensConfig, Options, prepare_tokens
from mixture_of_tokens.commands import cli
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.utils.progress import say_once, warn_once
from processes import mot
from test_flags import FIELDS, flags_of

SECONDS = 20
TEXTS = "texts"  # of the folder in which every example begins
FEW, SLOW = 0.4, 15  # times as many examples

COUNTS = [pytest.param(FEW, id="few"), pytest.param(SLOW, id="many", marks=pytest.mark.slow)]
# What fails is shown as it is found: to shrink what takes 20 seconds takes an hour.
FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class TooLong(BaseException):
    """No Exception, which the library might catch."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """The block ends within SECONDS, or fails with a traceback; where Python is not reached, that ends it."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    began = time.monotonic()
    try:
        yield
    except TooLong as late:
        raise AssertionError(f"this hangs: it goes on after {SECONDS} s") from late
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < SECONDS, "this hangs"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with things of many kinds in it, and no network."""

    def offline(*words: object) -> None:
        raise OSError("there is no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", offline)
    folder = tmp_path / "place"
    (folder / TEXTS).mkdir(parents=True)
    for number in range(40):
        (folder / TEXTS / f"{number}.txt").write_text(" ".join(f"word{(number * 7 + i * i) % 400}" for i in range(120)))
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "good.yaml").write_text("seed: 3\n")
    (folder / "odd.yaml").write_text("steps: {a: [1, null]}\nseeds: 1e300\n? [a]\n: b\n")
    (folder / "rows.jsonl").write_text('{"prompt": "ab"}\n{"text": 3}\n')
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    return folder


def there(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with sizes and times."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items() if not path.is_dir()} | {
        str(path): (0, 0) for path in found if path.is_dir()
    }


def ends_well(words: list[str], folder: Path) -> int:
    """The status of a command, which either answers, or says in its last line why not, and leaves nothing."""
    say_once.cache_clear()
    warn_once.cache_clear()
    before = there(folder)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True) for errors in HOW_WRITTEN)
    status = 0
    with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            mot(*words)
        except SystemExit as ended:
            status = ended.code
    told = err.buffer.getvalue().decode()
    assert status in (0, 1, 2), told
    assert "Traceback" not in told
    lines = told.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("mot: error: ")]
    assert errors == [len(lines) - 1] * (status == 2 or bool(errors)), told
    if status == 2:
        assert len(lines[-1]) > len("mot: error: ")
        assert there(folder) == before
    else:  # the next example begins as this one did
        for path in folder.iterdir():
            if str(path) not in before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not [path for path in folder.parent.rglob("*") if path.name.endswith((".partial", ".tmp"))]
    return status


HOW_WRITTEN = ("strict", "backslashreplace")  # by sys.stdout and sys.stderr

HUGE = "9" * 30
ODD = (
    "",
    "x",
    "\0",
    "é\u2028",
    "\udcff",
    "x" * 5000,
    "-1",
    "0",
    "nan",
    "1e300",
    "-inf",
    HUGE,
    "[",
    "{a: *b}",
    "--",
    "-",
)
LARGE = ("65", "4096", "1000003", str(2**31 - 1), str(2**31), "9" * 18)
WHOLE = st.sampled_from(("1", "2", "3", "4", "8"))
ODD_NUMBERS = st.sampled_from(
    (*ODD, "1.5", "-99", "1e400", "٣", "+2", " 2", "0x10", "1_000", "9" * 5000, "1,2", "null")
)
REAL = st.sampled_from(("0", "0.5", "1", "1.5", "1e-300", "1e-45", "1e300", "3e38", "-1", "-0.0", "1e-7"))
PATHS = (
    "nowhere",
    ".",
    "..",
    "empty",
    "empty.txt",
    "empty.txt/below",
    "binary.yaml",
    "pipe",
    "x" * 300,
    "é/ü",
    "~nobody/x",
)
# `..` and `.` are not empty, and what has a name there is not replaced.
READ = st.sampled_from(
    (TEXTS, *PATHS, "rows.jsonl", "/dev/zero", "texts/*.txt", "**", "hf:nobody/nothing", "hf:", "\udcff")
)
WRITTEN = st.sampled_from(("new", "new/deep", "new.gguf", *PATHS, "/proc/nothing/here"))
NAMES = st.sampled_from(
    (
        *("MoT-Nano/4E/2", "TC-Nano/4E", "Transformer-Nano", "MoT-Nano/32E/8", "EC-Nano/4E", "Uniform-Nano/4E"),
        *("MoT-Medium/32E", "STC-Nano/4E", "Soft-Nano/4E", "MoT-Nano", "MoT-Nano/0E", "MoT-Nano/-1E/2", "mot-nano/4E"),
        *(f"MoT-Nano/{HUGE}E", f"MoT-Nano/4E/{HUGE}", "MoT-Nano/3E/7", "Transformer-Nano/4E", "MoT-Nano/٤E", "MoT-/4E"),
    )
)
# Of YAML, for fields of --model and --training.
VALUES = st.sampled_from(
    (*ODD, *LARGE, "1", "2", "0.5", "true", "null", "[]", "[1, x]", "{}", "{a: 1}", "float64", "no")
)
OF_MODEL = sorted(field.name for field in fields(MixtureOfTokensConfig))
# Flags by which the work grows, for which a large number is legal and takes long.
WORK = {"batches", "regroupings", "distil_steps", "vocab_size", "sweep_tokens", "samples", "max_new_tokens", "length"}
PATH_FLAGS = {"data": READ, "tokenizer": READ, "prompts_file": READ, "out": WRITTEN}


def values_of(name: str, hint: Any) -> st.SearchStrategy[str]:
    """Words for a flag: mostly legal ones."""
    kinds = {hint, *typing.get_args(hint)}
    kinds |= {inner for kind in kinds for inner in typing.get_args(kind)}
    if name in PATH_FLAGS:
        return PATH_FLAGS[name]
    if texts := [kind for kind in kinds if isinstance(kind, str)]:  # of Literal
        return st.sampled_from((*sorted(texts) * 3, *ODD))
    if int in kinds:
        return WHOLE | (ODD_NUMBERS if name in WORK else ODD_NUMBERS | st.sampled_from(LARGE))
    if float in kinds:
        return REAL | ODD_NUMBERS
    return st.sampled_from(("a", "text", *ODD)) | st.text(max_size=8)


@st.composite
def flags(draw, command: str) -> list[str]:
    """Up to four flags of a command, mostly its own."""
    own = list(flags_of(command))
    words = []
    for name, hint, _ in draw(st.lists(st.sampled_from(own), max_size=4)):
        flag = f"--{name.replace('_', '-')}"
        if typing.get_origin(hint) is dict or name == "model":
            known = OF_MODEL if name == "model" else sorted(FIELDS)
            words.append(f"--{name}.{draw(st.sampled_from((*known, *known, 'no_such', '')))}={draw(VALUES)}")
        elif hint is bool:
            words.append(flag + draw(st.sampled_from(("", "", "=true", "=maybe", "="))))
        else:
            words.append(f"{flag}={draw(values_of(name, hint))}")
    also = (
        "--json",
        "--config=good.yaml",
        "--config=odd.yaml",
        "--config=binary.yaml",
        "--config=pipe",
        "--config=empty",
    )
    also += ("--help", "--version", "--no-such", "--seeds", "-h", "more", "", "--")
    return words + draw(st.lists(st.sampled_from(also), max_size=1) | st.just([]) | st.just([]))


@dataclass
class Command:
    """How a command is begun so that its work is little, and how many examples of it are tried.

    Words stand first, which flags follow; `last` are flags that no other overrides.
    """

    first: Callable[[list[Path]], st.SearchStrategy[list[str]]]  # of finished runs
    last: tuple[str, ...] = ()
    examples: int = 20


def name_first(runs: list[Path]) -> st.SearchStrategy[list[str]]:
    return st.lists(NAMES, min_size=1, max_size=1)


def run_first(runs: list[Path]) -> st.SearchStrategy[list[str]]:
    good = st.sampled_from([str(run) for run in runs] * 4 + [str(runs[0] / "model"), str(runs[0] / "config.yaml")])
    return st.lists(good | READ, min_size=1, max_size=1) | st.lists(good, min_size=1, max_size=1)


COMMANDS = {
    "train": Command(name_first, ("--dry-run",), 40),
    "sweep": Command(name_first, ("--dry-run",), 20),
    "compare": Command(lambda runs: st.lists(NAMES, min_size=1, max_size=3), ("--dry-run",), 20),
    "transition": Command(run_first, ("--dry-run",), 20),
    "report": Command(lambda runs: st.lists(run_first(runs), max_size=3).map(lambda each: [*chain(*each)]), (), 8),
    "generate": Command(
        lambda runs: run_first(runs).map(lambda first: [*first, "--prompt=ab", "--device=cpu", "--max-new-tokens=3"]),
        (),
        40,
    ),
    "evaluate": Command(
        lambda runs: run_first(runs).map(
            lambda first: [*first, "--max-tokens=64", "--sweep-tokens=64", "--regroupings=1", "--device=cpu"]
        ),
        (),
        25,
    ),
    "audit": Command(
        lambda runs: run_first(runs).map(lambda first: [*first, "--batches=1", "--length=8", "--device=cpu"]), (), 15
    ),
    "export": Command(
        lambda runs: st.builds(
            lambda run, out: [*run, out, "--distil-steps=1", "--device=cpu"], run_first(runs), WRITTEN
        ),
        (),
        10,
    ),
    "upcycle": Command(
        lambda runs: st.builds(lambda run, name: [*run, name], run_first(runs), NAMES), ("--out=upcycled",), 10
    ),
    "plan": Command(name_first, (), 40),
    "prepare": Command(lambda runs: name_first(runs).map(lambda first: [*first, f"--data={TEXTS}"]), (), 20),
    # Without a word it reads the standard library, which takes a minute.
    "data-report": Command(lambda runs: st.lists(READ, min_size=1, max_size=2), (), 20),
}


def test_every_command_is_tried():
    assert COMMANDS.keys() == cli.COMMANDS.keys()


def given_once(words: list[str]) -> list[str]:
    """Without an earlier flag where a later one has the same name, which would be a flag given twice."""
    names = [word.partition("=")[0] for word in words]
    return [
        word
        for i, word in enumerate(words)
        if not word.startswith("--") or "=" not in word or names[i] not in names[i + 1 :]
    ]


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("times", COUNTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_or_says_what_is_wrong(command, times, place, tiny_runs, monkeypatch, request):
    if command in ("prepare", "data-report"):  # which write to the cache
        monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(place.parent / "cache"))
    begun = COMMANDS[command]

    @settings(FUZZ, max_examples=int(begun.examples * times))
    @given(begun.first(list(tiny_runs.values())), flags(command))
    def check(first: list[str], more: list[str]) -> None:
        ends_well([command, *given_once([*begun.last, *first, *more])], place)

    check()


@pytest.mark.parametrize("times", COUNTS)
def test_any_words_are_answered(times, place):
    any_words = st.sampled_from(
        (*ODD, "train", "plan", "MoT-Nano/4E", "--json", "--help", "--version", "--out", "--config")
    )

    @settings(FUZZ, max_examples=int(30 * times))
    @given(st.lists(any_words | st.text(max_size=5), max_size=4))
    def check(words: list[str]) -> None:
        ends_well([*words, "--dry-run"], place)

    check()


def test_what_commands_must_not_do_is_noticed(place, monkeypatch):
    """A traceback, something left behind by what is refused, two lines, a hang."""

    def left(*words: object) -> None:
        Path("left").touch()
        raise ValueError("no")

    def told_twice(*words: object) -> None:
        print("mot: error: no", file=sys.stderr)
        raise ValueError("no")

    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    for planted, noticed in (
        (lambda words: {}["key"], KeyError),
        (left, AssertionError),
        (told_twice, AssertionError),
        (lambda words: time.sleep(9), AssertionError),
    ):
        monkeypatch.setattr(cli, "_run", planted)
        with pytest.raises(noticed):
            ends_well(["plan"], place)
        Path("left").unlink(missing_ok=True)


MIXED = "MoT-Nano/4E/2"
# Wrong as nearly any argument; no large number that is legal and takes long, or all memory.
THINGS = st.sampled_from(
    (
        *(None, True, -1, 0, 1.5, float("nan"), float("-inf"), 1e300, 10**400, -(2**63), "", "x", "\0", "x" * 300, "1"),
        *("é\u2028", b"x", (), [], [None], [[]], {}, {"a": 1}, {1: 2}, {"x"}, object(), int, len, lambda: 3, 1j),
        *(torch.zeros(0), torch.ones(2, 3), np.zeros(3), np.array("x"), np.int64(-5), Path("nowhere"), Path("a\0b")),
        *(range(3), iter(()), ..., MixtureOfTokensConfig, torch.nn.Linear(2, 2), torch.float16),
    )
)
LAYER = {"hidden_size": 8, "expert_size": 4, "num_experts": 2}
# A dataclass of what has been read, whose fields are not checked; and models of what is no configuration, which
# transformers' own constructor tells.
NOT_TRIED = {"Run", "MixtureOfTokensModel", "MixtureOfTokensForCausalLM"}
TRIED = sorted({*mixture_of_tokens.__all__} - NOT_TRIED)


def legal(name: str, run: Path, model: Any) -> dict[str, Any]:
    """Arguments with which a public function has little to do."""
    blocks = prepare_tokens(list(range(8)) * 40, [8 * i + 8 for i in range(40)], context=2, group_size=2)
    few = {"device": "cpu"}
    named = {"name": MIXED, "options": Options(data=TEXTS, device="cpu")}
    trained = named | {"dry_run": True}
    of_group = {"MixtureOfTokens": {"group_size": 2}, "ExpertChoice": {"group_size": 2}}
    return {
        "BalanceCallback": {"model": model},
        "GroupedBatches": {"blocks": blocks, "group_size": 2, "batch_size": 4, "steps": 1, "seed": 0},
        "MixtureOfTokensConfig": {"num_experts": 4},
        "Options": {"steps": 1},
        "Router": {"hidden_size": 8, "num_experts": 2},
        "audit": {"run": run, "batches": 1, "length": 8, **few},
        "audit_model": {"model": model, "batches": 1, "length": 8},
        "calibrate_companions": {"model": model, "batches": [torch.zeros(4, 8, dtype=torch.long)]},
        "calibrate_thresholds": {"model": model, "batches": [{"input_ids": torch.zeros(4, 8, dtype=torch.long)}]},
        "compare": {"names": MIXED, "options": named["options"], "dry_run": True},
        "config_from_name": {"name": MIXED},
        "data_report": {"data": TEXTS},
        "evaluate": {"run": run, "max_tokens": 64, "sweep_tokens": 64, "regroupings": 1, **few},
        "export": {"run": run, "out": "exported", "distil_steps": 1, **few},
        "generate": {"run": run, "prompt": ["a"], "max_new_tokens": 2, **few},
        "plan": {"name": MIXED},
        "prepare": named,
        "prepare_text": {"sources": [TEXTS], "vocab_size": 257, "context": 2, "group_size": 2},
        "prepare_tokens": {"tokens": [1, 2, 3, 4] * 8, "ends": [16, 32], "context": 2, "group_size": 1},
        "read_run": {"directory": run},
        "report": {"runs": run},
        "sweep": trained,
        "train": trained,
        "transition": {"run": run, "dry_run": True},
        "upcycle": {"source": run, "name": "TC-Nano/4E/2", "out": "upcycled"},
    }.get(name, LAYER | of_group.get(name, {}))


# Which would make the work long where it is taken for legal, or train.
KEPT = {"dry_run", "stream", "distil_steps", "sources", "data"}


def refuses_well(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """It answers, or raises one of three errors, of one line."""
    say_once.cache_clear()
    warn_once.cache_clear()
    parameters = inspect.signature(function).parameters.values()
    spread = next((each.name for each in parameters if each.kind is inspect.Parameter.VAR_POSITIONAL), None)
    first = (arguments[spread],) if spread in arguments else ()
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with limited(), quiet[0], quiet[1]:
        try:
            function(*first, **{name: value for name, value in arguments.items() if name != spread})
        except (ValueError, TypeError, OSError) as error:
            assert "\n" not in str(error)  # noqa: PT017, or there was none


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("times", COUNTS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "export")) for n in TRIED])
def test_a_public_function_answers_or_says_what_is_wrong(name, times, place, tiny_runs):
    function = getattr(mixture_of_tokens, name)
    base = legal(name, tiny_runs[MIXED], load_model(str(tiny_runs[MIXED]), device="cpu"))
    parameters = inspect.signature(function).parameters.values()
    own = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD and each.name not in KEPT]
    before = there(place)

    @settings(FUZZ, max_examples=int(15 * times))
    @given(st.dictionaries(st.sampled_from(own), THINGS, min_size=1, max_size=2))
    def check(wrong: dict[str, Any]) -> None:
        refuses_well(function, base | wrong)
        for path in place.iterdir():
            if str(path) not in before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    check()


def test_what_functions_must_not_raise_is_noticed():
    def indexes(runs: list) -> None:
        [][runs]

    def tells_two_lines(runs: list) -> None:
        raise ValueError("one\ntwo")

    with pytest.raises(IndexError):
        refuses_well(indexes, {"runs": 3})
    with pytest.raises(AssertionError):
        refuses_well(tells_two_lines, {"runs": 3})
