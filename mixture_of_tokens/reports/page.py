"""A comparison as one HTML page that needs nothing else: no network, no script. Its text is in templates/."""

import json
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from mixture_of_tokens.data.report import title_of
from mixture_of_tokens.reports import findings
from mixture_of_tokens.reports.comparison import RATIOS, ComparedModel, Comparison
from mixture_of_tokens.reports.figures import SERIES, Line, panel, swatch
from mixture_of_tokens.reports.origins import Origin
from mixture_of_tokens.reports.samples import PROMPTS, TEMPERATURE
from mixture_of_tokens.runs.run import Point, Run
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import MIXTURE, TABLE
from mixture_of_tokens.utils.formatting import Summary, duration, enumerated, loss, ratio, short
from mixture_of_tokens.utils.rendering import page_of

POINTS = 400  # of a line of measurements, which is about as many pixels wide
SKIPPED = 0.15  # of the steps, whose steep losses would flatten the rest of the picture
NAMED = 4  # models at most, whose labels are a page's title
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def page(
    comparison: Comparison, models: dict[str, list[Run]], samples: dict[str, dict[str, str]], commands: list[str]
) -> str:
    """The page as HTML.

    Args:
        comparison: of `comparison.comparison`; models: the runs that it compares.
        samples: Continuations by prompt and by the model's label; empty if there are none.
        commands: Those that make it again.
    """
    labels, switches = list(models), _switches(models)
    names = [parse_name(model.name) for model in comparison.models]
    systems = {name.system for name in names} | ({MIXTURE.prefix} if switches else set())
    common_settings, own_settings = _settings(models)
    return page_of(
        "page.html.j2",
        title=_title(labels),
        comparison=comparison,
        rows=[(i, model.label, model) for i, model in enumerate(comparison.models)],
        findings=findings,
        labels=labels,
        several=len(labels) > 1,
        seeds=findings.seeds_of(comparison),
        series=SERIES,
        swatch=swatch,
        curves=_curves(comparison, switches),
        switched=[(i, labels[i], models[labels[i]]) for i in switches],
        switch_figure=_through_the_switch(models, switches) if switches else "",
        over_seeds=_over_seeds,
        loads=_loads,
        milliseconds=lambda seconds: f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s",
        measures=_measures(models, {i: at.step for i, at in switches.items()}),
        measured_seeds=_measured_seeds(models),
        samples=samples,
        prompts=len(PROMPTS),
        temperature=TEMPERATURE,
        routings=[row for row in TABLE if row.prefix in systems],
        example=next((name for name in names if name.routing.sparse), None),
        commands=commands,
        title_of=title_of,
        common_settings=common_settings,
        own_settings=own_settings,
    )


def _title(labels: Sequence[str]) -> str:
    """What a page compares; where models differ in settings alone, their name stands there once."""
    if len(labels) == 1:
        return labels[0]
    name, *others = dict.fromkeys(label.partition(" (")[0] for label in labels)
    inside = [label.partition(" (")[2].removesuffix(")") for label in labels]
    if others or "" in inside:
        return f"{enumerated(labels) if len(labels) <= NAMED else f'{len(labels)} models'} compared"
    return f"{name}: {enumerated(inside) if len(labels) <= NAMED else f'{len(labels)} settings'} compared"


def _over_seeds(runs: list[Run], field: str) -> Summary | None:
    """Of switch.FIELD or stages.FIELD of the runs after a switch."""
    return Summary.of(attrgetter(field)(run) for run in runs if run.switch is not None)


def _loads(runs: list[Run], field: str) -> list[float]:
    """The worst layer's soon after the switch and at the end, means over the seeds; empty where it is not known."""
    stages = [run.stages for run in runs]
    known = [(each.first, each.last) for each in stages if each.first is not None and each.last is not None]
    return [sum(getattr(load, field) for load in loads) / len(known) for loads in zip(*known, strict=True)]


def _measured_seeds(models: dict[str, list[Run]]) -> list[str]:
    seeds = {run.seed for model in models.values() for run in model if any(row.layers for row in run.rows)}
    return [str(seed) for seed in sorted(seeds)]


def _switches(models: dict[str, list[Run]]) -> dict[int, Point]:
    """Where models became Token Choice, by their number: means over the seeds."""
    found = {}
    for i, model in enumerate(models.values()):
        at = [run.switch for run in model if run.switch is not None]
        if at:
            spent = ((s.step, s.tokens, s.seconds, s.tokens * s.flops_per_token, s.at_the_switch) for s in at)
            found[i] = Point(*(sum(values) / len(at) for values in zip(*spent, strict=True)))
    return found


