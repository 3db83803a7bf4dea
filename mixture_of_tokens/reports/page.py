"""A comparison as one HTML page that needs nothing else: no network, no script."""

import json
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from mixture_of_tokens.data.report import title_of
from mixture_of_tokens.formatting import Summary, duration, enumerated, loss, ratio, short
from mixture_of_tokens.reports.comparison import RATIOS, ComparedModel, Comparison, Origin
from mixture_of_tokens.reports.figures import SERIES, Line, panel
from mixture_of_tokens.reports.markup import Child, document, html, table, with_swatch
from mixture_of_tokens.reports.prose import MEASURES, differing, findings, glossary, method, seeds_of, why_no_time
from mixture_of_tokens.reports.samples import PROMPTS, TEMPERATURE
from mixture_of_tokens.reports.tables import switch_table, tables
from mixture_of_tokens.runs.run import Point, Run

PAPER = "https://arxiv.org/abs/2310.15961"
POINTS = 400  # of a line of measurements, which is about as many pixels wide
SKIPPED = 0.15  # of the steps, whose steep losses would flatten the rest of the picture
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
    labels, found = list(models), findings(comparison)
    title = f"{enumerated(labels)} compared" if len(labels) > 1 else labels[0]
    sections = {
        "curves": ("Loss while training", _curves(comparison, _switches(models))),
        **({"switch": ("The switch to Token Choice", _through_the_switch(models))} if _switches(models) else {}),
        "tables": ("In numbers", tables(comparison)),
        "layers": ("Inside the layers", _layers(comparison, models)),
        "samples": ("What they write", _samples(comparison, samples)),
        "words": ("What the words mean", _words(comparison)),
        "made": ("How this was made", _made(comparison, models, commands)),
    }
    body = html(
        "body",
        html(
            "header",
            html("p", "Mixture of Tokens: a comparison of language models", class_="kicker"),
            html("h1", title),
            html("ul", [_finding(labels.index(label), sentences) for label, sentences in found.items()], class_="lead"),
            html("p", " ".join([_reservation(comparison), *why_no_time(comparison)]), class_="quiet"),
            html(
                "nav",
                html("ul", [html("li", html("a", head, href=f"#{id}")) for id, (head, _) in sections.items()]),
                aria_label="Sections",
            ),
        ),
        html(
            "main",
            [
                html("section", html("h2", head, id=id), content, aria_labelledby=id)
                for id, (head, content) in sections.items()
            ],
        ),
        html("footer", html("p", "Written by mot report, of the library mixture-of-tokens.", class_="quiet")),
    )
    return document(title, body)


def _finding(series: int, sentences: list[str]) -> Element:
    first, *others = sentences
    return html("li", html("strong", first), " ".join(others), style=f"border-color: var(--series-{series % SERIES})")


def _reservation(comparison: Comparison) -> str:
    what = f"Losses are on {comparison.evaluated_on} text, which no model was trained on."
    if len(comparison.seeds) == 1:
        return f"{what} There is one seed: how far another would move each loss is not known."
    return f"{what} In brackets are the least and the greatest of {seeds_of(comparison)}."


def _switches(models: dict[str, list[Run]]) -> dict[int, Point]:
    """Where models became Token Choice, by their number: means over the seeds."""
    found = {}
    for i, model in enumerate(models.values()):
        at = [run.switch for run in model if run.switch is not None]
        if at:
            spent = ((s.step, s.tokens, s.seconds, s.tokens * s.flops_per_token, s.at_the_switch) for s in at)
            found[i] = Point(*(sum(values) / len(at) for values in zip(*spent, strict=True)))
    return found


