"""Whether a shared expert carries what unchosen experts give after the switch (experiments/LOG.md): it does not.

    python experiments/switch/shared.py            # some 12 minutes of one core, beside the source of `nano`
    python experiments/switch/shared.py --table    # Markdown

Served alone, every expert of a Mixture of Tokens answers every token, and after the switch k of them do. What the
others give is nearly the same for all tokens. So one of the k experts becomes one that is shared, at equal FLOPs, and
is distilled together with the rest of its layer, from random weights. Losses are of the tuning split, without training.
Those of shared.csv are older than the way in which few experts are distilled today, so a new run has others.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mixture_of_tokens import MixtureOfTokens, MixtureOfTokensForCausalLM, TokenChoice
from mixture_of_tokens.convert.distil import BETAS, FEW, RATE, STEPS, start
from mixture_of_tokens.convert.switch import (
    STEP_TOKENS,
    Fit,
    branches,
    sparse_layers,
    to_token_choice,
    token_choice_config,
)
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.formatting import markdown
from mixture_of_tokens.inference.evaluate import evaluate_blocks
from mixture_of_tokens.runs.loading import load_model, text_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, once, read_csv, script, spread, trained

NAME, SEEDS = "MoT-Nano/32E/8", (1,)
GATES: tuple[Any, ...] = ("softmax", "sigmoid")
WAYS = ((8, 0), (7, 1), (4, 0), (3, 1))  # experts a token chooses, and shared ones
READ = 16  # times that a token is read, on average: `distil` reads a token less often since this was measured


def distilled(source: MixtureOfTokensForCausalLM, seen: Any, gates: Any, chosen: int, shared: int):
    """The switched model, its layers fitted as `distil` fits them."""
    config = token_choice_config(source.config, top_k=chosen, scores=gates)
    config.shared_experts = shared
    torch.manual_seed(0)
    target = MixtureOfTokensForCausalLM(config).eval()
    to_token_choice(source, target)
    mixing = dict(sparse_layers(source, MixtureOfTokens))
    for i, layer in sparse_layers(target, TokenChoice):
        x_SD, y_SD = seen[i]
        start(mixing[i], layer, x_SD[:STEP_TOKENS])
        always: Any = target.model.layers[i].shared_experts

        def output(x: Tensor, layer=layer, always=always) -> Tensor:
            return layer(x[None])[0] if always is None else layer(x[None])[0] + always(x)

        weights = [*layer.parameters(), *([] if always is None else always.parameters())]
        groups = [{"params": [each], "lr": RATE * float(each.detach().abs().mean())} for each in weights]
        Fit(output, groups, STEPS, BETAS).advance(x_SD, y_SD, STEPS, tqdm(disable=True))
    return target


def measured(seed: int) -> list[dict[str, object]]:
    directory = str(trained(Experiment.named("nano"), NAME, seed, NANO))
    source, text = load_model(directory), text_of(directory)
    size, few = source.config.group_size, FEW * source.config.num_experts_per_tok
    seen = branches(source, training_groups(text.train, size, groups=None), STEPS * STEP_TOKENS // READ, few)
    rows = []
    for gates in GATES:
        for chosen, shared in WAYS:
            target = distilled(source, seen, gates, chosen, shared)
            found = evaluate_blocks(target, text.tuning, group_size=size, batch_size=4 * size)["loss"]
            rows.append({"gates": gates, "chosen": chosen, "shared": shared, "loss": found})
            print(f"seed {seed}, {gates}, {chosen} + {shared}: {found:.4f}", file=sys.stderr)
    return rows


def make(kept: Path) -> None:
    for seed in SEEDS:
        once(kept / "shared.csv", {"seed": seed}, measured, seed)


def table(kept: Path) -> str:
    found = {
        (row["seed"], row["gates"], row["chosen"], row["shared"]): float(row["loss"])
        for row in read_csv(kept / "shared.csv")
    }
    seeds = sorted({seed for seed, *_ in found})
    shown = [["gates", "all chosen", "one of them shared", "difference"]]
    for gates in GATES:
        for (all_chosen, _), (chosen, shared) in zip(WAYS[::2], WAYS[1::2], strict=True):
            without = [found[seed, gates, str(all_chosen), "0"] for seed in seeds]
            with_it = [found[seed, gates, str(chosen), str(shared)] for seed in seeds]
            difference = spread((b - a for a, b in zip(without, with_it, strict=True)), "{:+.4f}".format)
            cells = [f"top {all_chosen}: {spread(without)}", f"top {chosen} + {shared}: {spread(with_it)}"]
            shown.append([gates, *cells, difference])
    return markdown(shown)


if __name__ == "__main__":
    experiment = Experiment.named("switch")
    script(__doc__, lambda: make(experiment.kept), lambda: table(experiment.kept))
