"""The router's learning rate: another one than the other weights' is no better.

    python experiments/paper/router_rate.py            # two Nanos; a quarter of an hour of one core
    python experiments/paper/router_rate.py --table    # the table of what is committed

MoT-Nano/32E/8, whose router's peak rate is a multiple of the other weights', in an optimizer's group of its own: half
and double. The multiple 1 is the run of `../nano`. Expected: neither lowers the loss by more than 0.01. The paper has
no table of it. One seed, final loss over the validation text. router_rate.csv has a row each; what is in it is not
trained again, and a run that was stopped begins anew: a checkpoint does not know of the second rate.
"""

import shutil
from pathlib import Path
from unittest.mock import patch

from nano import BASE, SEED, STEPS, row, run_in, signed
from studies import EXPERIMENT

import mixture_of_tokens.training.train as training
from mixture_of_tokens import train
from mixture_of_tokens.layers.experts import Router
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.formatting import loss, markdown

from common import directory_of, once, read_csv, script  # isort: skip

MULTIPLES = (0.5, 2.0)


def with_rate(multiple: float) -> type[RunTrainer]:
    class RouterRate(RunTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            routers = {id(module.weight) for module in self.causal_lm.modules() if isinstance(module, Router)}
            group = next(group for group in optimizer.param_groups if routers & set(map(id, group["params"])))
            own = [weight for weight in group["params"] if id(weight) in routers]
            assert len(own) == len(routers) > 0
            group["params"] = [weight for weight in group["params"] if id(weight) not in routers]
            optimizer.add_param_group(group | {"params": own, "lr": multiple * group["lr"]})
            return optimizer

    return RouterRate


def measured(multiple: float) -> list[dict[str, float]]:
    out = EXPERIMENT.trained / directory_of(BASE.name, f"router_rate={multiple:g}", f"{STEPS}-seed{SEED}")
    shutil.rmtree(out, ignore_errors=True)
    with patch.object(training, "RunTrainer", with_rate(multiple)):
        run = train(BASE.name, out=out, seed=SEED, options=BASE.options(STEPS))
    assert run is not None
    run.check_same_text(run_in(row(BASE)))
    return [{"seed": SEED, "loss": run.facts.final_loss}]


def make(file: Path) -> None:
    for multiple in MULTIPLES:
        once(file, {"multiple": multiple}, measured, multiple)


def table(file: Path) -> str:
    base = run_in(row(BASE)).facts.final_loss
    found = {float(row["multiple"]): float(row["loss"]) for row in read_csv(file)} | {1.0: base}
    rows = [
        [f"{multiple:g}", loss(found[multiple]), signed(found[multiple] - base) if multiple != 1 else ""]
        for multiple in sorted(found)
    ]
    return markdown([["router's rate, of the others'", "loss", "over the same rate"], *rows])


if __name__ == "__main__":
    file = EXPERIMENT.kept / "router_rate.csv"
    script(__doc__, lambda: make(file), lambda: table(file))