def _curves(comparison: Comparison, switches: dict[int, Point]) -> Child:
    models, baseline, origin = comparison.models, comparison.models[0], comparison.origin
    level = Summary.of(run.curve[-1].loss for run in baseline.runs)
    assert level is not None
    curves = [[run.curve for run in model.runs] for model in models]
    lines = {key: [_mean_curve(i, runs, key) for i, runs in enumerate(curves)] for key in RATIOS.values()}
    after_start = (
        y for line in lines["step"] for x, y in zip(line.x, line.y, strict=True) if x >= SKIPPED * comparison.steps
    )
    start = max(after_start, default=level.mean)
    if began := all(line.x[0] == 0 for line in lines["step"]):  # with trained models: there is no steep start
        start = max(max(line.high or line.y) for line in lines["step"])
    least = min(min(line.low or line.y) for line in lines["step"])
    top = start + 0.05 * (start - least) + 0.01
    bottom = least - 0.06 * (top - least)
    seconds = max(line.x[-1] for line in lines["seconds"])
    unit, each = ("s", 1) if seconds < 180 else ("min", 60) if seconds < 10800 else ("h", 3600)
    power = len(f"{max(line.x[-1] for line in lines['flops']):.0f}") - 1
    axes = {
        "step": ("steps", 1.0, "Steps"),
        "seconds": (f"training time, {unit}", each, "Time"),
        "flops": (f"training FLOPs, 10{str(power).translate(SUPERSCRIPTS)}", 10.0**power, "FLOPs"),
    }
    figures = []
    for key, (x_label, scale, head) in axes.items():
        points = []
        for i, model in enumerate(models):
            found = model.reached[baseline.label].at(key)
            if i and found is not None and found.seeds == len(comparison.seeds):
                points.append((i, found.mean / scale, level.mean))
        drawn = lines[key] if origin is None else [*lines[key], _before(origin, key, lines[key], len(models))]
        scaled = [Line(line.series, [x / scale for x in line.x], line.y, line.low, line.high) for line in drawn]
        label = f"Evaluation loss against {x_label.split(',')[0]}. " + _ends(models, key)
        figure = panel(
            scaled,
            label=label,
            x_label=x_label,
            y_label="loss, nats a token",
            x_range=(min(line.x[0] for line in scaled) if origin else 0, None),
            y_range=(bottom, top),
            level=level.mean,
            points=points,
            switches=[(i, getattr(at, key) / scale) for i, at in switches.items()],
        )
        figures.append(html("figure", figure, html("figcaption", _caption(comparison, key, head))))
    shown = [model.label for model in models] + ([] if origin is None else [f"{origin.label}, before"])
    note = "Means over the seeds, in a band from the least to the greatest. " if len(comparison.seeds) > 1 else ""
    return [
        html("ul", [html("li", with_swatch(i, label)) for i, label in enumerate(shown)], class_="legend"),
        html("div", figures, class_="panels"),
        html(
            "p",
            f"{note}The dotted line is {baseline.label}'s last evaluation loss, {loss(level.mean)}; a ring marks "
            "where another model reaches it."
            + " The steep start, above the frame, is left out." * (not began)
            + " A vertical line is where a Mixture of Tokens became Token Choice." * bool(switches),
            class_="quiet",
        ),
    ]


def _before(origin: Origin, key: str, lines: Sequence[Line], series: int) -> Line:
    """The end of the curve of the model that all began with, as long as the longest of theirs."""
    longest = max(line.x[-1] for line in lines)
    curves = [[point for point in curve if getattr(point, key) >= -longest] for curve in origin.curves]
    fewest = min(map(len, curves))
    return _mean_curve(series, [curve[-fewest:] for curve in curves], key)


def _through_the_switch(models: dict[str, list[Run]]) -> Child:
    """The curve from shortly before the switch to the end, the jump with it, and the stages in numbers."""
    labels, at = list(models), _switches(models)
    switches = {i: [run.switch for run in models[labels[i]] if run.switch is not None] for i in at}
    plain = {i: sum(switch.plain_switch for switch in of) / len(of) for i, of in switches.items()}
    lines = [_mean_curve(i, [run.curve for run in model], "step") for i, model in enumerate(models.values())]
    first = min(point.step for point in at.values())
    start = first - (max(lines[i].x[-1] for i in at) - first)
    seen = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= start]
    jump = max(*seen, *plain.values())
    margin = 0.08 * (jump - min(seen))
    before = [f"{labels[i]} at {loss(of[0].source_in_groups)} before" for i, of in switches.items()]
    figure = panel(
        lines,
        label=f"Evaluation loss around the switch: {enumerated(before)}.",
        x_label="steps",
        y_label="loss, nats a token",
        x_range=(max(0, start), None),
        y_range=(min(seen) - margin, jump + margin),
        points=[(i, at[i].step, plain[i]) for i in at],
        switches=[(i, point.step) for i, point in at.items()],
    )
    caption = "The steps before and after the switch. A ring marks the loss with unchanged weights."
    rows = [(with_swatch(i, labels[i]), models[labels[i]]) for i in at]
    return [html("div", html("figure", figure, html("figcaption", caption)), class_="panels"), switch_table(rows)]