def _curves(comparison: Comparison, switches: dict[int, Point]) -> list[tuple[str, str, list[str]]]:
    """Figures, with what they are against and when each other model reaches the baseline's last loss."""
    models, baseline, origin = comparison.models, comparison.models[0], comparison.origin
    level = sum(run.curve[-1].loss for run in baseline.runs) / len(baseline.runs)
    curves = [[run.curve for run in model.runs] for model in models]
    lines = {key: [_mean_curve(i, runs, key) for i, runs in enumerate(curves)] for key in RATIOS.values()}
    after_start = (
        y for line in lines["step"] for x, y in zip(line.x, line.y, strict=True) if x >= SKIPPED * comparison.steps
    )
    start = max(after_start, default=level)
    if comparison.begins_trained:  # there is no steep start
        start = max(max(line.high or line.y) for line in lines["step"])
    least = min(min(line.low or line.y) for line in lines["step"])
    top = start + 0.05 * (start - least) + 0.01
    bottom = least - 0.06 * (top - least)
    seconds = max(line.x[-1] for line in lines["seconds"])
    unit, each = ("s", 1) if seconds < 180 else ("min", 60) if seconds < 10800 else ("h", 3600)
    power = len(f"{max(line.x[-1] for line in lines['flops']):.0f}") - 1
    axes = {
        "steps": ("steps", 1.0, "Steps"),
        "time": (f"training time, {unit}", each, "Time"),
        "flops": (f"training FLOPs, 10{str(power).translate(SUPERSCRIPTS)}", 10.0**power, "FLOPs"),
    }
    figures = []
    for whole, (x_label, scale, head) in axes.items():
        key, points = RATIOS[whole], []
        for i, model in enumerate(models):
            found = getattr(model.reached[baseline.label], key)
            if i and found is not None and found.seeds == len(comparison.seeds):
                points.append((i, found.mean / scale, level))
        drawn = lines[key] if origin is None else [*lines[key], _before(origin, key, lines[key], len(models))]
        scaled = [Line(line.series, [x / scale for x in line.x], line.y, line.low, line.high) for line in drawn]
        label = f"Evaluation loss against {x_label.split(',')[0]}. " + _ends(models, key, lines[key])
        figure = panel(
            scaled,
            label=label,
            x_label=x_label,
            y_label="loss, nats a token",
            x_range=(min(line.x[0] for line in scaled) if origin else 0, None),
            y_range=(bottom, top),
            level=level,
            points=points,
            switches=[(i, getattr(at, key) / scale) for i, at in switches.items()],
        )
        figures.append((figure, head, _shares(comparison, whole)))
    return figures


def _before(origin: Origin, key: str, lines: Sequence[Line], series: int) -> Line:
    """The end of the curve of the model that all began with, as long as the longest of theirs."""
    longest = max(line.x[-1] for line in lines)
    curves = [[point for point in curve if getattr(point, key) >= -longest] for curve in origin.curves]
    fewest = min(map(len, curves))
    return _mean_curve(series, [curve[-fewest:] for curve in curves], key)


def _through_the_switch(models: dict[str, list[Run]], at: dict[int, Point]) -> str:
    """The curve from shortly before the switch to the end, with the jump."""
    labels = list(models)
    switches = {i: [run.switch for run in models[labels[i]] if run.switch is not None] for i in at}
    plain = {i: sum(switch.plain_switch for switch in of) / len(of) for i, of in switches.items()}
    lines = [_mean_curve(i, [run.curve for run in model], "step") for i, model in enumerate(models.values())]
    first = min(point.step for point in at.values())
    start = first - (max(lines[i].x[-1] for i in at) - first)
    seen = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= start]
    jump = max(*seen, *plain.values())
    margin = 0.08 * (jump - min(seen))
    before = [f"{labels[i]} at {loss(of[0].source_in_groups)} before" for i, of in switches.items()]
    return panel(
        lines,
        label=f"Evaluation loss around the switch: {enumerated(before)}.",
        x_label="steps",
        y_label="loss, nats a token",
        x_range=(max(0, start), None),
        y_range=(min(seen) - margin, jump + margin),
        points=[(i, at[i].step, plain[i]) for i in at],
        switches=[(i, point.step) for i, point in at.items()],
    )


def _mean_curve(series: int, curves: Sequence[Sequence[Point]], key: str) -> Line:
    """Over the seeds, evaluation by evaluation, against a field of `Point`."""
    points = list(zip(*curves, strict=True))
    losses = [Summary.over(point.loss for point in each) for each in points]
    x = [sum(getattr(point, key) for point in each) / len(each) for each in points]
    mean, least, greatest = ([getattr(found, of) for found in losses] for of in ("mean", "least", "greatest"))
    return Line(series, x, mean, least, greatest)


