"""Served alone, how many experts does a token of a Mixture of Tokens need? (docs/results/alone.md)

    python experiments/switch/few.py            # an hour and a half of one core, most of it the training of sources
    python experiments/switch/few.py --table    # Markdown

The sources are the Mixtures of Tokens of `nano`, three seeds, and a MoT-Micro/32E/8 of 12 million tokens of the
installed packages' source, seed 2; those that are not in runs/ are trained first. Alone, a token goes to the experts of
its largest weights, and the others give it what they give their companion. Nothing is trained, fitted or distilled.
Losses are over the validation text, of the Micro over GROUPS groups of it. few.csv has a row each.

Expected: as many experts as the granularity, the FLOPs of a dense feed-forward, end at most 0.01 above all experts. So
it is at granularity 8; at 1 it is 0.013 to 0.014.
"""

import sys
from pathlib import Path

from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, once, read_csv, script, signed, spread, trained

MICRO = Options(steps=1500, device="cpu", data=["packages"], training={"bf16": "true", "torch_compile": "true"})
SOURCES = {  # the experiment whose runs they are, how they are trained, their seeds
    "MoT-Nano/32E": ("nano", NANO, (1, 2, 3)),
    "MoT-Nano/32E/8": ("nano", NANO, (1, 2, 3)),
    "MoT-Micro/32E/8": ("switch", MICRO, (2,)),
}
GROUPS = 64  # of a Micro's validation text
OF_GRANULARITY = (4, 2, 1, 0.5, 0.25)  # how many experts, beside all of them
IN_GROUPS, ALL = "in groups", "all"


def measured(experiment: str, name: str, seed: int, options: Options) -> list[dict[str, object]]:
    """A row for each number of experts of a token."""
    run = trained(Experiment.named(experiment), name, seed, options)
    model, text = load_model(str(run)), text_of(str(run)).validation
    size, granularity = model.config.group_size, model.config.num_experts_per_tok
    few = [int(granularity * share) for share in OF_GRANULARITY if granularity * share >= 1]
    rows = []
    for label in (IN_GROUPS, *map(str, few), ALL):
        if label != IN_GROUPS:
            model.serve_alone(num_experts_alone=None if label == ALL else int(label))
        part = None if name.startswith("MoT-Nano") else GROUPS
        title = f"{run.name}: {label}"
        found = evaluate_blocks(model, text, group_size=size, batch_size=size, groups=part, progress=title)["loss"]
        rows.append({"experts": label, "loss": found})
        print(f"{title} {found:.4f}", file=sys.stderr)
    return rows


def make(kept: Path) -> None:
    for name, (experiment, options, seeds) in SOURCES.items():
        for seed in seeds:
            key = {"source": name, "seed": seed}
            once(kept / "few.csv", key, measured, experiment, name, seed, options)


def table(kept: Path) -> str:
    found = read_csv(kept / "few.csv")
    shown = [["source", "experts of a token", "loss", "above all experts", "above the source in groups"]]
    for name in dict.fromkeys(row["source"] for row in found):
        of = {(row["experts"], row["seed"]): float(row["loss"]) for row in found if row["source"] == name}
        for few in dict.fromkeys(few for few, _ in of):
            own = {seed: value for (label, seed), value in of.items() if label == few}
            above = [
                "" if few == other else spread((own[seed] - of[other, seed] for seed in own), signed)
                for other in (ALL, IN_GROUPS)
            ]
            shown.append([name, few, spread(own.values()), *above])
    return markdown(shown, left=1)


if __name__ == "__main__":
    experiment = Experiment.named("switch")
    script(__doc__, lambda: make(experiment.kept), lambda: table(experiment.kept))
