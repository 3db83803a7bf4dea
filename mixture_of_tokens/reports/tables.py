"""The tables of a comparison's page."""

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from mixture_of_tokens.formatting import Summary, difference, duration, loss, ratio, short, with_span
from mixture_of_tokens.model.routings import PROPERTIES
from mixture_of_tokens.reports.comparison import WAYS, ComparedModel, ComparedRun, Comparison
from mixture_of_tokens.reports.markup import NOTHING, Child, cell_of, html, table, with_swatch
from mixture_of_tokens.reports.prose import OF_WAYS, SERVED, seeds_of, steps_of, way_of
from mixture_of_tokens.runs.records import Switch
from mixture_of_tokens.runs.run import Run, Stages


def tables(comparison: Comparison) -> Child:
    everyone = _everyone(comparison) if len(comparison.models) > 2 else None
    ways = [_served(comparison)] if any(model.shows_ways for model in comparison.models) else []
    return [_result(comparison), *ways, _cost(comparison), _promises(comparison), everyone, _seed_by_seed(comparison)]


def _result(comparison: Comparison) -> Element:
    baseline, count = comparison.models[0].label, len(comparison.seeds)

    def few(found: Summary | None) -> Child:
        if found is None or found.seeds == count:
            return None
        return html("span", f"{found.seeds} of {count} seeds", class_="range")

    def share(whole: str) -> Callable[[ComparedModel], Child]:
        def cell(model: ComparedModel) -> Child:
            if model.label == baseline:
                return ["1"]
            if model.continues == baseline:
                return [NOTHING]
            found = model.reached[baseline].share(whole)
            return "never" if found is None else [cell_of(found, ratio), few(found)]

        return cell

    def against(key: str) -> Callable[[ComparedModel], Child]:
        def cell(model: ComparedModel) -> Child:
            found = getattr(model, key)
            return [NOTHING] if model.label == baseline else [cell_of(found, difference), few(found)]

        return cell

    def at_equal_time(model: ComparedModel) -> Child:
        found = model.equal_time_loss
        return [cell_of(found, loss, "not yet evaluated"), few(found)]

    steps = () if comparison.at_equal_steps else (("Steps", lambda model: f"{model.steps:,}"),)
    at_the_end = (
        *steps,
        ("Final loss", lambda model: cell_of(model.final_loss, loss)),
        ("Difference", against("final_loss_difference")),
        ("Bits per byte", lambda model: cell_of(model.bits_per_byte, loss)),
    )
    note = (
        f"Losses in nats a token; lower is better. {comparison.batch_size * comparison.context:,} tokens a "
        f"step, {steps_of(comparison)}, {seeds_of(comparison)}. Equal time: when the "
        f"fastest run ended, at {with_span(comparison.equal_time_seconds, duration)}. Final losses are over all of the "
        f"{comparison.evaluated_on} text; where curves are compared, over the part that is evaluated during training."
    )
    groups = (
        ("At equal steps" if comparison.at_equal_steps else "At the end", at_the_end),
        (f"To {baseline}'s last loss", [(f"Of the {w}", share(w.lower())) for w in ("steps", "time", "FLOPs")]),
        ("At equal time", (("Loss", at_equal_time), ("Difference", against("equal_time_loss_difference")))),
    )
    return table("Result", note, groups, _rows(comparison))


def _served(comparison: Comparison) -> Element:
    columns = [(OF_WAYS[way].capitalize(), lambda model, way=way: way_of(model, way) or [NOTHING]) for way in WAYS]
    return table("As texts are served", SERVED, (("Loss", columns),), _rows(comparison))


def _cost(comparison: Comparison) -> Element:
    note = (
        "Active parameters are those that a token uses; of a Mixture of Tokens, whose experts read one row for a whole "
        "group, all experts over the group size. Memory is an estimate of weights, gradients, "
        "optimizer and what is kept for the backward pass, not a measurement."
    )
    if any(model.switched for model in comparison.models):
        note += " For a switched model all are of the part after the switch."
    parameters = (
        ("Total", lambda model: f"{model.parameters['total']:,}"),
        ("Active", lambda model: f"{model.parameters['active']:,}"),
    )
    flops = (
        ("Forward", lambda model: short(model.flops_per_token["forward"])),
        ("Training", lambda model: short(model.flops_per_token["training"])),
    )
    speed = (
        ("A step", lambda model: cell_of(model.seconds_per_step, _milliseconds)),
        ("Tokens a second", lambda model: cell_of(model.tokens_per_second, lambda n: f"{n:,.0f}")),
    )
    groups = (
        ("", (("Learning rate", lambda model: f"{model.learning_rate:g}"),)),
        ("Parameters", parameters),
        ("FLOPs per token", flops),
        ("Speed here", speed),
        ("Memory", (("Estimate", lambda model: f"{short(model.memory_estimate)}B"),)),
    )
    return table("Cost", note, groups, _rows(comparison))


def _promises(comparison: Comparison) -> Element:
    note = (
        "Of the routing. Causal: no output depends on later tokens. Private: causal, and none depends on other texts "
        "of the batch, in evaluation. Balanced: what keeps the load of the experts even. Differentiable: no choice of "
        "experts jumps."
    )
    columns = tuple((key.capitalize(), lambda model, key=key: model.properties[key]) for key in PROPERTIES)
    return table("Properties", note, (("", columns),), _rows(comparison))


