"""What one serves after 10 minutes of training, on text of which nothing is read twice, and after four times that.

    python experiments/verdict/fresh.py           # what is missing; some 15 minutes of one thread a run
    python experiments/verdict/fresh.py --sweep   # peak rates, on the tuning split; six hours of one thread
    python experiments/verdict/fresh.py --time    # a step of every system in turns, and the fits; an idle machine
    python experiments/verdict/fresh.py --serve   # a token of every export in turns, by plain transformers; the same
    python experiments/verdict/fresh.py --table   # Markdown

The text is the source of the installed packages. The budget is the time of BUDGET steps of the dense model, which take
ten minutes where one takes 86 milliseconds (two idle cores of an AMD EPYC). The best of that have LONG_BUDGET too, in
which the text is read 1.4 to 2.5 times. `--time` measures steps of untrained models in rounds that take every system in
turn, and the distillation of each switch beside dense steps, all of it as a multiple of those. So it says how many
steps the budget holds, for each system a whole schedule of its own. Of a mixture's budget the switch and a tenth of its
steps come after the training in groups; of the one that is switched early, a tenth of the time comes before it, or a
quarter. What is trained may train beside other work, or be stopped: the same command goes on. Peak rates are the best
of fresh-rates.csv, whose runs are as long as the short ones, after an early switch the one from which it falls; of
systems that it does not have, the best of fresh-sweeps.csv, whose runs are shorter, or the default. A system that
stands twice has another rate, share or schedule beside it. "held for 25%": the peak rate stays that long, as before an
early switch; "as if switched": Token Choice by the rates of a mixture that is switched early, with the moments kept,
but without a switch. Rates of those with LONG_BUDGET were tried on the text of the result.
Expected: a switched mixture is level with the best Token Choice, by 0.01 nats, and ahead of it after LONG_BUDGET.

All is exported, and scored by plain transformers in another process, each row alone, over the whole validation text.
fresh.csv has a row each, with its steps and rates before and after a switch; of a mixture before its switch also its
loss in full groups, and alone, a token by as many experts as the granularity, which no plain architecture can hold.
"""

import itertools
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from exported import by_plain_transformers

from mixture_of_tokens import MixtureOfTokensForCausalLM, calibrate_companions, train, transition
from mixture_of_tokens.convert.beginning import carry_moments, go_on_from
from mixture_of_tokens.convert.distil import distil
from mixture_of_tokens.convert.switch import to_token_choice, token_choice_config
from mixture_of_tokens.data.groups import Blocks, training_groups
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.formatting import loss, markdown
from mixture_of_tokens.model.names import SIZES
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.records import Transition
from mixture_of_tokens.runs.run import Run, read
from mixture_of_tokens.training.options import Options
from mixture_of_tokens.training.recipes import RECIPES, merge
from mixture_of_tokens.training.train import run_merged
from mixture_of_tokens.training.trainer import GroupedTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Experiment,
    Sweep,
    check_text,
    directory_of,
    keep,
    loss_alone,
    once,
    read_csv,
    script,
    signed,
    spread,
    step_times,
    steps_of_early_switch,
    swept,
    write_csv,
)

BUDGET, LONG_BUDGET, SEEDS = 7000, 28_000, (1, 2, 3)  # in steps of the dense model
TUNING_SEED = 0  # which no result uses
SHARE_AFTER, EARLY = 0.1, 0.1  # of the steps after a late switch, and of the time before an early one
STEPS, EARLY_STEPS = 2000, 500  # of distillation, for a layer, where the switch is late and early
OPTIONS = Options(device="cpu", data=["packages"])
ROUNDS, TURNS, TIMED, GROUP = 7, 6, 3, 32  # rounds, turns of each system in one, steps of a turn; rows of a group
LITTLE = 4_000_000  # bytes of text, for a model that is only served
DROPLESS, SHARP = {"capacity_factor": "null"}, {"router_temperature": "0.25"}


