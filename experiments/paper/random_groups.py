"""Groups of random sizes in training: they cost loss in full groups, and what they give to a text served alone.

    python experiments/paper/random_groups.py            # two Nanos; half an hour of one core
    python experiments/paper/random_groups.py --table    # the table of what is committed

MoT-Nano/32E/8, whose groups are of 8, 16 or 32 rows, drawn for each step; its 256 experts then have 8 to 2 times as
many mixtures. A smaller group's weights are larger, as an expert's sum to one over the group:

    scaled     the layer's output times n / 32, so that its size does not depend on n
    softmax    as it is

Beside it is the run of `../nano`, always of 32. Losses are over some 100,000 tokens of validation text, in groups of n
as in training, and alone with companions, which are measured in groups of 32 (`../partial_groups`). Expected: less is
lost in small groups, nothing is gained in full ones or alone. The paper has no table of it. One seed.
random_groups.csv has a row for each measurement; what is in it is not trained again.
"""

import random
import sys
from pathlib import Path
from unittest.mock import patch

from nano import BASE, SEED, STEPS, signed
from studies import EXPERIMENT

import mixture_of_tokens.training.train as training
from mixture_of_tokens import train
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, directory_of, once, read_csv, script, trained
from partial_groups.run import losses

SIZES, FULL = (8, 16, 32), 32
ALWAYS, SCALED, SOFTMAX = "32", "8, 16 or 32, scaled", "8, 16 or 32, softmax"
COLUMNS = ("seed", "treatment", "rows", "loss")


class Softmax(RunTrainer):
    """Each step's groups are of a size that is drawn for it."""

    scaled = False

    def training_step(self, *args, **kwargs):
        n = random.Random(f"{self.args.seed}, {self.state.global_step}").choice(SIZES)
        layers = [module for module in self.causal_lm.modules() if isinstance(module, MixtureOfTokens)]
        hooks = []
        for layer in layers:
            layer.group_size = n
            if self.scaled:
                hooks.append(layer.register_forward_hook(lambda layer, x, y: y * n / FULL))
        try:
            return super().training_step(*args, **kwargs)
        finally:
            for layer in layers:
                layer.group_size = FULL
            for hook in hooks:
                hook.remove()


class Scaled(Softmax):
    scaled = True


TRAINERS = {ALWAYS: None, SCALED: Scaled, SOFTMAX: Softmax}


def run_in(groups: str) -> Path:
    trainer = TRAINERS[groups]
    if trainer is None:
        return trained(Experiment.named("nano"), BASE.name, SEED, BASE.options(STEPS))
    out = EXPERIMENT.trained / directory_of(BASE.name, f"groups-{trainer.__name__.lower()}", f"{STEPS}-seed{SEED}")
    with patch.object(training, "RunTrainer", trainer):
        train(BASE.name, out=out, seed=SEED, options=BASE.options(STEPS), resume=True)
    return out


def measured(groups: str) -> list[dict[str, object]]:
    return [{column: row[column] for column in COLUMNS} for row in losses(run_in(groups))]


def make(file: Path) -> None:
    for groups in TRAINERS:
        once(file, {"groups": groups}, measured, groups)


def table(file: Path) -> str:
    """Rows are how a model was trained; smaller groups are treated as in its training, and scaled for the first one."""
    lines = [["groups in training", *(f"in groups of {n}" for n in reversed(SIZES)), "alone", "over the first row"]]
    found = {(row["groups"], row["treatment"], int(row["rows"])): float(row["loss"]) for row in read_csv(file)}
    first = found[ALWAYS, "companions", 1]
    for groups in dict.fromkeys(groups for groups, _, _ in found):
        treatment = "softmax" if groups == SOFTMAX else "scaled"
        its = [found[groups, "companions" if n == FULL else treatment, n] for n in reversed(SIZES)]
        alone = found[groups, "companions", 1]
        lines.append([groups, *map(loss, its), loss(alone), "" if groups == ALWAYS else signed(alone - first)])
    return markdown(lines)


if __name__ == "__main__":
    file = EXPERIMENT.kept / "random_groups.csv"
    script(__doc__, lambda: make(file), lambda: table(file))
