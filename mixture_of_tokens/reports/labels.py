"""What the models of a comparison are called: by name and settings of their routing, and by what else differs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mixture_of_tokens.models.names import as_named, other_sizes
from mixture_of_tokens.runs.records import OF_TRAINING
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import MIXTURE, SETTINGS

OF_A_START = ("model.norm_topk_prob", "model.capacity_factor")  # of an upcycled run, from how it is made
FOLLOWS = ("model.mlp_layer_types", "first_step")  # of a switched run, from its name and from its source


def labels(runs: Sequence[Run]) -> list[str]:
    """Of models, each given by one run; no two are alike."""
    brief = [_label(run, runs, brief=True) for run in runs]
    return brief if len(set(brief)) == len(brief) else [_label(run, runs, brief=False) for run in runs]


def _label(run: Run, others: Sequence[Run], *, brief: bool) -> str:
    namesakes = [other for other in others if _title(other) == _title(run)]

    def tells(key: str) -> bool:
        if brief and key in OF_A_START and run.config.start is not None:
            return any(other.settings.get(key) != run.settings.get(key) for other in namesakes)
        if brief and run.switch is not None:
            lacks = key.startswith("transition.") and run.settings.get(key) is None
            if lacks or key in FOLLOWS:
                return False
        return key in own or any(other.settings.get(key) != run.settings.get(key) for other in namesakes)

    in_place_of_the_name = {f"model.{field}" for field in other_sizes(run.name, run.model_config)}
    own = in_place_of_the_name | (set() if run.switch else _of_the_routing(run))
    keys = {key: None for other in namesakes for key in other.settings}
    values = [f"{key.rpartition('.')[2]} {_setting(run, key)}" for key in keys if tells(key)]
    return f"{_title(run)} ({', '.join(values)})" if values else _title(run)


def _of_the_routing(run: Run) -> set[str]:
    """Settings of the routing that are not the name's."""
    named = as_named(run.name, run.model_config)
    keys = {f"model.{field}": field for field in SETTINGS}
    return {key for key, field in keys.items() if key in run.settings and run.settings[key] != getattr(named, field)}


def _title(run: Run) -> str:
    """A switched run is titled after its source; the name in its configuration is Token Choice's."""
    if run.config.start is not None:
        return f"{run.name}, {'continued' if run.config.start.kind == 'continued' else 'upcycled'}"
    if run.switch is None:
        return run.name
    return f"{dataclasses.replace(parse_name(run.name), system=MIXTURE.prefix)}, switched"


def _setting(run: Run, key: str) -> Any:
    """A model's setting is read from its configuration, as `settings` omits defaults; upstream keeps not all there."""
    kind, _, field = key.rpartition(".")
    default = getattr(run.model_config, field, None) if kind == "model" else OF_TRAINING.get(key)
    value = run.settings.get(key, default)
    return "null" if value is None else value