class System(NamedTuple):
    name: str
    model: Mapping[str, str] = {}
    share: float | None = None  # of the time, before an early switch; None of what is switched at the end, or never
    # Of Token Choice: trained by the schedule of a mixture that is switched early, without a switch.
    rate: float | None = None  # another peak rate than the best that was tried; where the switch is early, after it
    held: float = 0  # the share of its steps in which the rate stays at its peak, as it does before an early switch

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
        return ", ".join([self.name, *settings, *switch, *share, *rate, *held])

    @property
    def scheduled_as(self) -> "System":
        """The mixture whose schedule it has."""
        return self if self.mixes else System(self.name.replace("TC-", "MoT-"), share=self.share)

    @property
    def after(self) -> "System":
        """What it is after its switch."""
        return System(self.name.replace("MoT-", "TC-"), DROPLESS)

    def directory(self, seed: int, budget: int = BUDGET) -> str:
        rate = "" if self.rate is None else f"rate={self.rate:g}"
        share = "" if self.share in (None, EARLY) else f"share={self.share:g}"
        held = f"held={self.held:g}" if self.held else ""
        length = "" if budget == BUDGET else budget
        how = ("early" * self.early, share, rate, held, "fresh", length)
        return directory_of(self.name, self.model, *how, f"seed{seed}")

    @property
    def end(self) -> str:
        """Of the directory of what is exported, where it is trained in two parts."""
        return "-transition" if self.mixes else "-on" if self.early else ""

    @property
    def before(self) -> "System":
        """What is trained first: an early switch may be followed by several rates."""
        return self._replace(rate=None) if self.early else self

    @property
    def served(self) -> "System":
        """What its export is one of."""
        return self.after if self.mixes else self.as_timed

    @property
    def as_timed(self) -> "System":
        """The one whose steps take the same time."""
        return self._replace(share=None, rate=None, held=0)


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
    System("TC-Nano/32E/8", DROPLESS),
    System("STC-Nano/32E/8"),
    System("MoT-Nano/32E"),
    System("MoT-Nano/32E/4"),
    System("MoT-Nano/32E/8"),
    System("MoT-Nano/32E/8", share=EARLY),
    System("MoT-Nano/32E/4", share=0.25, rate=5e-3),
    System("MoT-Nano/32E/4", share=0.25),
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
    System("TC-Nano/32E/8", DROPLESS, rate=5e-3),
    System("STC-Nano/32E/8"),
    System("STC-Nano/32E/8", rate=5e-3),
    System("MoT-Nano/32E"),
    System("MoT-Nano/32E/8"),
    System("MoT-Nano/32E/8", share=EARLY, rate=5e-3),
    System("MoT-Nano/32E/4", share=EARLY),
    System("MoT-Nano/32E/4", share=0.25, rate=5e-3),
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
TIMES, RESULTS, SWEPT, TRIED = "fresh-timings.csv", "fresh.csv", "fresh-sweeps.csv", "fresh-rates.csv"
SERVED, SERVED_ROUNDS = "fresh-serving.csv", 5
Times = Mapping[str, Mapping[str, str]]  # rows of fresh-timings.csv by system


def timed(kept: Path) -> None:
    """Steps of all systems and of what mixtures are after their switch; and distillation, in steps of the dense one."""
    systems = {system.as_timed.label: system.as_timed for system in SYSTEMS}
    systems |= {system.after.label: system.after for system in SYSTEMS if system.mixes}
    models = {}
    for label, system in systems.items():
        config = merge(system.name, 0, None, replace(OPTIONS, model=dict(system.model))).config.model_config
        models[label] = MixtureOfTokensForCausalLM(config)
    text = merge(SYSTEMS[0].name, 0, None, OPTIONS).config.prepare().train
    sizes = {"rows": SIZES["Nano"].batch, "group": GROUP}
    rows = step_times(models, text, rounds=ROUNDS, turns=TURNS, steps=TIMED, **sizes)
    first, *_ = models
    for row in rows:
        label = str(row["system"])
        row["distil_steps_of_dense"] = ""
        if systems[label].mixes:
            dense = [step_times({first: models[first]}, text, rounds=1, steps=5 * TIMED, **sizes)]
            seconds = distillation(models[label], text)
            dense.append(step_times({first: models[first]}, text, rounds=1, steps=5 * TIMED, **sizes))
            each = sum(float(str(one["milliseconds"])) for (one,) in dense) / len(dense) / 1000
            row["distil_steps_of_dense"] = round(seconds / each)
    write_csv(kept / TIMES, list(rows[0]), rows)


def serve(experiment: Experiment) -> None:
    """Milliseconds a token of a row that is written by itself, of exports of models trained for one step."""
    systems = {system.served.label: system.served for system in SYSTEMS}
    rows: list[dict[str, Any]] = []
    for number in range(SERVED_ROUNDS):
        for label, system in systems.items():
            options = replace(OPTIONS, steps=1, max_bytes=LITTLE, model=dict(system.model))
            out = experiment.trained / f"{system.directory(TUNING_SEED)}-served"
            train(system.name, out=out, options=options, resume=True)
            token = by_plain_transformers("milliseconds", out)
            rows.append({"system": label, "round": number, "token_ms": round(token, 3)})
    write_csv(experiment.kept / SERVED, list(rows[0]), rows)


