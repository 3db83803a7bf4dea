"""What models cost over 8 and 64 devices, by `mot plan`'s arithmetic: a table of docs/reference/scaling.md.

Nothing is run.

    python benchmarks/placements.py

Gated models of the paper's sizes, 32 rows of 256 tokens a device, weights in fp32 and what is exchanged in bf16.
"""

from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.parallel.placement import COPIES, Placement
from mixture_of_tokens.planning.communication import spread_of
from mixture_of_tokens.utils.formatting import markdown

MODELS = ("MoT-Medium/32E", "MoT-Medium/32E/8", "MoT-Base/32E", "MoT-Base/32E/8")
ROWS = 32  # of a device, one group
# By the number of devices: ways that this library trains, with the flags of each.
PLACEMENTS = {
    8: {"": COPIES, "--shard 8": Placement(8), "--shard 8 --expert-parallel 8": Placement(8, 1, 8)},
    64: {
        "": COPIES,
        "--shard 8": Placement(8, 8),
        "--shard 64": Placement(64),
        "--shard 8 --expert-parallel 8": Placement(8, 8, 8),
    },
}


def table() -> str:
    rows = []
    for name in MODELS:
        config = config_from_name(name)
        for devices, ways in PLACEMENTS.items():
            for flags, placement in ways.items():
                found = spread_of(config, batch=ROWS * devices, devices=devices, placement=placement)
                states = sum(found.memory[part] for part in ("weights", "gradients", "optimizer"))
                cells = [f"{size / 2**30:.1f}" for size in (states, found.memory["total"])]
                sent = [f"{size / 1e6:,.0f}" for size in (found.sent["total"], found.experts_sent["as here"])]
                rows.append((name, str(devices), f"`{flags}`" if flags else "", *cells, *sent))
    columns = (
        "model",
        "devices",
        "flags",
        "GiB of weights and optimizer",
        "GiB in all",
        "MB sent",
        "of it for experts",
    )
    return markdown([columns, *rows])


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
