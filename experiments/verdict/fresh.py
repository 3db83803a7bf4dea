"""What one serves after 10 minutes of training, on text of which nothing is read twice, and after four times that.

    python experiments/verdict/fresh.py           # what is missing; some 15 minutes of one thread a run
    python experiments/verdict/fresh.py --sweep   # peak rates, on the tuning split; six hours of one thread
    python experiments/verdict/fresh.py --time    # a step of every system in turns, and the fits; an idle machine
    python experiments/verdict/fresh.py --serve   # a token of every export in turns, by plain transformers; the same
    python experiments/verdict/fresh.py --draw    # fresh.svg, of docs/results/equal-time.md, and front.svg, of README
    python experiments/verdict/fresh.py --table   # Markdown

The text is the source of the installed packages. The systems and their schedules are in systems.py. The budget is the
time of BUDGET steps of the dense model, which take ten minutes where one takes 86 milliseconds (two idle cores of an
AMD EPYC). The best of that have LONG_BUDGET too, in which the text is read 1.3 to 2.5 times. `--time` measures steps of
untrained models in rounds that take every system in turn, and the distillation of each switch beside dense steps, all
of it as a multiple of those. So it says how many steps the budget holds, for each system a whole schedule of its own.
Of a mixture's budget the switch and a tenth of its steps come after the training in groups; of the one that is switched
early, a tenth of the time comes before it, or a quarter. What is trained may train beside other work, or be stopped:
the same command goes on. Peak rates are the best of fresh-rates.csv, whose runs are as long as the short ones, after an
early switch the one from which it falls; of systems that it does not have, the best of fresh-sweeps.csv, whose runs are
shorter, or the default. A system that stands twice has another rate, share or schedule beside it. "held for 25%": the
peak rate stays that long, as before an early switch; "as if switched": Token Choice by the rates of a mixture that is
switched early, with the moments kept, but without a switch. Rates of those with LONG_BUDGET were tried on the text of
the result.
Expected: a switched mixture is level with the best Token Choice, by 0.01 nats, and ahead of it after LONG_BUDGET.

All is exported, and scored by plain transformers in another process, each row alone, over the whole validation text.
fresh.csv has a row each, with its steps and rates before and after a switch; of a mixture before its switch also its
loss in full groups, and alone, a token by as many experts as the granularity, which no plain architecture can hold.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exported import by_plain_transformers
from systems import (
    BUDGET,
    EARLY,
    EARLY_STEPS,
    NORMALISED,
    OPTIONS,
    RATES,
    SEEDS,
    SHARP,
    STEPS,
    SWEEPS,
    SWEPT,
    SWEPT_STEPS,
    SYSTEMS,
    TIMES,
    TRIED,
    TUNING_SEED,
    System,
    best_rate,
    budgets,
    schedule_of,
    settings_of,
    steps_within,
    times_in,
    tried,
)

from mixture_of_tokens import MixtureOfTokensForCausalLM, calibrate_companions, train, transition
from mixture_of_tokens.conversion.after_switch import carry_moments, go_on_from
from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import to_token_choice, token_choice_config
from mixture_of_tokens.data.groups import Blocks, training_groups
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.records import Transition
from mixture_of_tokens.runs.run import Point, Run, read_run
from mixture_of_tokens.settings.names import SIZES
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import run_merged
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Experiment,
    check_text,
    keep,
    loss_alone,
    once,
    read_csv,
    script,
    signed,
    spread,
    step_times,
    swept,
    write_csv,
)
from pictures import Curve, curve_of, save_picture

ROUNDS, TURNS, TIMED, GROUP = 7, 6, 3, 32  # rounds, turns of each system in one, steps of a turn; rows of a group
LITTLE = 4_000_000  # bytes of text, for a model that is only served
RESULTS, SERVED, SERVED_ROUNDS = "fresh.csv", "fresh-serving.csv", 5
DRAWN = (
    System("Transformer-Nano"),
    System("TC-Nano/32E", SHARP, rate=1e-2),
    System("TC-Nano/32E/4", NORMALISED, rate=5e-3),
    System("STC-Nano/32E/8"),
    System("MoT-Nano/32E/4", share=EARLY, rate=1e-2, normalised=True),
)
MINUTES = 10  # that the budget takes two cores of an AMD EPYC
FRONT = {  # the places in DRAWN of those that README shows
    "dense": 0,
    "Token Choice (4 of 128 experts)": 2,
    "Mixture of Tokens for a tenth of the time, then Token Choice": 4,
}


def timed(kept: Path) -> None:
    """Steps of all systems and of what mixtures are after their switch; and distillation, in steps of the dense one."""
    systems = {system.as_timed.label: system.as_timed for system in SYSTEMS}
    systems |= {system.after.as_timed.label: system.after.as_timed for system in SYSTEMS if system.mixes}
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


def trained(out: Path, kept: Path, system: System, seed: int, steps: int, rate: float, options: Options) -> None:
    """Train a system, or a mixture up to its switch. Raises SystemExit for another text than that of the kept runs."""
    check_text(merge(SYSTEMS[0].name, 0, None, OPTIONS).config, sorted(kept.glob("*-fresh-*.json"))[:1])
    options = replace(options, steps=steps, model=dict(system.model), training=schedule_of(system, steps))
    train(system.name, out=out, seed=seed, learning_rate=rate, options=options, resume=True)


def switched(source: Path, out: Path, system: System, steps: int, rate: float | None) -> Run:
    """Switch a mixture, and train it on."""
    early: dict[str, Any] = {"schedule": "decay", "distil_steps": EARLY_STEPS, "learning_rate": rate}
    how = (early if system.early else {"distil_steps": STEPS}) | {"norm_topk_prob": system.normalised}
    transition(source, out=out, steps=steps, device="cpu", resume=True, **how)
    return read_run(out)


def trained_on(source: Path, out: Path, system: System, seed: int, steps: int, rate: float | None) -> None:
    """As after a switch, but without one: the same weights, moments and text, and a rate that falls from this one."""
    before = read_run(source)

    def begin(trainer: RunTrainer, prepared: Prepared) -> None:
        trainer.causal_lm.load_state_dict(load_model(str(source), device="cpu").state_dict())
        carry_moments(trainer, checkpoints.at(source, before.config.steps), {}, without=())
        go_on_from(before, trainer, out)

    options = replace(OPTIONS, steps=steps, model=dict(system.model), training={"warmup_steps": "0"})
    asked = Transition(source=str(source), calibrate="none", optimizer="carried")
    merged = merge(system.name, seed, rate, options, first_step=before.config.steps, transition=asked)
    run_merged(merged, out, resume=True, begin=begin)


def made(
    experiment: Experiment, budget: int, system: System, seed: int, settings: Mapping[str, Any]
) -> list[dict[str, object]]:
    """The one row of fresh.csv."""
    out = experiment.trained / f"{system.directory(seed, budget)}{system.end}"
    source = experiment.trained / system.before.directory(seed, budget)
    trained(source, experiment.kept, system, seed, settings["steps"], settings["rate"], OPTIONS)
    before = {"in_groups": "", "alone": ""}
    if system.mixes:
        before = {"in_groups": read_run(source).facts.final_loss, "alone": loss_alone(source, "validation")}
        switched(source, out, system, settings["after"], settings["rate_after"] or None)
    elif system.early:
        trained_on(source, out, system, seed, settings["after"], settings["rate_after"])
    keep([read_run(out)], experiment.kept, first_seed=SEEDS[0])
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
    return [{"loss": read_run(out).facts.final_loss}]


def make(experiment: Experiment) -> None:
    for (budget, systems), seed in itertools.product(budgets(), SEEDS):
        for system in systems:
            key = {"budget": budget, "system": system.label, "seed": seed}
            settings = settings_of(system, budget, experiment.kept)
            once(experiment.kept / RESULTS, key, made, experiment, budget, system, seed, settings, settings=settings)


def table(kept: Path, budget: int, systems: Sequence[System]) -> str:
    found, times = [row for row in read_csv(kept / RESULTS) if row["budget"] == str(budget)], times_in(kept)
    head = [
        "loss of the export",
        "before the switch, in groups",
        "alone",
        "steps",
        "step time, of dense",
        "peak learning rate",
    ]
    tokens, lines = token_ms(kept), [["", "seeds", *head, "ms a token"]]
    for system in systems:
        own = [row for row in found if row["system"] == system.label]
        if not own:
            continue
        steps = " + ".join(f"{int(own[0][key]):,}" for key in ("steps", "after") if int(own[0][key]))
        losses = (spread(row[key] for row in own if row[key]) for key in ("loss", "in_groups", "alone"))
        stages = [system.as_timed, *([system.after.as_timed] if system.mixes else [])]
        shares = [times[stage.label] for stage in stages]
        each = ", then ".join(f"{float(row['share_of_dense']):.2f}" for row in shares)
        peaks = ", then ".join(f"{float(own[0][key]):g}" for key in ("rate", "rate_after") if own[0][key])
        lines.append([system.label, str(len(own)), *losses, steps, each, peaks, tokens.get(system.served.label, "")])
    return markdown(lines)


def token_ms(kept: Path) -> dict[str, str]:
    """Milliseconds a token of what is served: the median, with least and greatest."""
    tokens: dict[str, list[float]] = {}
    for row in read_csv(kept / SERVED):
        tokens.setdefault(row["system"], []).append(float(row["token_ms"]))
    return {each: f"{statistics.median(ms):.2f} ({min(ms):.2f} to {max(ms):.2f})" for each, ms in tokens.items()}


def summary(kept: Path) -> str:
    """The systems that were tried in both budgets, each by the best of the rates that have most seeds."""
    rows, tokens = read_csv(kept / RESULTS), token_ms(kept)
    kinds: dict[str, dict[int, list[System]]] = {}  # by label without a rate, and by budget
    for budget, systems in budgets():
        for system in systems:
            kinds.setdefault(system.at_any_rate.label, {}).setdefault(budget, []).append(system)
    lines = [["", "10 minutes: loss", "peak learning rate", "40 minutes: loss", "peak learning rate", "ms a token"]]
    for label, of_budget in kinds.items():
        cells = []
        for budget, systems in of_budget.items():
            known = [
                [row for row in rows if row["budget"] == str(budget) and row["system"] == each.label]
                for each in systems
            ]
            if not any(known):
                continue
            most = [own for own in known if len(own) == max(map(len, known))]
            best = min(most, key=lambda own: statistics.fmean(float(row["loss"]) for row in own))
            few = "" if len(best) == len(SEEDS) else ", one seed"
            rate = float(best[0]["rate_after"] or best[0]["rate"])
            cells += [f"{spread(row['loss'] for row in best)}{few}", f"{rate:g}"]
        if len(cells) == 2 * len(budgets()):
            lines.append([label, *cells, tokens.get(of_budget[BUDGET][0].served.label, "")])
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
    lines = [["peak learning rate, or the one after an early switch", *map("{:g}".format, rates)]]
    for system, _ in RATES:
        own = tried(system, kept)
        if own:
            lines.append([system.label, *(loss(own[rate]) if rate in own else "" for rate in rates)])
    return markdown(lines)


def tables(kept: Path) -> str:
    each = [part(kept, *one) for one in budgets() for part in (table, over_table)]
    return "\n\n".join([summary(kept), *each, rates_table(kept)])


def curve(experiment: Experiment, system: System, label: str, since: float) -> Curve:
    """Losses against time, in steps of the dense model, from then on; of a mixture before its switch, in groups."""
    times = times_in(experiment.kept)
    runs = [read_run(experiment.kept / f"{system.directory(seed)}{system.end}.json") for seed in SEEDS]
    steps, _ = steps_within(BUDGET, system, times)
    before, after = (float(times[each.label]["share_of_dense"]) for each in (system.as_timed, system.served))
    fit = float(times[system.as_timed.label]["distil_steps_of_dense"] or 0) * EARLY_STEPS / STEPS

    def at(point: Point) -> float:
        return point.step * before if point.step <= steps else steps * before + fit + (point.step - steps) * after

    return curve_of(label, runs, since / after, at)


def draw(experiment: Experiment) -> None:
    """All from a twelfth of the time on, and the sparse ones in its second half; and the three of the first pages."""
    labels = [f"{system.name}, switched early" if system.early else system.name for system in DRAWN]
    panels = {
        "time, in steps of the dense model": [
            curve(experiment, system, label, BUDGET / 12) for system, label in zip(DRAWN, labels, strict=True)
        ],
        "the sparse ones, second half": [
            curve(experiment, system, label, BUDGET / 2) for system, label in zip(DRAWN[1:], labels[1:], strict=True)
        ],
    }
    save_picture(panels, "loss on validation text", experiment.kept / "fresh.svg", apart=True, legend=1)
    front = [curve(experiment, DRAWN[place], label, BUDGET / 12) for label, place in FRONT.items()]
    front = [each._replace(x=each.x * MINUTES / BUDGET) for each in front]
    switch = {"the mixture becomes Token Choice": EARLY * MINUTES}
    save_picture({"minutes of training": front}, "loss, nats a token", experiment.kept / "front.svg", marked=switch)


def sweep(experiment: Experiment) -> None:
    swept(experiment.kept / SWEPT, SWEEPS, replace(OPTIONS, steps=SWEPT_STEPS), experiment.trained)
    try_rates(experiment)


if __name__ == "__main__":
    experiment = Experiment.named("verdict")
    script(
        __doc__,
        lambda: make(experiment),
        lambda: tables(experiment.kept),
        draw=("draw fresh.svg and front.svg of what is committed", lambda: draw(experiment)),
        sweep=("try rates", lambda: sweep(experiment)),
        time=("measure steps on an idle machine", lambda: timed(experiment.kept)),
        serve=("measure tokens of exports on an idle machine", lambda: serve(experiment)),
    )
