"""Run directories: the contents of a finished one, and its one-file form.

A finished run is a directory with config.yaml, metrics.jsonl, run.json and, after a switch, switch.json (`records.py`).
`pack` writes these, without weights, to one file: NAME.json in place of the directory NAME, for results that are kept.
`read_run` takes both.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import as_named, config_from_name
from mixture_of_tokens.planning.cost import flops_per_token
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.records import SAMPLE_PROMPT, MetricsRow, RunConfig, RunFacts, Switch
from mixture_of_tokens.runs.typed import FORMAT, Record, as_fields, without_format
from mixture_of_tokens.utils.checks import checked
from mixture_of_tokens.utils.files import no_directory, write_text
from mixture_of_tokens.utils.formatting import duration, few_of


@dataclass(frozen=True)
class Point:
    """An evaluation during training: what had been spent by then, and the loss."""

    step: float
    tokens: float
    seconds: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Load:
    """The largest value over the layers at some step."""

    largest_load: float
    dropped: float


@dataclass(frozen=True)
class Stages:
    """After a switch: losses after a tenth of the steps and at the end; loads when first and when last measured."""

    tenth_step: int
    tenth_loss: float
    end_loss: float
    first: Load | None
    last: Load | None


@dataclass(frozen=True)
class Run:
    """A finished run. `str` is its summary."""

    directory: Path
    config: RunConfig
    facts: RunFacts
    rows: list[MetricsRow]
    switch: Switch | None = None

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def seed(self) -> int:
        return self.facts.seed

    def __str__(self) -> str:
        facts = self.facts
        loss, bits = f"{facts.final_loss:.4f} nats a token", f"{facts.bits_per_byte:.4f} bits a byte"
        lines = [f"{self.name}: loss {loss} of {facts.scored}, {bits}"]
        if facts.regrouping_spread is not None:
            lines.append(f"Three ways to group that text differ by {facts.regrouping_spread:.4f} nats at most")
        if (losses := self._alone()) is not None:
            lines.append(losses)
        speed = f"{duration(facts.seconds)} of training without its evaluations, {facts.tokens_per_second} tokens/s"
        lines.append(f"{speed}. Everything is in {self.directory}.")
        if not self.model_config.causal:
            lines.append("It is not causal: its loss is low because it sees what follows, and it cannot write.")
        elif facts.sample is not None:
            alone = self.model_config.shares_batch and self.model_config.serves_alone
            what = f"A prompt, {'served alone and ' * alone}continued"
            lines.append(f"{what}:\n\n{SAMPLE_PROMPT}{facts.sample}")
        return "\n".join(lines)

    def _alone(self) -> str | None:
        """The losses of a Mixture of Tokens alone beside that in groups, where they were measured."""
        served, config = self.facts.served or {}, self.model_config
        if not {records.IN_GROUPS, records.ALONE} <= served.keys():
            return None
        ways = [f"{served[records.ALONE]:.4f} by all experts"]
        if records.ALONE_BY_FEW in served:
            few = f"{config.num_experts_per_tok} of {config.num_experts} experts"
            ways.insert(0, f"{served[records.ALONE_BY_FEW]:.4f} by {few}")
        what = f"Each text alone, over a part of that text: {', '.join(ways)}"
        return f"{what}; in groups {served[records.IN_GROUPS]:.4f}"

    def to_json(self) -> str:
        return json.dumps({"directory": str(self.directory)} | asdict(self.facts), indent=2)

    @cached_property
    def model_config(self) -> MixtureOfTokensConfig:
        # The tokenizer decides the size of the vocabulary, whatever the configuration asked for.
        fields: dict[str, Any] = self.config.model | {"vocab_size": self.facts.vocab_size}
        return config_from_name(self.name, **fields)

    @cached_property
    def flops(self) -> float:
        """FLOPs per token in training, of both passes."""
        return self._flops()

    def _flops(self, experts_per_token: float | None = None) -> float:
        sizes = {"batch": self.config.batch_size, "experts_per_token": experts_per_token}
        return sum(sum(each.values()) for each in flops_per_token(self.model_config, **sizes))

    @property
    def training_flops_per_token(self) -> float:
        """Of both passes, over the whole run; after a switch, of the part that follows it."""
        return self.flops_at([self.facts.tokens])[0] / self.facts.tokens

    def flops_at(self, tokens: Sequence[float]) -> list[float]:
        """FLOPs of training until so many tokens. Where the experts of a token vary, as telemetry has measured them."""
        nominal = [count * self.flops for count in tokens]
        config = self.model_config
        if not any(routing.varies for routing in config.routings):
            return nominal
        known = [(row.tokens, experts_per_token(row)) for row in self.rows]
        costs = [(at, self._flops(experts)) for at, experts in known if experts is not None]
        if not costs:
            return nominal
        at, cost = np.array([(0, costs[0][1]), *costs, (max(*tokens, costs[-1][0]), costs[-1][1])]).T
        spent = np.concatenate([[0.0], np.cumsum(np.diff(at) * (cost[1:] + cost[:-1]) / 2)])
        return np.interp(tokens, at, spent).tolist()

    @cached_property
    def curve(self) -> list[Point]:
        """The evaluations during training. Those of a switched run begin with its source's and include the switch.

        Raises ValueError for a run that was not evaluated while it trained.
        """
        self.check_evaluated()
        tokens, flops = (self.switch.tokens, self.switch.flops_per_token) if self.switch is not None else (0, 0.0)
        points = []
        before = [min(row.tokens, tokens) for row in self.evaluations]
        after = self.flops_at([row.tokens - had for row, had in zip(self.evaluations, before, strict=True)])
        for row, had, own in zip(self.evaluations, before, after, strict=True):
            points.append(Point(row.step, row.tokens, row.seconds, had * flops + own, row.eval_loss))  # pyright: ignore
        if (at := self.switch) is not None:
            place = sum(point.step <= at.step for point in points)
            points.insert(place, Point(at.step, at.tokens, at.seconds, at.tokens * flops, at.at_the_switch))
        return points

    @property
    def evaluations(self) -> list[MetricsRow]:
        return [row for row in self.rows if row.eval_loss is not None]

    def check_evaluated(self) -> None:
        """Raises ValueError for a run that was not evaluated while it trained: it has no curve."""
        if not self.evaluations:
            raise ValueError(f"{self.directory} was not evaluated while it trained: its metrics.jsonl has no eval_loss")

    def check_same_text(self, other: "Run", advice: str = "") -> None:
        """Raises ValueError, which ends with the advice, where the other saw different text."""
        if self.facts.text != other.facts.text:
            sources = (run.facts.corpus.get("source", ["an unknown text"]) for run in (self, other))
            seen = " and ".join(f"[{few_of(each)}]" for each in sources)
            what = f"{self.directory} and {other.directory} saw different text ({seen}, or another version of it)"
            raise ValueError(f"{what}: no loss of theirs compares{advice}")

    def inherited(self, other: "Run") -> int:
        """How many evaluations it has from another run: all of that one's, if it continues it, else 0.

        It has the other's rows. The directory in its configuration may be another by now, or on another machine.
        """
        if other is self or self.config.first_step < other.config.last_step:
            return 0
        mine, theirs = ([(row.step, row.seconds, row.eval_loss) for row in run.evaluations] for run in (self, other))
        return len(theirs) if mine[: len(theirs)] == theirs else 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What identifies the run's model: its `identity` without the seed, paths, and what is as transformers has it.

        Sources of a switch or a start differ by seed, and texts are compared by their hashes.
        """
        known, usual = self.config.identity(), as_named(self.name, self.model_config)
        left_out = ("seed", "start.origin_seed", *records.MAY_MOVE)
        empty = {f"model.{field}": None for field in self.config.model if getattr(usual, field, None) is None}
        defaults = records.OF_TRAINING | empty
        return {k: v for k, v in known.items() if k not in left_out and (k, v) not in defaults.items()}

    @property
    def stages(self) -> Stages:
        """Of a switched run that was evaluated after the switch."""
        assert self.switch is not None
        after = [row for row in self.rows if row.step > self.switch.step]
        if not self.config.steps:
            return Stages(self.switch.step, self.switch.at_the_switch, self.switch.at_the_switch, None, None)
        evaluated = [(row.step, row.eval_loss) for row in after if row.eval_loss is not None]
        tenth = self.switch.step + max(1, self.config.steps // 10)
        step, loss = next(((step, loss) for step, loss in evaluated if step >= tenth), evaluated[-1])
        routed = [row.layers.values() for row in after if row.layers is not None]
        first, last = (_worst(routed[0]), _worst(routed[-1])) if routed else (None, None)
        return Stages(step, loss, evaluated[-1][1], first, last)


def experts_per_token(row: MetricsRow) -> float | None:
    """Mean over the layers where it was measured."""
    known = [layer["experts_per_token"] for layer in (row.layers or {}).values() if "experts_per_token" in layer]
    return sum(known) / len(known) if known else None


def _worst(layers: Iterable[dict[str, float]]) -> Load:
    known = [layer for layer in layers if "largest_load" in layer]
    largest_load, dropped = (max(layer[key] for layer in known) for key in ("largest_load", "dropped"))
    return Load(largest_load, dropped)


@checked
def read_run(directory: str | Path) -> Run:
    """A finished run, from its directory or its one-file form.

    Raises ValueError for a run that is not finished or damaged.
    """
    directory = Path(directory)
    packed = directory if directory.suffix == ".json" else directory.parent / f"{directory.name}.json"  # also of "."
    if packed.is_file() and not (directory / records.FACTS).is_file():
        return _unpacked(packed)
    if not (directory / records.FACTS).is_file():
        why = "it is a file" if directory.is_file() else no_directory(directory)
        if (directory / records.CONFIG).is_file():
            why = "it has no run.json yet; its command with --resume goes on with it"
        elif directory.is_dir():
            why = "it has no run.json"
        raise ValueError(f"{directory} is no finished run: {why}")
    config = RunConfig.read(directory / records.CONFIG)
    facts = RunFacts.read(directory / records.FACTS)
    rows = records.metrics(directory / records.METRICS)
    switched = directory / records.SWITCH
    run = Run(directory, config, facts, rows, Switch.read(switched) if switched.is_file() else None)
    return _whole(run, directory / records.METRICS)


def _whole(run: Run, metrics: Path) -> Run:
    """The run itself. Raises ValueError where its records are of different lengths, as of a copy that is incomplete."""
    steps, planned = run.facts.steps, run.config.last_step
    if steps != planned:
        raise ValueError(f"{metrics}: the run has {steps} steps by its results, and {planned} by its configuration")
    evaluated = run.evaluations[-1].step if run.evaluations else steps
    if evaluated != steps:
        raise ValueError(
            f"{metrics} lacks its end: the run has {steps} steps, and no evaluation after step {evaluated}"
        )
    return run


def pack(run: Run, file: Path, *, telemetry: bool) -> None:
    """Write a run as one file: with `telemetry` all rows, else the evaluations without their layers.

    Where the experts of a token vary, the number of them stays: FLOPs are counted by it.
    """
    rows = run.rows
    if not telemetry and any(routing.varies for routing in run.model_config.routings):
        rows = [replace(row, layers=_alone(row, "experts_per_token")) for row in rows]
    elif not telemetry:
        rows = [replace(row, layers=None) for row in run.evaluations]
    written = {
        "format": FORMAT,
        "config": run.config.written(),
        "facts": asdict(run.facts),
        "switch": None if run.switch is None else asdict(run.switch),
        "metrics": [json.loads(row.line()) for row in rows],
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in written.items() if key != "metrics"]
    metrics = ",\n".join(f"    {json.dumps(row)}" for row in written["metrics"])
    write_text(file, "{\n" + ",\n".join(lines) + f',\n  "metrics": [\n{metrics}\n  ]\n}}\n')


def _alone(row: MetricsRow, measure: str) -> dict[str, dict[str, float]] | None:
    kept = {i: {measure: layer[measure]} for i, layer in (row.layers or {}).items() if measure in layer}
    return kept or None


@dataclass(frozen=True, kw_only=True)
class _Packed(Record):
    """The fields of a run's one-file form, each as in the file of a run directory."""

    config: dict[str, Any]
    facts: dict[str, Any]
    switch: dict[str, Any] | None = None
    metrics: list[Any]


def _unpacked(file: Path) -> Run:
    written = as_fields(file)
    if isinstance(written, dict) and (lacking := [key for key in ("config", "facts") if key not in written]):
        raise ValueError(f"{file} is no run: it has no {lacking[0]}")
    packed = _Packed.of(without_format(written, file), file)
    config, facts = RunConfig.of(packed.config, file), RunFacts.of(packed.facts, file)
    switch = None if packed.switch is None else Switch.of(packed.switch, file)
    metrics = [MetricsRow.of(row, file) for row in packed.metrics]
    return _whole(Run(file.with_suffix(""), config, facts, metrics, switch), file)