def _ends(models: list[ComparedModel], key: str, lines: list[Line]) -> str:
    ends = []
    for model, line in zip(models, lines, strict=True):
        at = {"step": f"step {line.x[-1]:,.0f}", "seconds": duration(line.x[-1]), "flops": f"{short(line.x[-1])}FLOPs"}
        ends.append(f"{model.label} ends at {loss(line.y[-1])}, at {at[key]}")
    return f"{enumerated(ends)}."


def _shares(comparison: Comparison, whole: str) -> list[str]:
    """The finding of one panel, by a key of `RATIOS`, model by model."""
    baseline, *others = comparison.models
    shares = []
    for model in (each for each in others if each.continues != baseline.label):
        found = getattr(model.reached[baseline.label], f"of_{whole}")
        if found is None:
            shares.append(f"{model.label} never reaches it")
        else:
            few = f" on {found.seeds} of {findings.seeds_of(comparison)}" * (found.seeds < len(comparison.seeds))
            shares.append(f"{model.label} {ratio(found.mean)}{few}")
    return shares


Measured = tuple[str, str, list[str], list[tuple[int, str, str]]]


def _measures(models: dict[str, list[Run]], switched: dict[int, float]) -> list[Measured]:
    """Of each measure its title and meaning, what does not change, and the figures of the others with their series."""
    measured, found = {label: _telemetry(model) for label, model in models.items()}, []
    for measure, (title, meaning) in findings.MEASURES.items():
        of = {label: found[measure] for label, found in measured.items() if measure in found}
        if of:
            found.append((title, meaning, *_measure(title, of, list(models), switched)))
    return found


def _telemetry(model: list[Run]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values, means over the seeds that have them, by measure and layer. Empty where nothing was measured."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in model:
        for row in run.rows:
            for layer, measured in (row.layers or {}).items():
                for measure, value in measured.items():
                    at = values.setdefault(measure, {}).setdefault(layer, {})
                    at.setdefault(row.step, []).append(value)
    return {
        measure: {
            layer: (sorted(at), [sum(at[step]) / len(at[step]) for step in sorted(at)])
            for layer, at in sorted(layers.items(), key=lambda item: int(item[0]))
        }
        for measure, layers in values.items()
    }


def _measure(
    title: str, of: dict[str, dict], labels: list[str], switched: dict[int, float]
) -> tuple[list[str], list[tuple[int, str, str]]]:
    values = [value for layers in of.values() for _, line in layers.values() for value in line]
    top = max(1.0, 1.06 * max(values)) if max(values) > 0.5 else 1.15 * max(values)
    figures, constant = [], []
    for label, layers in of.items():
        own = [value for _, line in layers.values() for value in line]
        if len({f"{value:.3g}" for value in own}) == 1:
            constant.append(f"{label}: {own[0]:.3g} in every layer, throughout.")
            continue
        series, several = labels.index(label), len(labels) > 1
        alphas = [0.45 + 0.55 * (i + 1) / len(layers) for i in range(len(layers))] if several else [1.0] * len(layers)
        lines = [  # several models are told by their colours, the layers of one by the colours that are then free
            Line(series if several else i, _thinned(steps), _thinned(line), label=layer, alpha=alphas[i])
            for i, (layer, (steps, line)) in enumerate(layers.items())
        ]
        ends = [f"layer {layer} from {line[0]:.3g} to {line[-1]:.3g}" for layer, (_, line) in layers.items()]
        figure = panel(
            lines,
            label=f"{title} of {label} over training: {enumerated(ends)}.",
            x_label="steps",
            y_label=title.lower(),
            y_range=(0, top),
            switches=[(series, switched[series])] if series in switched else (),
        )
        figures.append((series, label, figure))
    return constant, figures


def _thinned(values: Sequence) -> Sequence:
    """Every n-th, the last one included, and POINTS at most: of a long run all would be megabytes."""
    return values[:: -max(1, -(-len(values) // POINTS))][::-1]


def _settings(models: dict[str, list[Run]]) -> tuple[str, dict[str, str]]:
    """What the models have in common, and what is each one's own."""
    of = {label: model[0].settings for label, model in models.items()}
    first = next(iter(of.values()))
    common = {k for k in first if all(k in settings and settings[k] == first[k] for settings in of.values())}

    def shown(settings: dict[str, Any], keys: set[str]) -> str:
        return "\n".join(f"{key}: {json.dumps(settings[key])}" for key in settings if key in keys)

    own = {label: shown(settings, set(settings) - common) for label, settings in of.items()}
    return shown(first, common), own if len(models) > 1 else {}
