"""What the scripts here share: systems and the runs of them, and claims with what the runs say.

All scripts share the runs in this folder: a run is known by its name, its settings, its steps and its seed. The peak
rates of Micros were chosen with seed 1, so their results are of seeds from 2 on; those of Nanos with seed 0, but for
the routings of `../routings`, whose rates were chosen with seed 1 too, on tuning text.

Micros see the source text of installed packages; training is as the paper's, bf16 where autocast allows, weights and
optimizer in fp32, cosine to a tenth of the peak; compiled. Nanos see the standard library's source, in fp32 if nothing
else is said, and those without settings are the runs of `../nano`, `../long` and `../routings`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

from mixture_of_tokens import train
from mixture_of_tokens.runs.run import Run, read_run
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, check_text, directory_of, keep, script

EXPERIMENT, *PLAIN_NANOS = (Experiment.named(name) for name in ("paper", "nano", "long", "routings"))
SIZES = {
    "Nano": Options(device="cpu"),
    "Micro": Options(device="cpu", data=["packages"], training={"bf16": "true", "torch_compile": "true"}),
}
FIRST_SEEDS = {"Nano": 1, "Micro": 2}  # whose telemetry is kept
DISTIL_STEPS = 2000  # of a switch; the default when these were made


class System(NamedTuple):
    """A model, with settings of its configuration and of its training that are not the size's.

    title: what they are called where their list would be long.
    retired: settings that commit 8112891 was the last to have; runs with them are kept, and can be made again by it.
    """

    name: str
    model: Mapping[str, str] = {}
    training: Mapping[str, str] = {}
    learning_rate: float | None = None
    retired: Mapping[str, object] = {}
    title: str = ""

    @property
    def settings(self) -> dict[str, object]:
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {**self.model, **self.training, **rate, **self.retired}

    @property
    def label(self) -> str:
        settings = [self.title] if self.title else [f"{field} {value}" for field, value in self.settings.items()]
        return ", ".join([self.name, *settings])

    def options(self, steps: int) -> Options:
        size = SIZES[parse_name(self.name).size]
        training = {**size.training, **self.training}
        if self.retired:
            sys.exit(f"{self.label} can be trained by commit 8112891 and those before it")
        return replace(size, steps=steps, training=training, model=dict(self.model))

    def directory(self, steps: int, seed: int) -> str:
        return directory_of(self.name, self.title.replace(" ", "-") or self.settings, f"{steps}-seed{seed}")


class Row(NamedTuple):
    """A system after so many steps, and its seeds."""

    system: System
    steps: int
    seeds: Sequence[int] = (2,)

    @property
    def runs(self) -> dict[int, Run]:
        """Those that are kept, by seed."""
        runs = {seed: run_of(self.system, self.steps, seed) for seed in self.seeds}
        return {seed: run for seed, run in runs.items() if run is not None}

    @property
    def complete(self) -> bool:
        return len(self.runs) == len(self.seeds)


@cache
def check_text_of(size: str) -> None:
    """Raises SystemExit where the text on this machine is another one than that of the kept runs of a size."""
    dense = System(f"Transformer-{size}")
    check_text(merge(dense.name, 0, None, dense.options(1)).config, kept_dense(size))


def kept_dense(size: str) -> list[Path]:
    """Runs of dense models, whose text was not cut for other groups."""
    plain = re.compile(rf"Transformer-{size}(-\d+)?-seed\d+\.json")
    folders = [EXPERIMENT.kept, *(each.kept for each in PLAIN_NANOS)]
    return [file for folder in folders for file in folder.glob("*.json") if plain.fullmatch(file.name)]


def trained(rows: Iterable[Row]) -> None:
    """Train what is missing, short runs and low seeds first, and keep what is finished."""
    missing = [(steps, seed, system) for system, steps, seeds in rows for seed in seeds]
    for steps, seed, system in sorted(missing, key=lambda run: run[:2]):
        if run_of(system, steps, seed) is None:
            out = with_weights(system, steps, seed)
            keep([read_run(out)], EXPERIMENT.kept, first_seed=FIRST_SEEDS[parse_name(system.name).size])


def with_weights(system: System, steps: int, seed: int) -> Path:
    """The directory of a run, which is trained where it is missing."""
    check_text_of(parse_name(system.name).size)
    out = EXPERIMENT.trained / system.directory(steps, seed)
    options, rate = system.options(steps), system.learning_rate
    train(system.name, out=out, seed=seed, learning_rate=rate, options=options, resume=True)
    return out


def run_of(system: System, steps: int, seed: int) -> Run | None:
    """A run that is kept, if it is."""
    files = [EXPERIMENT.kept / f"{system.directory(steps, seed)}.json"]
    if not system.settings:
        files += [each.kept / f"{directory_of(system.name, f'seed{seed}')}.json" for each in PLAIN_NANOS]
    found = (_kept(file) for file in files if file.is_file())
    return next((run for run in found if run.config.steps == steps), None)


@cache
def _kept(file: Path) -> Run:
    """Read once, as several studies ask for one run."""
    return read_run(file)


CONFIRMED, IN_PART, CONTRADICTED = "confirmed", "in part", "contradicted"
OPEN = "open"  # as long as runs are missing, or seeds differ by more than what is asked


def verdict(holds: bool, in_part: bool) -> str:
    return CONFIRMED if holds else IN_PART if in_part else CONTRADICTED


Said = tuple[list[str], str]


@dataclass(frozen=True)
class Study:
    """A claim, the runs that test it, and what they say.

    paper: its value there.
    says: what was measured, in parts, and the verdict of complete rows; None where nothing can be said yet.
    heading: what all of these parts are.
    table: of the rows of which a run is kept, as Markdown.
    make: trains what is missing, by default of the rows.
    draw: its picture, if it has one.
    """

    id: str
    claim: str
    paper: str
    says: Callable[[], Said | None]
    table: Callable[[Sequence[Row]], str]
    heading: str = ""
    rows: Sequence[Row] = ()
    make: Callable[[], None] | None = None
    draw: Callable[["Study"], None] | None = None

    @cached_property
    def found(self) -> tuple[str, str]:
        """What was measured, and the verdict."""
        told, verdict = self.says() or ([], OPEN)
        heading = [self.heading] if self.heading and told else []
        return ": ".join([*heading, "; ".join(told)]), verdict if all(row.complete for row in self.rows) else OPEN

    @property
    def command(self) -> str:
        return f"python experiments/paper/{self.id}.py"

    def main(self, doc: str | None) -> None:
        def make() -> None:
            (self.make or partial(trained, self.rows))()
            if self.draw is not None:
                self.draw(self)

        script(doc, make, lambda: self.table(self.rows))
