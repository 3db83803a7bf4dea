"""The tables of a comparison's page."""

from collections.abc import Callable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from mixture_of_tokens.formatting import difference, duration, loss, ratio, short, with_spread
from mixture_of_tokens.reports.comparison import summary
from mixture_of_tokens.reports.markup import NOTHING, Child, cell_of, html, table, with_swatch
from mixture_of_tokens.reports.prose import seeds_of


def tables(comparison: dict[str, Any]) -> Child:
    models, baseline = comparison["models"], comparison["models"][0]["label"]
    count = len(comparison["seeds"])

    def share(whole: str) -> Callable[[dict[str, Any]], Child]:
        def cell(model: dict[str, Any]) -> Child:
            if model["label"] == baseline:
                return ["1"]
            found = model["reached"][baseline][f"of_{whole}"]
            if found is None:
                return "never"
            few = html("span", f"{found['seeds']} of {count} seeds", class_="range")
            return [cell_of(found, ratio), few if found["seeds"] < count else None]

        return cell

    def against(key: str) -> Callable[[dict[str, Any]], Child]:
        return lambda model: [NOTHING] if model["label"] == baseline else cell_of(model[key], difference)

    result = table(
        "Result",
        f"Losses in nats a token; lower is better. {comparison['steps']:,} steps of "
        f"{comparison['batch_size'] * comparison['context']:,} tokens, {seeds_of(comparison)}. Equal time: when the "
        f"fastest run ended, at {with_spread(comparison['equal_time_seconds'], duration)}.",
        (
            (
                "At equal steps",
                (
                    ("Final loss", lambda model: cell_of(model["final_loss"], loss)),
                    ("Difference", against("final_loss_difference")),
                    ("Bits per byte", lambda model: cell_of(model["bits_per_byte"], loss)),
                ),
            ),
            (f"To {baseline}'s last loss", [(f"Of the {w}", share(w.lower())) for w in ("steps", "time", "FLOPs")]),
            (
                "At equal time",
                (
                    ("Loss", lambda model: cell_of(model["equal_time_loss"], loss, "not yet evaluated")),
                    ("Difference", against("equal_time_loss_difference")),
                ),
            ),
        ),
        _rows(comparison),
    )
    cost = table(
        "Cost",
        "Active parameters are those that a token's computation uses. Memory is an estimate of weights, gradients, "
        "optimizer and what is kept for the backward pass, not a measurement."
        + " Of a switched model all are of what came after the switch."
        * any(model["switched"] for model in models),
        (
            ("", (("Learning rate", lambda model: f"{model['learning_rate']:g}"),)),
            (
                "Parameters",
                (
                    ("Total", lambda model: f"{model['parameters']['total']:,}"),
                    ("Active", lambda model: f"{model['parameters']['active']:,}"),
                ),
            ),
            (
                "FLOPs per token",
                (
                    ("Forward", lambda model: short(model["flops_per_token"]["forward"])),
                    ("Training", lambda model: short(model["flops_per_token"]["training"])),
                ),
            ),
            (
                "Speed here",
                (
                    ("A step", lambda model: cell_of(model["seconds_per_step"], _milliseconds)),
                    ("Tokens a second", lambda model: cell_of(model["tokens_per_second"], lambda n: f"{n:,.0f}")),
                ),
            ),
            ("Memory", (("Estimate", lambda model: f"{short(model['memory_estimate'])}B"),)),
        ),
        _rows(comparison),
    )
    return [result, cost, _everyone(comparison) if len(models) > 2 else None, _seed_by_seed(comparison)]


