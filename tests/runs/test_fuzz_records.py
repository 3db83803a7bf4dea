"""Files of a run with anything in them: a record, or one ValueError that names the file."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixture_of_tokens.generation.continuations import Continuation, Row, _resumed, to_file
from mixture_of_tokens.reports.comparison import runs_of
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.records import METRICS, RunConfig, RunFacts, Switch, metrics
from mixture_of_tokens.runs.run import pack, read_run
from mixture_of_tokens.training.callbacks import Clock, RunLog
from mixture_of_tokens.utils import manifest

RESULT = Path(__file__).parents[2] / "experiments" / "verdict" / "MoT-Nano-32E-4-fresh-seed2-transition"
FEW = settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

numbers = st.integers(-5, 5) | st.sampled_from([10**400, 2**63, 1e308, float("nan"), float("-inf"), 0.5, -0.0])
words = st.sampled_from(["", "hash", "MoT-Nano/32E", "Uniform-Nano/3E", "\0", "\u2028", "é", "../..", "x" * 300, "1"])
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Paths to all that is in a value, itself first; of a list the first element alone."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


@st.composite
def changed(draw, whole: Any) -> Any:
    """The value with something else in some place, or without it, or with a key that is unknown there."""
    result = copy.deepcopy(whole)
    at = draw(st.sampled_from(places(whole)))
    if not at:
        return draw(anything)
    inner = result
    for key in at[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(["changed", "changed", "lost", "renamed"]))
    if how == "changed":
        inner[at[-1]] = draw(anything)
    else:
        value = inner.pop(at[-1])
        if how == "renamed" and isinstance(inner, dict):
            inner[draw(words)] = value
    return result


def holds(file: Path, act: Callable[[], Any]) -> None:
    try:
        act()
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017, or there was none


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return json.loads(RESULT.with_suffix(".json").read_text())


def fuzz(whole: Any, act: Callable[[Any], None]) -> None:
    @FEW
    @given(changed(whole))
    def every(content):
        act(content)

    every()


@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [("config", "config.yaml", RunConfig), ("facts", "run.json", RunFacts), ("switch", "switch.json", Switch)],
)
def test_a_record(whole, tmp_path, part, name, kind):
    file = tmp_path / name

    def act(content):
        file.write_text(yaml.safe_dump(content) if name == "config.yaml" else json.dumps(content))
        holds(file, lambda: kind.read(file))

    fuzz(whole[part], act)


def test_rows_of_metrics(whole, tmp_path):
    rows = whole["metrics"][:3]
    rows[1]["layers"] = {"2": {"entropy": 1.5}}
    file = tmp_path / METRICS

    def act(content):
        lines = content if isinstance(content, list) else [content]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        holds(file, lambda: metrics(file))
        holds(file, lambda: RunLog(file, 1, Clock()).forget_after(10**9))

    fuzz(rows, act)


def test_a_packed_run(whole, tmp_path):
    file = tmp_path / "packed.json"
    short = whole | {"metrics": [whole["metrics"][0], whole["metrics"][-1]]}

    def act(content):
        file.write_text(json.dumps(content))
        holds(file, lambda: read_run(tmp_path / "packed"))

    fuzz(short, act)


def test_a_manifest(tmp_path):
    directory = tmp_path / "checkpoint-8"
    directory.mkdir()
    (directory / "file").write_text("text")
    facts = {"step": 8, "seconds": 1.5, "reported": [[1.0, None]], "corpus": "a b"}
    manifest.write(directory, **facts)
    file = directory / manifest.NAME
    whole = json.loads(file.read_text())

    def act(content):
        file.write_text(json.dumps(content))
        found = checkpoints.newest(tmp_path)
        assert found is None or content == whole
        manifest.damage(directory)
        manifest.is_of(directory, "export")

    fuzz(whole, act)


def test_a_comparison(tmp_path):
    file = tmp_path / "compare.json"
    whole = {"models": [{"runs": [{"directory": "one"}]}], "command": "mot compare"}
    pack(read_run(RESULT), tmp_path / "one.json", telemetry=False)

    def act(content):
        file.write_text(json.dumps(content))
        holds(tmp_path, lambda: runs_of([tmp_path]))

    fuzz(whole, act)


def test_an_unfinished_generation(tmp_path):
    file = tmp_path / "out.jsonl.unfinished"
    asked, prompts = {"run": "mine", "seed": 0}, ["a", "b"]
    line = {"index": 0, "sample": 0, "prompt": "a", "text": "x", "tokens": 1}

    def act(content):
        lines = content if isinstance(content, list) else [content]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        holds(file, lambda: _resumed(file, asked, 1, prompts))

    fuzz([asked, line, line | {"index": 1, "prompt": "b"}], act)


@pytest.mark.parametrize("text", ["", "\0", "[]", "{}", "null", "[" * 100_000, "é", '{"a": ' + "9" * 5000 + "}"])
def test_a_file_of_something_else(tmp_path, text):
    for name, kind in {"config.yaml": RunConfig, "run.json": RunFacts, "switch.json": Switch}.items():
        file = tmp_path / name
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=name):
            kind.read(file)


def test_a_file_of_prompts_that_is_finished_is_said_to_be_and_nothing_else_is_taken_for_it(tmp_path, capsys):
    out, prompts, rows = tmp_path / "out.jsonl", ["a", "b\u2028"], [Row(0, 0), Row(1, 0), Row(0, 1), Row(1, 1)]
    batches = [[rows[1], rows[0]], [rows[3], rows[2]]]

    def write(number: int) -> list[Continuation]:
        return [Continuation(row.prompt, row.sample, prompts[row.prompt], "x", 1) for row in batches[number]]

    def refuse(number: int) -> list[Continuation]:
        raise AssertionError

    first = to_file(out, {"seed": 0}, batches, write, prompts)
    before = out.read_text()
    capsys.readouterr()
    assert to_file(out, {"seed": 0}, batches, refuse, prompts) == first
    assert capsys.readouterr().err == f"{out} is finished already\n"
    with pytest.raises(ValueError, match="is not what this command writes, by flags, prompts and model"):
        to_file(out, {"seed": 1}, batches, refuse, prompts)
    lines = before.splitlines(keepends=True)
    assert json.loads(lines[0]).keys() == {"index", "sample", "prompt", "text", "tokens", "settings"}
    for other in (
        "",
        "mine",
        "[]",
        "[" * 10**5,
        before[:-9],
        before[:-1] + "{}",
        "".join(lines[::-1]),
        "".join(lines[1:]),
    ):
        out.write_text(other)
        with pytest.raises(ValueError, match="exists already"):
            to_file(out, {"seed": 0}, batches, refuse, prompts)
    out.write_text(before)
    with pytest.raises(ValueError, match="exists already"):
        to_file(out, {"seed": 0}, batches, refuse, ["a", "c"])
    assert out.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("first", ["", "\0", "[]", "3", "[" * 10**5])
def test_an_unfinished_file_that_begins_with_no_settings_is_named_and_left(tmp_path, first):
    file = tmp_path / "out.jsonl.unfinished"
    file.write_text(first + "\nmore\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.unfinished, line 1, is damaged"):
        _resumed(file, {"seed": 0}, 1, ["a"])
    assert file.read_text() == first + "\nmore\n"
