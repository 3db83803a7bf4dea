"""Three systems for ten times as long, one seed: how ratios move with the length (docs/results/systems.md).

    python experiments/long/run.py            # three hours of one core, as measured beside other work
    python experiments/long/run.py --table    # who reaches whose loss, and when, of nano, prose and long: Markdown

12,000 steps, 98 million tokens, at the rates that were swept at 1,500 steps. MoT-Nano/32E/8 reaches the dense loss in
0.43 of the steps, Token Choice in 0.28, and ends 0.094 nats lower. It goes on where it was stopped.
"""

import sys
from pathlib import Path

from mixture_of_tokens.settings.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, compared, reached_table, script

NAMES = ("Transformer-Nano", "MoT-Nano/32E/8", "TC-Nano/32E")
SEEDS = [1]
OPTIONS = Options(steps=12_000, device="cpu", training={"eval_steps": "300"})


if __name__ == "__main__":
    script(__doc__, lambda: compared(Experiment.named("long"), NAMES, SEEDS, OPTIONS), reached_table)