def distillation(source: MixtureOfTokensForCausalLM, text: Blocks) -> float:
    """Seconds of what a switch fits: companions, and STEPS of distillation."""
    source.eval()
    begun = time.perf_counter()
    calibrate_companions(source, training_groups(text, GROUP))
    target = MixtureOfTokensForCausalLM(token_choice_config(source.config)).eval()
    to_token_choice(source, target)
    distil(source, target, text, steps=STEPS)
    return time.perf_counter() - begun


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
    after, fit = float(times[system.after.label]["share_of_dense"]), float(own["distil_steps_of_dense"] or 0)
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


def trained(out: Path, kept: Path, system: System, seed: int, steps: int, rate: float, options: Options) -> None:
    """Train a system, or a mixture up to its switch. Raises SystemExit for another text than that of the kept runs."""
    check_text(merge(SYSTEMS[0].name, 0, None, OPTIONS).config, sorted(kept.glob("*-fresh-*.json"))[:1])
    options = replace(options, steps=steps, model=dict(system.model), training=schedule_of(system, steps))
    train(system.name, out=out, seed=seed, learning_rate=rate, options=options, resume=True)


def switched(source: Path, out: Path, system: System, steps: int, rate: float | None) -> Run:
    """Switch a mixture, and train it on."""
    early: dict[str, Any] = {"schedule": "decay", "distil_steps": EARLY_STEPS, "learning_rate": rate}
    how = early if system.early else {"distil_steps": STEPS}
    transition(source, out=out, steps=steps, device="cpu", resume=True, **how)
    return read(out)


def trained_on(source: Path, out: Path, system: System, seed: int, steps: int, rate: float | None) -> None:
    """As after a switch, but without one: the same weights, moments and text, and a rate that falls from this one."""
    before = read(source)

    def begin(trainer: GroupedTrainer, prepared: Prepared) -> None:
        trainer.causal_lm.load_state_dict(load_model(str(source), device="cpu").state_dict())
        carry_moments(trainer, checkpoints.at(source, before.config.steps), {}, without=())
        go_on_from(before, trainer, out)

    options = replace(OPTIONS, steps=steps, model=dict(system.model), training={"warmup_steps": "0"})
    asked = Transition(source=str(source), calibrate="none", optimizer="carried")
    merged = merge(system.name, seed, rate, options, first_step=before.config.steps, transition=asked)
    run_merged(merged, out, resume=True, begin=begin)


def settings_of(system: System, budget: int, kept: Path) -> dict[str, Any]:
    """How it is trained: steps and peak rates, before a switch and after it."""
    steps, after = steps_within(budget, system, times_in(kept))
    rate, rate_after = best_rate(system, kept), best_rate_after(system, kept)
    return {"steps": steps, "after": after, "rate": rate, "rate_after": "" if rate_after is None else rate_after}


def made(
    experiment: Experiment, budget: int, system: System, seed: int, settings: Mapping[str, Any]
) -> list[dict[str, object]]:
    """The one row of fresh.csv."""
    out = experiment.trained / f"{system.directory(seed, budget)}{system.end}"
    source = experiment.trained / system.before.directory(seed, budget)
    trained(source, experiment.kept, system, seed, settings["steps"], settings["rate"], OPTIONS)
    before = {"in_groups": "", "alone": ""}
    if system.mixes:
        before = {"in_groups": read(source).facts.final_loss, "alone": loss_alone(source, "validation")}
        switched(source, out, system, settings["after"], settings["rate_after"] or None)
    elif system.early:
        trained_on(source, out, system, seed, settings["after"], settings["rate_after"])
    keep([read(out)], experiment.kept, first_seed=SEEDS[0])
    return [{"loss": by_plain_transformers("loss", out), **before}]


def try_rates(experiment: Experiment) -> None:
    """Those of RATES that the file does not have, on the tuning split."""
    for system, rates in RATES:
        steps, after = steps_within(BUDGET, system, times_in(experiment.kept))
        settings = {"steps": steps, "after": after}
        for rate in rates:
            key = {"system": system.label, "learning_rate": rate}
            once(experiment.kept / TRIED, key, tuned, experiment, system, rate, steps, after, settings=settings)


def tuned(experiment: Experiment, system: System, rate: float, steps: int, after: int) -> list[dict[str, float]]:
    """The one row of fresh-rates.csv."""
    options = replace(OPTIONS, evaluate_on="tuning")
    source = experiment.trained / f"{system.directory(TUNING_SEED)}-tuning"
    out = source.with_name(f"{source.name}-{rate:g}")
    if system.early:
        trained(source, experiment.kept, system, TUNING_SEED, steps, best_rate(system, experiment.kept), options)
        switched(source, out, system, after, rate)
    else:
        trained(out, experiment.kept, system, TUNING_SEED, steps, rate, options)
        if system.mixes:
            source, out = out, out.with_name(f"{out.name}-transition")
            switched(source, out, system, after, None)
    return [{"loss": read(out).facts.final_loss}]