def _mean_curve(series: int, curves: Sequence[Sequence[Point]], key: str) -> Line:
    """Over the seeds, evaluation by evaluation, against a field of `Point`."""
    points = list(zip(*curves, strict=True))
    losses = [found for each in points if (found := Summary.of(point.loss for point in each)) is not None]
    x = [sum(getattr(point, key) for point in each) / len(each) for each in points]
    mean, least, greatest = ([getattr(found, of) for found in losses] for of in ("mean", "least", "greatest"))
    return Line(series, x, mean, least, greatest)


def _ends(models: list[ComparedModel], key: str) -> str:
    ends = []
    for model in models:
        line = _mean_curve(0, [run.curve for run in model.runs], key)
        at = {"step": f"step {line.x[-1]:,.0f}", "seconds": duration(line.x[-1]), "flops": f"{short(line.x[-1])}FLOPs"}
        ends.append(f"{model.label} ends at {loss(line.y[-1])}, at {at[key]}")
    return f"{enumerated(ends)}."


def _caption(comparison: Comparison, key: str, head: str) -> Child:
    """The finding of one panel."""
    baseline, *others = comparison.models
    kind = next(kind for kind, of in RATIOS.items() if of == key)
    shares = []
    for model in (each for each in others if each.continues != baseline.label):
        found = model.reached[baseline.label].share(kind)
        if found is None:
            shares.append(f"{model.label} never reaches it")
        else:
            few = f" on {found.seeds} of {seeds_of(comparison)}" * (found.seeds < len(comparison.seeds))
            shares.append(f"{model.label} {ratio(found.mean)}{few}")
    if not shares:
        return [html("b", f"{head}.")]
    return [
        html("b", f"{head}."),
        f" To reach {baseline.label}'s last loss, as a share of its own: {enumerated(shares)}.",
    ]


def _layers(comparison: Comparison, models: dict[str, list[Run]]) -> Child:
    measured = {label: _telemetry(model) for label, model in models.items()}
    switched = {i: at.step for i, at in _switches(models).items()}
    content: list[Child] = []
    for measure, (title, meaning) in MEASURES.items():
        of = {label: found[measure] for label, found in measured.items() if measure in found}
        if of:
            content.append(html("div", _measure(title, meaning, of, list(models), switched), class_="measure"))
    if not content:
        return [html("p", "These runs have no measurements of their layers.")]
    seeds = sorted({run.seed for model in models.values() for run in model if any(row.layers for row in run.rows)})
    intro = (
        "Measured during training on one group of evaluation text"
        f"{', after the same steps in all models' * comparison.at_equal_steps}; "
        f"{'means over the seeds' if len(seeds) > 1 else 'seed'} {enumerated(list(map(str, seeds)))}. "
        "The number at the end of a line is the layer, counted from 0. Dense layers have no routing to measure."
    )
    return [html("p", intro), content]


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