def switch_table(rows: Sequence[tuple[Child, list[Run]]]) -> Element:
    """The stages of a switch, of the runs of a model after it."""

    def cell(
        of: Callable[[Switch, Stages], float | None], shown: Callable[[float], str] = loss
    ) -> Callable[[list[Run]], Child]:
        return lambda runs: cell_of(Summary.of(of(run.switch, run.stages) for run in runs if run.switch), shown)

    def jump(switch: Switch, stages: Stages) -> float | None:
        plain = switch.plain_switch - switch.source_in_groups
        return (switch.at_the_switch - switch.source_in_groups) / plain if plain > 0 else None

    def routed(key: str, shown: Callable[[float], str]) -> Callable[[list[Run]], Child]:
        def both(runs: list[Run]) -> Child:
            stages = [run.stages for run in runs]
            known = [(each.first, each.last) for each in stages if each.first is not None and each.last is not None]
            if not known:
                return [NOTHING]
            means = [sum(getattr(load, key) for load in loads) / len(known) for loads in zip(*known, strict=True)]
            return f"{shown(means[0])}, then {shown(means[1])}"

        return both

    note = (
        "Losses are over the part of the text that training is evaluated on. Unchanged weights: Token Choice before "
        "the fit. As training begins: after it. Jump left: how far that loss is above the source's in groups, as a "
        "share of the jump with unchanged weights. Load and dropped tokens: in the worst layer, soon after the switch "
        "and at the end. Training time is without the fit."
    )
    source = (
        ("In groups", cell(lambda switch, stages: switch.source_in_groups)),
        ("Each row alone", cell(lambda switch, stages: switch.source_alone)),
    )
    switched = (
        ("Unchanged weights", cell(lambda switch, stages: switch.plain_switch)),
        ("As training begins", cell(lambda switch, stages: switch.at_the_switch)),
        ("Jump left", cell(jump, ratio)),
        ("Fit", cell(lambda switch, stages: switch.fit_seconds, duration)),
    )
    recovery = (
        ("After a tenth", cell(lambda switch, stages: stages.tenth_loss)),
        ("End", cell(lambda switch, stages: stages.end_loss)),
    )
    routers = (
        ("Largest load", routed("largest_load", lambda load: f"{load:.1f}")),
        ("Dropped", routed("dropped", lambda share: f"{share:.1%}")),
    )
    groups = (("The source", source), ("Switched", switched), ("Trained on", recovery), ("Routers", routers))
    return table("The switch, stage by stage", note, groups, rows)


def _rows(comparison: Comparison) -> list[tuple[Child, ComparedModel]]:
    return [(with_swatch(i, model.label), model) for i, model in enumerate(comparison.models)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _everyone(comparison: Comparison) -> Element:
    """Each model against each other one."""

    def cell(target: str) -> Callable[[ComparedModel], Child]:
        def shown(model: ComparedModel) -> Child:
            steps, time = model.reached[target].of_steps, model.reached[target].of_time
            if model.label == target or model.continues == target:
                return [NOTHING]
            if steps is None or time is None:
                return ["never"]
            few = f" ({steps.seeds} of {len(comparison.seeds)} seeds)" * (steps.seeds < len(comparison.seeds))
            beside = html("span", f"{ratio(time.mean)} of the time", class_="range")
            return [f"{ratio(steps.mean)} of the steps{few}", beside]

        return shown

    columns = [(f"{model.label}'s", cell(model.label)) for model in comparison.models]
    note = "When the model of a row reaches the last loss of the model of a column, as a share of what the latter took."
    return table("Each against each", note, (("", columns),), _rows(comparison))


def _seed_by_seed(comparison: Comparison) -> Element:
    baseline = comparison.models[0].label

    def at(key: str, shown: Callable[[float], str]) -> Callable[[ComparedRun], str]:
        return lambda run: "never" if run.reached[baseline] is None else shown(getattr(run.reached[baseline], key))

    rows: list[tuple[Child, ComparedRun]] = []
    for i, model in enumerate(comparison.models):
        rows += [([with_swatch(i, model.label), f", seed {run.seed}"], run) for run in model.runs]
    columns = (
        ("Final loss", lambda run: f"{run.final_loss:.4f}"),
        ("Bits per byte", lambda run: f"{run.bits_per_byte:.4f}"),
        ("Time", lambda run: duration(run.seconds)),
    )
    reach = (
        ("Step", at("step", lambda step: f"{step:,.0f}")),
        ("Time", at("seconds", duration)),
        ("FLOPs", at("flops", short)),
    )
    reach += tuple((f"Of the {whole}", at(f"of_{whole.lower()}", ratio)) for whole in ("steps", "time", "FLOPs"))
    note = "Each run beside the baseline's run of the same seed."
    body = table("Seed by seed", note, (("At the end", columns), (f"Reaches {baseline}'s last loss at", reach)), rows)
    return html("details", html("summary", "Seed by seed"), body)
