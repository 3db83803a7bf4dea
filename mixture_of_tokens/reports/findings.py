"""Sentences computed from a comparison, with rounded numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixture_of_tokens.reports.comparison import ComparedModel, Comparison
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import MIXTURE
from mixture_of_tokens.utils.formatting import (
    Summary,
    difference,
    duration,
    enumerated,
    loss,
    ratio,
    short,
    span,
    with_span,
)

# Of telemetry.py, in the order of the page: title and meaning.
MEASURES = {
    "mixture_entropy": (
        "Mixture entropy",
        "How evenly an expert weights the tokens of a group. 1: it averages them all; 0: it reads a single one. It "
        "falls where the router learns to tell tokens apart.",
    ),
    "effective_tokens": ("Tokens per mixture", "The effective number of tokens in an expert's mixture."),
    "effective_experts": ("Experts per token", "The effective number of experts in a token's output."),
    "experts_per_token": ("Experts chosen", "The experts that have any weight for a token, on average."),
    "largest_load": (
        "Largest load",
        "The load of the busiest expert over the mean expert's; 1 is balance. In Mixture of Tokens the weights of each "
        "expert sum to one in each full group, so it is 1 there by construction.",
    ),
    "dead_experts": ("Dead experts", "The share of experts that get under 1 % of the mean expert's weight."),
    "dropped": (
        "Dropped tokens",
        "The share of tokens that get under 1 % of the mean token's weight: dropped by an expert or chosen by none; "
        "in Mixture of Tokens hardly read by any.",
    ),
    "branch_to_residual": (
        "Branch to residual",
        "The size of the feed-forward's output over the size of the residual stream that it is added to.",
    ),
}


# The columns of `comparison.WAYS`, and what they say.
OF_WAYS = {"in_groups": "in groups", "alone_by_few": "alone, few experts", "alone": "alone"}
SERVED = (
    "In groups rows of a batch influence each other; alone each text is served by itself, as mot generate --alone "
    "does: by few experts, those of the largest weights, or by all. All are losses of the same part of the text."
)
SHORT = 10**8  # tokens: about those of the longest training that was measured


def way_of(model: ComparedModel, way: str, digits: str = ".3f") -> str | None:
    """The mean loss in a way that texts are served; None where it was not measured, or the model has no such way."""
    if way not in model.served:
        return None
    few = " ({} of {})".format(*model.few_of_experts) if way == "alone_by_few" else ""
    return f"{model.served[way].mean:{digits}}{few}"


def why_no_time(comparison: Comparison) -> list[str]:
    """A sentence where a short training of a mixture takes as long to the dense model's loss as the dense model."""
    baseline, *others = comparison.models
    tokens = comparison.steps * comparison.batch_size * comparison.context
    if parse_name(baseline.name).routing.sparse or tokens >= SHORT:
        return []
    mixtures = [model for model in others if parse_name(model.name).routing == MIXTURE]
    slower = [model for model in mixtures if (time := model.reached[baseline.label].of_time) is None or time.mean >= 1]
    if not slower:
        return []
    steps = [f"{ratio(model.seconds_per_step.mean / baseline.seconds_per_step.mean)} times" for model in slower]
    what = f"{enumerated([model.label for model in slower])}: no time is gained in so short a training"
    why = f"a step takes {enumerated(steps)} {baseline.label}'s time, and {short(tokens).strip()} tokens are few"
    return [f"{what}: {why}. A Micro's shares of steps and time fell with length: docs/results/README.md"]