def budgets() -> tuple[tuple[int, Sequence[System]], ...]:
    return (BUDGET, SYSTEMS), (LONG_BUDGET, LONG_SYSTEMS)


def make(experiment: Experiment) -> None:
    for (budget, systems), seed in itertools.product(budgets(), SEEDS):
        for system in systems:
            key = {"budget": budget, "system": system.label, "seed": seed}
            settings = settings_of(system, budget, experiment.kept)
            once(experiment.kept / RESULTS, key, made, experiment, budget, system, seed, settings, settings=settings)


def times_in(kept: Path) -> Times:
    if not (kept / TIMES).is_file():
        sys.exit(f"{kept / TIMES} is missing: give --time first, on an idle machine")
    return {row["system"]: row for row in read_csv(kept / TIMES)}


def table(kept: Path, budget: int, systems: Sequence[System]) -> str:
    found, times = [row for row in read_csv(kept / RESULTS) if row["budget"] == str(budget)], times_in(kept)
    head = ["loss of the export", "before the switch, in groups", "alone", "steps", "a step, of dense", "peak rate"]
    head.append("ms a token, served")
    tokens: dict[str, list[float]] = {}
    for row in read_csv(kept / SERVED):
        tokens.setdefault(row["system"], []).append(float(row["token_ms"]))
    lines = [["", "seeds", *head]]
    for system in systems:
        own = [row for row in found if row["system"] == system.label]
        if not own:
            continue
        steps = " + ".join(f"{int(own[0][key]):,}" for key in ("steps", "after") if int(own[0][key]))
        losses = (spread(row[key] for row in own if row[key]) for key in ("loss", "in_groups", "alone"))
        stages = [system.as_timed, *([system.after] if system.mixes else [])]
        shares = [times[stage.label] for stage in stages]
        each = ", then ".join(f"{float(row['share_of_dense']):.2f}" for row in shares)
        peaks = ", then ".join(f"{float(own[0][key]):g}" for key in ("rate", "rate_after") if own[0][key])
        ms = tokens.get(system.served.label)
        token = f"{statistics.median(ms):.2f} ({min(ms):.2f} to {max(ms):.2f})" if ms else ""
        lines.append([system.label, str(len(own)), *losses, steps, each, peaks, token])
    return markdown(lines)


def over_table(kept: Path, budget: int, systems: Sequence[System]) -> str:
    """How far each system ends above the last one, seed by seed."""
    rows = [row for row in read_csv(kept / RESULTS) if row["budget"] == str(budget)]
    found = {(row["system"], row["seed"]): float(row["loss"]) for row in rows}
    last, lines = systems[-1].label, []
    for system in systems[:-1]:
        if system.label not in {label for label, _ in found}:
            continue
        cells = [system.label]
        for seed in map(str, SEEDS):
            known = {(system.label, seed), (last, seed)} <= found.keys()
            cells.append(signed(found[system.label, seed] - found[last, seed]) if known else "")
        lines.append(cells)
    return markdown([[f"above {last}", *(f"seed {seed}" for seed in SEEDS)], *lines])


def rates_table(kept: Path) -> str:
    """Losses of the rates that were tried for the whole budget, with one seed, on the tuning split."""
    found = read_csv(kept / TRIED)
    rates = sorted({float(row["learning_rate"]) for row in found}, reverse=True)
    lines = [["peak rate, or the one after an early switch", *map("{:g}".format, rates)]]
    for system, _ in RATES:
        own = tried(system, kept)
        if own:
            lines.append([system.label, *(loss(own[rate]) if rate in own else "" for rate in rates)])
    return markdown(lines)


def tables(kept: Path) -> str:
    each = [part(kept, *one) for one in budgets() for part in (table, over_table)]
    return "\n\n".join([*each, rates_table(kept)])


def sweep(experiment: Experiment) -> None:
    swept(experiment.kept / SWEPT, SWEEPS, replace(OPTIONS, steps=SWEPT_STEPS), experiment.trained)
    try_rates(experiment)


if __name__ == "__main__":
    experiment = Experiment.named("verdict")
    script(
        __doc__,
        lambda: make(experiment),
        lambda: tables(experiment.kept),
        sweep=("try rates", lambda: sweep(experiment)),
        time=("measure steps on an idle machine", lambda: timed(experiment.kept)),
        serve=("measure tokens of exports on an idle machine", lambda: serve(experiment)),
    )