def _measure(title: str, meaning: str, of: dict[str, dict], labels: list[str], switched: dict[int, float]) -> Child:
    values = [value for layers in of.values() for _, line in layers.values() for value in line]
    top = max(1.0, 1.06 * max(values)) if max(values) > 0.5 else 1.15 * max(values)
    figures, constant = [], []
    for label, layers in of.items():
        own = [value for _, line in layers.values() for value in line]
        if len({f"{value:.3g}" for value in own}) == 1:
            constant.append(f"{label}: {own[0]:.3g} in every layer, throughout.")
            continue
        series = labels.index(label)
        alphas = [0.45 + 0.55 * (i + 1) / len(layers) for i in range(len(layers))]
        lines = [
            Line(series, _thinned(steps), _thinned(line), label=layer, alpha=alpha)
            for (layer, (steps, line)), alpha in zip(layers.items(), alphas, strict=True)
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
        figures.append(html("figure", html("figcaption", with_swatch(series, label)), figure))
    unchanging = html("p", " ".join(constant), class_="quiet") if constant else None
    beside = {} if len(figures) < 3 else {"class_": "above"}
    return [html("div", html("h3", title), html("p", meaning), unchanging, **beside), figures]


def _thinned(values: Sequence) -> Sequence:
    """Every n-th, the last one included, and POINTS at most: of a long run all would be megabytes."""
    return values[:: -max(1, -(-len(values) // POINTS))][::-1]


def _samples(comparison: Comparison, samples: dict[str, dict[str, str]]) -> Child:
    if not samples:
        return [html("p", "There are no samples: a run's model/ is gone or damaged, or its model writes no text.")]
    count, seed = len(PROMPTS), comparison.seeds[0]
    intro = (
        f"Each model, trained with seed {seed}, continued the same {count} prompts as one batch. These are the first "
        f"{len(samples)} continuations, sampled once at temperature {TEMPERATURE:g} and not selected. They are so many "
        "because a Mixture of Tokens mixes the texts of a group and was trained in full groups. They differ in length, "
        "which the texts of a group in training did not."
    )
    content: list[Child] = [html("p", intro)]
    labels = [model.label for model in comparison.models]
    for prompt, written in samples.items():
        content.append(html("h3", html("code", prompt.rstrip()), " …"))
        figures = [
            html(
                "figure",
                html("figcaption", with_swatch(labels.index(label), label)),
                html("pre", html("b", prompt), text),
            )
            for label, text in written.items()
        ]
        content.append(html("div", figures, class_="samples"))
    return content


def _words(comparison: Comparison) -> Child:
    title = "Mixture of Tokens: Continuous MoE through Cross-Example Aggregation"
    return [
        html("dl", [_entry(term, meaning) for term, meaning in glossary(comparison)], class_="entries"),
        html("p", "The paper: Antoniak et al., ", html("a", title, href=PAPER), ", 2024."),
    ]


def _entry(term: str, meaning: str) -> Element:
    return html("div", html("dt", term), html("dd", meaning))


def _made(comparison: Comparison, models: dict[str, list[Run]], commands: list[str]) -> Child:
    entries = []
    for environment in comparison.environments:
        hardware, cores, threads = (environment[key] for key in ("hardware", "cores", "threads"))
        entries += [
            _entry("Hardware", f"{hardware}, cores: {cores}, threads: {threads}"),
            _entry("Versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
            _entry("Commit", environment["commit"] or "not from a git checkout"),
        ]
    corpus = comparison.corpus
    splits = [([name], each) for name, each in corpus.items() if isinstance(each, dict)]
    rest = {title_of(name): each for name, each in corpus.items() if not isinstance(each, dict)}
    about = "; ".join(f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in rest.items())
    columns = [(key.capitalize(), lambda each, key=key: f"{each[key]:,}") for key in ("documents", "tokens", "bytes")]
    apart = differing(comparison.environments)
    return [
        html("pre", "\n".join(commands)),
        html("p", method(comparison)),
        html("dl", entries, class_="entries"),
        None if apart is None else html("p", apart),
        table("Text", f"{about}.", (("", columns),), splits, corner="Split"),
        _settings(models),
    ]


def _settings(models: dict[str, list[Run]]) -> Child:
    """What the models have in common, and what is each one's own."""
    of = {label: model[0].settings for label, model in models.items()}
    first = next(iter(of.values()))
    common = {k for k in first if all(k in settings and settings[k] == first[k] for settings in of.values())}

    def shown(settings: dict[str, Any], keys: set[str]) -> Element:
        return html("pre", "\n".join(f"{key}: {json.dumps(settings[key])}" for key in settings if key in keys))

    own = [[html("h3", f"Of {label}"), shown(settings, set(settings) - common)] for label, settings in of.items()]
    rest = own if len(models) > 1 else None
    return html("details", html("summary", "All settings"), shown(first, common), rest)