def differing(environments: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence on what the runs were not made alike in, if there is such."""
    names = [name for name in environments[0] if any(each[name] != environments[0][name] for each in environments)]
    return f"The runs differ in {enumerated(names)}: times may not be comparable." if names else None


def of_what_text(comparison: Comparison) -> str:
    """A sentence on how much of the text final losses are of."""
    split, scored = comparison.evaluated_on, comparison.scored_tokens
    return f"Final losses are of {'all' if scored is None else f'{scored:,} tokens'} of the {split} text."


def seeds_of(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return "one seed" if count == 1 else f"{count} seeds"


def steps_of(comparison: Comparison) -> str:
    """The steps of all models, or of each where they are not equal."""
    if comparison.at_equal_steps:
        return f"{comparison.steps:,} steps"
    return enumerated([f"{model.steps:,} steps of {model.label}" for model in comparison.models])


def findings(comparison: Comparison) -> dict[str, list[str]]:
    """Sentences on each model by its label, the baseline last."""
    baseline, *others = comparison.models
    sentences: dict[str, list[str]] = {}
    for model in others:
        found = None if model.continues == baseline.label else model.reached[baseline.label].of_flops
        sentences[model.label] = [
            f"{model.label} {reaching(model, baseline.label, comparison)}.",
            *([] if found is None else [f"That is {_share(found, 'FLOPs')}."]),
            *(["Time and FLOPs are without the fit at its switch."] if found and model.switched else []),
            f"{_when(model, baseline)} {_beside(model.final_loss_difference)}.",
        ]
        apart, when = model.equal_time_loss_difference, duration(comparison.equal_time_seconds.mean)
        if apart is not None:
            some = f" of {apart.seeds} of {seeds_of(comparison)}" if apart.seeds < len(comparison.seeds) else ""
            at = f"At equal time{some}, when the fastest run ended ({when})"
            sentences[model.label].append(f"{at}, {_beside(apart)}.")
        if (regrouped := model.regrouping_spread) is not None:
            sentences[model.label].append(f"Three ways to group the text differ by {regrouped.greatest:.4f} at most.")
    end = with_span(baseline.final_loss, loss)
    what = f"{baseline.label}{', the baseline,' if others else ''} ends at {end} nats a token"
    sentences[baseline.label] = [f"{what} after {comparison.steps:,} steps ({seeds_of(comparison)})."]
    for model in comparison.models:
        if model.properties["causal"] == "no":
            sees = "it sees the tokens that it is to predict, so its loss says nothing beside others"
            sentences[model.label].insert(0, f"{model.label} is not causal: {sees}.")
    return sentences


def _when(model: ComparedModel, baseline: ComparedModel) -> str:
    if model.steps == baseline.steps:
        return "At equal steps"
    apart = f"{abs(model.steps - baseline.steps):,} {'more' if model.steps > baseline.steps else 'fewer'}"
    return f"After {model.steps:,} steps, {apart} than {baseline.label},"


def reaching(model: ComparedModel, target: str, comparison: Comparison) -> str:
    """When a model reaches another's last loss: the rest of a sentence after the model's name."""
    found, seeds = model.reached[target], seeds_of(comparison)
    if model.continues == target:
        return _going_on(model, target, comparison)
    steps, time = found.of_steps, found.of_time
    if steps is None or time is None:
        return f"never reaches {target}'s last loss ({seeds})"
    joint = "but" if _is_less(steps) != _is_less(time) else "and"
    took = f"{_share(steps, 'steps', seeds)} {joint} {_share(time, 'time')}"
    if steps.seeds < len(comparison.seeds):
        took = f"{_share(steps, 'steps')} {joint} {_share(time, 'time')}"
        return f"reaches {target}'s last loss on only {steps.seeds} of {seeds}, in {took}"
    return f"reaches {target}'s last loss in {took}"


def _going_on(model: ComparedModel, target: str, comparison: Comparison) -> str:
    """As `reaching`, of a model that continues the other: shares of its steps would count those twice."""
    back, source = model.reached[target].step, next(each for each in comparison.models if each.label == target)
    if back is None:
        return f"goes on from {target}, and does not come back to its last loss ({seeds_of(comparison)})"
    some = f" on {back.seeds} of {seeds_of(comparison)}" if back.seeds < len(comparison.seeds) else ""
    after = round(back.mean - source.steps)
    more = "one more step" if after == 1 else f"{after:,} more steps"
    when = f"is back at its last loss after {more}" if after else "has its last loss from the switch on"
    return f"goes on from {target}, and {when}{some}"


def _share(share: Summary, of: str, seeds: str = "") -> str:
    known = ", ".join(filter(None, (span(share), seeds)))
    return f"{ratio(share.mean)} {'of' if _is_less(share) else 'times'} the {of}" + f" ({known})" * bool(known)


def _is_less(share: Summary) -> bool:
    """Than one, or equal, in the digits that are shown."""
    return float(ratio(share.mean)) <= 1


def _beside(apart: Summary) -> str:
    """A difference of losses from the baseline's in words."""
    if apart.least < 0 < apart.greatest:
        low, high = difference(apart.least), difference(apart.greatest)
        return f"neither is ahead on every seed: {difference(apart.mean)} nats on average ({low} to {high})"
    side = "lower" if apart.mean < 0 else "higher"
    near, far = sorted((abs(apart.least), abs(apart.greatest)))
    between = f" ({loss(near)} to {loss(far)})" if apart.seeds > 1 else ""
    return f"its loss is {loss(abs(apart.mean))} nats {side}{between}"
