"""The systems of fresh.py, and how each is trained: its peak rates, its steps within a budget, its schedule.

Times of a step and of a switch are those of fresh-timings.csv, and rates the best of fresh-rates.csv and of
fresh-sweeps.csv; fresh.py says how they were made.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.settings.recipes import RECIPES
from mixture_of_tokens.training.merging import merge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Sweep, directory_of, read_csv, steps_of_early_switch

BUDGET, LONG_BUDGET, SEEDS = 7000, 28_000, (1, 2, 3)  # in steps of the dense model
TUNING_SEED = 0  # which no result uses
SHARE_AFTER, EARLY = 0.1, 0.1  # of the steps after a late switch, and of the time before an early one
STEPS, EARLY_STEPS = 2000, 500  # of distillation, for a layer, where the switch is late and early
OPTIONS = Options(device="cpu", data=["packages"])
DROPLESS, SHARP = {"capacity_factor": "null"}, {"router_temperature": "0.25"}
NORMALISED = DROPLESS | {"norm_topk_prob": "true"}  # a token's gates sum to one
TIMES, SWEPT, TRIED = "fresh-timings.csv", "fresh-sweeps.csv", "fresh-rates.csv"
Times = Mapping[str, Mapping[str, str]]  # rows of fresh-timings.csv by system


class System(NamedTuple):
    name: str
    model: Mapping[str, str] = {}
    share: float | None = None  # of the time, before an early switch; None of what is switched at the end, or never
    # Of Token Choice: trained by the schedule of a mixture that is switched early, without a switch.
    rate: float | None = None  # another peak rate than the best that was tried; where the switch is early, after it
    held: float = 0  # the share of its steps in which the rate stays at its peak, as it does before an early switch
    normalised: bool = False  # of a mixture: after its switch a token's gates sum to one

    @property
    def mixes(self) -> bool:
        return self.name.startswith("MoT-")

    @property
    def early(self) -> bool:
        return self.share is not None

    @property
    def label(self) -> str:
        settings = [f"{field} {value}" for field, value in self.model.items()]
        switch = ["switched early" if self.early else "switched"] if self.mixes else ["as if switched"] * self.early
        share = [] if self.share in (None, EARLY) else [f"after {self.share:.0%}"]
        rate = [] if self.rate is None else [f"rate {self.rate:g}"]
        held = [f"held for {self.held:.0%}"] if self.held else []
        gates = ["to normalised gates"] * self.normalised
        return ", ".join([self.name, *settings, *switch, *share, *gates, *rate, *held])

    @property
    def scheduled_as(self) -> "System":
        """The mixture whose schedule it has."""
        return self if self.mixes else System(self.name.replace("TC-", "MoT-"), share=self.share)

    @property
    def after(self) -> "System":
        """What it is after its switch."""
        return System(self.name.replace("MoT-", "TC-"), NORMALISED if self.normalised else DROPLESS)

    def directory(self, seed: int, budget: int = BUDGET) -> str:
        rate = "" if self.rate is None else f"rate={self.rate:g}"
        share = "" if self.share in (None, EARLY) else f"share={self.share:g}"
        held = f"held={self.held:g}" if self.held else ""
        length = "" if budget == BUDGET else budget
        how = ("early" * self.early, share, "normalised" * self.normalised, rate, held, "fresh", length)
        return directory_of(self.name, self.model, *how, f"seed{seed}")

    @property
    def end(self) -> str:
        """Of the directory of what is exported, where it is trained in two parts."""
        return "-transition" if self.mixes else "-on" if self.early else ""

    @property
    def before(self) -> "System":
        """What is trained first: an early switch may be followed by several rates, and by either kind of gates."""
        return self._replace(rate=None, normalised=False) if self.early else self

    @property
    def served(self) -> "System":
        """What its export is one of."""
        return (self.after if self.mixes else self).as_timed

    @property
    def at_any_rate(self) -> "System":
        """What the tables compare, whatever rate it has."""
        return self._replace(rate=None, held=0)

    @property
    def as_timed(self) -> "System":
        """The one whose steps take the same time; to normalise a token's gates is taken to cost none."""
        model = {field: value for field, value in self.model.items() if field != "norm_topk_prob"}
        return self._replace(model=model, share=None, rate=None, held=0, normalised=False)


