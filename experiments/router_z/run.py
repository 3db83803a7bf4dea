"""A loss on the size of a router's logits (`router_z_loss_coef`, ST-MoE): what it changes at Nano.

    python experiments/router_z/run.py           # four runs, one seed; 20 minutes of one core
    python experiments/router_z/run.py --table   # prints the table

Token Choice of 1 of 32 and of 8 of 256 experts, 1,000 steps of the standard library's source, by the recipes' rates.
Losses are of the whole tuning split. `logits` is the root of the mean of logsumexp(logits)^2 over 8,192 of its tokens
and the layers, which the loss keeps small.
"""

import sys
from pathlib import Path

import torch

from mixture_of_tokens import train
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, directory_of, once, read_csv, script

EXPERIMENT = Experiment.named("router_z")
RUNS = EXPERIMENT.kept / "runs.csv"
NAMES, COEFFICIENTS, SEED, STEPS, ROWS = ("TC-Nano/32E", "TC-Nano/32E/8"), (0.0, 1e-3), 1, 1000, 128


def _run(name: str, coefficient: float) -> list[dict[str, object]]:
    out = EXPERIMENT.trained / directory_of(name, {"router_z_loss_coef": coefficient}, f"seed{SEED}")
    fields = {"router_z_loss_coef": coefficient}
    options = Options(steps=STEPS, device="cpu", evaluate_on="tuning", model=fields)
    facts = train(name, out=out, seed=SEED, options=options, resume=True).facts
    model, rows = load_model(str(out), device="cpu").eval(), text_of(str(out)).tuning.batch(range(ROWS))
    with torch.no_grad():
        logits = model(rows["input_ids"], output_router_logits=True).router_logits
    size = torch.stack([each.logsumexp(-1).square().mean() for each in logits]).mean().sqrt()
    found = {"loss": facts.final_loss, "logits": round(size.item(), 3), "corpus": facts.corpus["hash"]}
    return [found | {"commit": facts.commit} | provenance.hardware("cpu")]


def make() -> None:
    for name in NAMES:
        for coefficient in COEFFICIENTS:
            key = {"name": name, "router_z_loss_coef": coefficient, "seed": SEED}
            once(RUNS, key, _run, name, coefficient, settings={"steps": STEPS})


def table() -> str:
    rows = read_csv(RUNS) if RUNS.exists() else []
    lines = [["", "router_z_loss_coef", "loss", "size of logits"]]
    lines += [[row["name"], row["router_z_loss_coef"], loss(float(row["loss"])), row["logits"]] for row in rows]
    return markdown(lines)


if __name__ == "__main__":
    script(__doc__, make, table)