def switch_table(rows: Sequence[tuple[Child, dict[str, Any]]]) -> Element:
    """The stages of a switch, of `results.through_the_switch`, seed by seed under "stages" of a row."""

    def cell(
        of: Callable[[dict[str, Any]], float | None], shown: Callable[[float], str] = loss
    ) -> Callable[[dict], Child]:
        return lambda row: cell_of(summary(map(of, row["stages"])), shown)

    def jump(stages: dict[str, Any]) -> float | None:
        whole = stages["plain_switch"] - before(stages)
        return (stages["at_the_switch"] - before(stages)) / whole if whole > 0 else None

    def before(stages: dict[str, Any]) -> float:
        return stages["source_in_groups"]

    def routed(key: str, shown: Callable[[float], str]) -> Callable[[dict], Child]:
        def both(row: dict[str, Any]) -> Child:
            known = [stages["routers"] for stages in row["stages"] if stages["routers"] is not None]
            if not known:
                return [NOTHING]
            means = [sum(routers[when][key] for routers in known) / len(known) for when in ("first", "last")]
            return f"{shown(means[0])}, then {shown(means[1])}"

        return both

    note = (
        "Losses over the part of the text that training is evaluated on. As they were: the same weights, the router "
        "choosing. As training begins: what was fitted before the first step is in; the jump left is its loss over the "
        "source's in groups, as a share of that with the weights as they were. Load and dropped tokens are the worst "
        "layer's, soon after the switch and at the end. Seconds of training are without the fit."
    )
    source = (("In groups", cell(before)), ("Each row alone", cell(lambda stages: stages["source_alone"])))
    switched = (
        ("As they were", cell(lambda stages: stages["plain_switch"])),
        ("As training begins", cell(lambda stages: stages["at_the_switch"])),
        ("Jump left", cell(jump, ratio)),
        ("Fit", cell(lambda stages: stages.get("fit_seconds"), duration)),
    )
    recovery = (
        ("A tenth on", cell(lambda stages: stages["after_a_tenth"]["loss"])),
        ("End", cell(lambda stages: stages["at_the_end"])),
    )
    routers = (
        ("Largest load", routed("largest_load", lambda load: f"{load:.1f}")),
        ("Dropped", routed("dropped", lambda share: f"{share:.1%}")),
    )
    groups = (("The source", source), ("Switched", switched), ("Trained on", recovery), ("Routers", routers))
    return table("The switch, stage by stage", note, groups, rows)


def _rows(comparison: dict[str, Any]) -> list[tuple[Child, dict]]:
    return [(with_swatch(i, model["label"]), model) for i, model in enumerate(comparison["models"])]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _everyone(comparison: dict[str, Any]) -> Element:
    """Each model against each."""

    def cell(target: str) -> Callable[[dict[str, Any]], Child]:
        def shown(model: dict[str, Any]) -> Child:
            found = model["reached"][target]
            if model["label"] == target:
                return [NOTHING]
            if found["of_steps"] is None:
                return ["never"]
            few = f" ({found['of_steps']['seeds']} of {len(comparison['seeds'])} seeds)"
            few *= found["of_steps"]["seeds"] < len(comparison["seeds"])
            time = f"{ratio(found['of_time']['mean'])} of the time"
            return [f"{ratio(found['of_steps']['mean'])} of the steps{few}", html("span", time, class_="range")]

        return shown

    columns = [(f"{model['label']}'s", cell(model["label"])) for model in comparison["models"]]
    note = "When the model of a row reaches the last loss of the model of a column, as a share of what that one took."
    return table("Each against each", note, (("", columns),), _rows(comparison))


def _seed_by_seed(comparison: dict[str, Any]) -> Element:
    baseline = comparison["models"][0]["label"]

    def at(key: str, shown: Callable[[float], str]) -> Callable[[dict[str, Any]], str]:
        return lambda run: "never" if run["reached"][baseline] is None else shown(run["reached"][baseline][key])

    rows: list[tuple[Child, dict]] = []
    for i, model in enumerate(comparison["models"]):
        rows += [([with_swatch(i, model["label"]), f", seed {run['seed']}"], run) for run in model["runs"]]
    columns = (
        ("Final loss", lambda run: f"{run['final_loss']:.4f}"),
        ("Bits per byte", lambda run: f"{run['bits_per_byte']:.4f}"),
        ("Time", lambda run: duration(run["seconds"])),
    )
    reach = (
        ("Step", at("step", lambda step: f"{step:,.0f}")),
        ("Time", at("seconds", duration)),
        ("FLOPs", at("flops", short)),
    )
    reach += tuple((f"Of the {whole}", at(f"of_{whole.lower()}", ratio)) for whole in ("steps", "time", "FLOPs"))
    note = "Each run beside the baseline's run of the same seed."
    whole = table("Seed by seed", note, (("At the end", columns), (f"Reaches {baseline}'s last loss at", reach)), rows)
    return html("details", html("summary", "Seed by seed"), whole)