SYSTEMS = (
    System("Transformer-Nano"),
    System("Transformer-Nano", rate=1e-2),
    System("TC-Nano/32E", SHARP),
    System("TC-Nano/32E", SHARP, rate=1e-2),
    System("TC-Nano/32E", SHARP, rate=2.5e-3),
    System("TC-Nano/32E", SHARP | DROPLESS),
    System("TC-Nano/32E/4", DROPLESS),
    System("TC-Nano/32E/4", DROPLESS, rate=1e-2),
    System("TC-Nano/32E/4", DROPLESS, rate=1e-2, held=0.25),
    System("TC-Nano/32E/4", DROPLESS, rate=2e-2, held=0.25),
    System("TC-Nano/32E/4", DROPLESS, share=0.25),
    System("TC-Nano/32E/4", NORMALISED, rate=2e-2),
    System("TC-Nano/32E/4", NORMALISED, rate=1e-2),
    System("TC-Nano/32E/4", NORMALISED, rate=5e-3),
    System("TC-Nano/32E/8", DROPLESS),
    System("STC-Nano/32E/8"),
    System("MoT-Nano/32E"),
    System("MoT-Nano/32E/4"),
    System("MoT-Nano/32E/8"),
    System("MoT-Nano/32E/8", share=EARLY),
    System("MoT-Nano/32E/4", share=0.25, rate=5e-3),
    System("MoT-Nano/32E/4", share=0.25),
    System("MoT-Nano/32E/4", share=0.25, rate=1e-2, normalised=True),
    System("MoT-Nano/32E/4", share=EARLY, rate=5e-3, normalised=True),
    System("MoT-Nano/32E/4", share=EARLY, rate=1e-2, normalised=True),
    System("MoT-Nano/32E/4", share=EARLY),  # with which the others are compared
)
LONG_SYSTEMS = (
    System("Transformer-Nano"),
    System("TC-Nano/32E", SHARP),
    System("TC-Nano/32E", SHARP, rate=1e-2),
    System("TC-Nano/32E", SHARP | DROPLESS),
    System("TC-Nano/32E", SHARP | DROPLESS, rate=5e-3),
    System("TC-Nano/32E/4", DROPLESS),
    System("TC-Nano/32E/4", DROPLESS, rate=2.5e-3),
    System("TC-Nano/32E/4", NORMALISED, rate=5e-3),
    System("TC-Nano/32E/8", DROPLESS, rate=5e-3),
    System("STC-Nano/32E/8"),
    System("STC-Nano/32E/8", rate=5e-3),
    System("MoT-Nano/32E"),
    System("MoT-Nano/32E/8"),
    System("MoT-Nano/32E/8", share=EARLY, rate=5e-3),
    System("MoT-Nano/32E/4", share=EARLY),
    System("MoT-Nano/32E/4", share=0.25, rate=5e-3),
    System("MoT-Nano/32E/4", share=EARLY, rate=5e-3, normalised=True),
    System("MoT-Nano/32E/4", share=EARLY, rate=5e-3),
)
# Peak rates that were tried, with seed 1, at this number of steps.
SWEPT_STEPS = 1500
SWEEPS: tuple[Sweep, ...] = (
    ("TC-Nano/32E/8", [1e-2, 2e-2, 5e-3, 4e-2], DROPLESS),
    ("TC-Nano/32E/8", [1e-2, 2e-2], DROPLESS | SHARP),
    ("STC-Nano/32E/8", [1e-2, 2e-2, 5e-3, 4e-2], {}),
    ("MoT-Nano/32E/4", [2e-2, 1e-2], {}),
    ("MoT-Nano/32E/8", [2e-2, 1e-2], {}),
)
# Those that were tried, with TUNING_SEED, for the whole budget: from the start, or after an early switch.
RATES: tuple[tuple[System, tuple[float, ...]], ...] = (
    (System("TC-Nano/32E", SHARP), (1e-2, 5e-3)),
    (System("TC-Nano/32E/4", DROPLESS), (2e-2, 1e-2, 5e-3)),
    (System("TC-Nano/32E/8", DROPLESS), (2e-2, 1e-2, 5e-3)),
    (System("STC-Nano/32E/8"), (2e-2, 1e-2, 5e-3)),
    (System("MoT-Nano/32E/4"), (2e-2, 1e-2)),
    (System("MoT-Nano/32E", share=EARLY), (2e-2, 1e-2)),
    (System("MoT-Nano/32E/4", share=EARLY), (2e-2, 1e-2, 5e-3)),
    (System("MoT-Nano/32E/8", share=EARLY), (2e-2, 1e-2)),
)


