"""The model cards of exports; their text is in templates/."""

from pathlib import Path
from typing import Any

from mixture_of_tokens.conversion.choice_of_top_k import Distilled
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs import provenance, records
from mixture_of_tokens.runs.loading import run_directory
from mixture_of_tokens.runs.records import RunFacts, Switch
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.rendering import card_of


def card(
    run: str,
    model: MixtureOfTokensForCausalLM,
    plain: Any,
    compared: str,
    difference: float,
    license: str | None,
    distilled: Distilled | None,
) -> str:
    """Of a model of transformers."""
    path, about = _about(run, license)
    switched = about["facts"] is not None and (path / records.SWITCH).is_file()
    return card_of(
        "export.md.j2",
        own_code=False,
        config=model.config,
        kind=type(plain).__name__,
        parameters=plain.num_parameters(),
        switch=Switch.read(path / records.SWITCH) if switched else None,
        end_loss=read_run(path).stages.end_loss if switched else None,
        distilled=distilled,
        compared=compared,
        difference=difference,
        **about,
    )


def hub_card(run: str, model: MixtureOfTokensForCausalLM, losses: dict[str, float], license: str | None) -> str:
    """Of a folder with its own code. losses: by what they are of, as `serve_as_written` gives them."""
    made = {"own_code": True, "config": model.config, "mixes": model.shares_batch, "losses": losses}
    return card_of("hub.md.j2", parameters=model.num_parameters(), **made, **_about(run, license)[1])


def _about(run: str, license: str | None) -> tuple[Path, dict[str, Any]]:
    """The run's directory, and what both cards say."""
    path, given = run_directory(run) or Path(run).absolute(), Path(run).absolute()
    # Of a finished run; of a checkpoint before the end they are another model's.
    of_the_end = (path / records.FACTS).is_file() and given in (path, path / "model")
    facts = RunFacts.read(path / records.FACTS) if of_the_end else None
    name = path.name if given == path or of_the_end else f"{path.name}, {given.name}"
    versions = ", ".join(f"{package} {version}" for package, version in provenance.versions().items())
    return path, {"name": name, "facts": facts, "license": license, "versions": versions}
