"""The switch to Token Choice without any step of training: how much of the loss it costs (docs/results/conversion.md).

    python experiments/switch/run.py            # 3 minutes of one core a MoT-Nano/32E, 15 a /32E/8, beside other work
    python experiments/switch/run.py --table    # Markdown

The sources are the Mixtures of Tokens of `nano`, trained first where they are not in runs/ (15 minutes more), and the
same of LONG steps on the source text of the installed packages (an hour of one core each). Each is switched in the
`WAYS` below and scored over the validation text, after the switch each row alone; of the packages' text over some
groups of it. losses.csv has a row each; what is in it is not measured again. Scales were fitted up to commit 8112891,
which can measure them anew.

    loss       of the source in full groups and alone, and of the switched models
    seconds    of all that is fitted, by one thread beside other work, with the source's forward passes
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens import MixtureOfTokensForCausalLM, calibrate_companions
from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import to_token_choice, token_choice_config
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.forward_hooks import serving_alone
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, add_rows, read_csv, script, signed, spread, trained

LONG = 13_700
ON_PACKAGES = Options(steps=LONG, device="cpu", data=["packages"], training={"eval_steps": "1370"})
STEPS, FEW = 2000, 500  # of distillation: the default when these were measured, and less
SCALES = "scales"


class Source(NamedTuple):
    name: str
    options: Options
    seeds: tuple[int, ...]
    experiment: str  # whose run it is
    groups: int | None = None  # of validation text that are scored, where not all


SOURCES = (
    Source("MoT-Nano/32E", NANO, (1, 2, 3), "nano"),
    Source("MoT-Nano/32E/8", NANO, (1, 2, 3), "nano"),
    Source("MoT-Nano/32E", ON_PACKAGES, (1, 2, 3), "switch", groups=512),
    Source("MoT-Nano/32E/8", ON_PACKAGES, (1, 2, 3), "switch", groups=512),
)


class Way(NamedTuple):
    label: str
    fit: str  # what is fitted, as --calibrate has it; SCALES is only shown
    scores: Any = "softmax"
    of_top_k: int = 1  # the granularity is divided by this
    steps: int = STEPS
    after: str | None = None  # the way whose model is distilled on


WAYS = {
    "plain": Way("plain switch", "none"),
    SCALES: Way("scales", SCALES),
    "shorter": Way(f"distilled, {FEW} steps", "distil", steps=FEW),
    "default": Way(f"distilled, {STEPS:,} steps", "distil"),
    # As `mot export` goes on.
    "then_half": Way(
        f"{STEPS:,} steps, then {STEPS // 4} with half of the experts",
        "distil",
        of_top_k=2,
        steps=STEPS // 4,
        after="default",
    ),
    "then_quarter": Way(
        f"{STEPS:,} steps, then twice {STEPS // 4} with ever fewer experts",
        "distil",
        of_top_k=4,
        steps=STEPS // 4,
        after="then_half",
    ),
    "sigmoid": Way(f"sigmoid gates, distilled, {STEPS:,} steps", "distil", scores="sigmoid"),
}
OF_SOURCE = {"groups": "source, in full groups", "alone": "source, alone"}


def missing(granularity: int, known: set[str]) -> list[str]:
    """The ways of a source that are not known; those of a fraction of its granularity, where there is one."""
    legal = [name for name, way in WAYS.items() if granularity % way.of_top_k == 0 and way.fit != SCALES]
    return [way for way in (*OF_SOURCE, *legal) if way not in known]


def measured(source: Source, directory: Path, wanted: list[str]) -> list[dict[str, object]]:
    """A row for each of these ways."""
    model, text = load_model(str(directory)), text_of(str(directory))
    calibrate_companions(model, training_groups(text.train, model.config.group_size))
    granularity, rows = model.config.num_experts_per_tok, []

    def scored(way: str, top_k: int | str, scoring: Any, seconds: float | str) -> None:
        if way not in wanted:
            return
        size = model.config.group_size
        found = evaluate_blocks(scoring, text.validation, group_size=size, batch_size=4 * size, groups=source.groups)[
            "loss"
        ]
        rows.append({"way": way, "top_k": top_k, "loss": found, "seconds": seconds})
        print(f"{directory.name}: {way} {found:.4f}", file=sys.stderr)

    scored("groups", "", model, "")
    with serving_alone(model):
        scored("alone", "", model, "")
    needed = set(wanted)
    for name, way in reversed(WAYS.items()):
        needed |= {way.after} if name in needed and way.after else set()
    made: dict[str, MixtureOfTokensForCausalLM] = {}
    took: dict[str, float] = {}
    for name, way in WAYS.items():
        if name not in needed:
            continue
        top_k = granularity // way.of_top_k
        target = MixtureOfTokensForCausalLM(token_choice_config(model.config, top_k=top_k, scores=way.scores)).eval()
        if way.after:
            target.load_state_dict(made[way.after].state_dict())
        else:
            to_token_choice(model, target)
        made[name] = target
        begun = time.perf_counter()
        if way.fit == "distil":
            distil(model, target, text.train, steps=way.steps, again=way.after is not None)
        took[name] = time.perf_counter() - begun + (took[way.after] if way.after else 0)
        scored(name, top_k, target, round(took[name], 1))
    return rows


def make(kept: Path) -> None:
    file = kept / "losses.csv"
    for source in SOURCES:
        for seed in source.seeds:
            this = {"source": source.name, "steps": str(source.options.steps), "seed": str(seed)}
            known = {row["way"] for row in read_csv(file) if this.items() <= row.items()}
            if not (wanted := missing(parse_name(source.name).granularity, known)):
                continue
            directory = trained(Experiment.named(source.experiment), source.name, seed, source.options)
            add_rows(file, [this | row for row in measured(source, directory, wanted)], (*this, "way"))


def table(kept: Path) -> str:
    found = read_csv(kept / "losses.csv")
    shown = [["source", "switch", "top k", "seeds", "loss", "above the source in groups", "seconds"]]
    for source in SOURCES:
        own = [row for row in found if (row["source"], row["steps"]) == (source.name, str(source.options.steps))]
        in_groups = {row["seed"]: float(row["loss"]) for row in own if row["way"] == "groups"}
        for way, label in (OF_SOURCE | {name: way.label for name, way in WAYS.items()}).items():
            these = [row for row in own if row["way"] == way]
            if not these:
                continue
            losses = spread(row["loss"] for row in these)
            above = "" if way == "groups" else spread((float(r["loss"]) - in_groups[r["seed"]] for r in these), signed)
            seconds = "" if way in OF_SOURCE else spread((row["seconds"] for row in these), "{:.0f}".format)
            title = f"{source.name}, {source.options.steps:,} steps"
            shown.append([title, label, these[0]["top_k"], str(len(these)), losses, above, seconds])
    return markdown(shown, left=2)


if __name__ == "__main__":
    experiment = Experiment.named("switch")
    script(__doc__, lambda: make(experiment.kept), lambda: table(experiment.kept))