def budgets() -> tuple[tuple[int, Sequence[System]], ...]:
    return (BUDGET, SYSTEMS), (LONG_BUDGET, LONG_SYSTEMS)


def times_in(kept: Path) -> Times:
    if not (kept / TIMES).is_file():
        sys.exit(f"{kept / TIMES} is missing: give --time first, on an idle machine")
    return {row["system"]: row for row in read_csv(kept / TIMES)}


def settings_of(system: System, budget: int, kept: Path) -> dict[str, Any]:
    """How it is trained: steps and peak rates, before a switch and after it."""
    steps, after = steps_within(budget, system, times_in(kept))
    rate, rate_after = best_rate(system, kept), best_rate_after(system, kept)
    return {"steps": steps, "after": after, "rate": rate, "rate_after": "" if rate_after is None else rate_after}


def best_rate(system: System, kept: Path) -> float:
    """The peak rate from the start on. The default, where none were tried, is the best of earlier sweeps."""
    if system.rate is not None and not system.early:
        return system.rate
    system = system.scheduled_as if system.early else system
    rates = {} if system.early else tried(system, kept)
    for row in [] if rates else read_csv(kept / SWEPT):
        flags = dict(re.findall(r"--(\S+) (\S+)", row["settings"]))
        rate = float(flags.pop("learning-rate"))
        if row["name"] == system.name and flags == {f"model.{field}": value for field, value in system.model.items()}:
            rates[rate] = float(row["tuning_loss"])
    return min(rates, key=rates.__getitem__) if rates else merge(system.name, 0, None, OPTIONS).config.learning_rate


def best_rate_after(system: System, kept: Path) -> float | None:
    """The rate from which it falls after an early switch; None after a late one, which goes on with the one before."""
    if not system.early:
        return None
    rates = tried(system.scheduled_as._replace(share=EARLY), kept)
    return system.rate or min(rates, key=rates.__getitem__, default=None)


def tried(system: System, kept: Path) -> dict[float, float]:
    """Losses of the rates that were tried for the whole budget."""
    rows = read_csv(kept / TRIED)
    return {float(row["learning_rate"]): float(row["loss"]) for row in rows if row["system"] == system.label}


def steps_within(budget: float, system: System, times: Times) -> tuple[int, int]:
    """Those that fit into the time of so many dense steps: in all or before the switch, and after it."""
    own = times[system.as_timed.label]
    each = float(own["share_of_dense"])
    if not (system.mixes or system.early):
        return int(budget / each), 0
    after, fit = float(times[system.after.as_timed.label]["share_of_dense"]), float(own["distil_steps_of_dense"] or 0)
    if system.share is not None:
        how = {"before": each, "after": after, "fit": fit * EARLY_STEPS / STEPS}
        return steps_of_early_switch(budget, system.share, **how)
    steps = int((budget - fit) / (each + SHARE_AFTER * after))
    return steps, round(SHARE_AFTER * steps)


def schedule_of(system: System, steps: int) -> dict[str, Any]:
    """Fields of TrainingArguments: before an early switch the rate stays, and falls after it (../switch/when.py)."""
    if system.early:
        return {"lr_scheduler_type": "constant_with_warmup"}
    if not system.held:
        return {}
    held, warm_up = int(system.held * steps), RECIPES["Nano"].warmup_steps
    falls = {"num_stable_steps": held - warm_up, "num_decay_steps": steps - held}
    falls |= {"decay_type": "cosine", "min_lr_ratio": 0.1}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": falls}
