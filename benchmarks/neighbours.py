"""A training step beside busy processes: how threads wait for each other decides what it takes.

    python benchmarks/neighbours.py            measure, print, append to benchmarks/neighbours.csv
    python benchmarks/neighbours.py --table    the latest results of benchmarks/neighbours.csv as Markdown

About two minutes. Nothing else may run: the busy processes are the benchmark's own, each a loop in Python.

Three processes train the same model on the same random tokens: forward, backward, fused AdamW. One has OpenMP's threads
as it sets them, one as `mot` does (`utils.cpu.spin_briefly`), one has a single thread. They take turns, in an order
that is shuffled every round, and wait asleep in between.

Columns: busy, the number of busy processes; waiting, `openmp`, `mot` or `one thread`; milliseconds, the median over the
rounds of a step's time (low, high: quartiles); share_of_idle, that time over the same process's without busy ones,
within a round.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from results import MACHINE, columns_of, quartiles, run, surroundings, with_quartiles

from mixture_of_tokens.utils.cpu import BRIEFLY, OWN_CHOICE
from mixture_of_tokens.utils.formatting import markdown

RESULTS = Path(__file__).with_name("neighbours.csv")
WAITING = {"openmp": {}, "mot": BRIEFLY, "one thread": {"OMP_NUM_THREADS": "1"}}  # and what the process is told
COLUMNS = (*MACHINE, "model", "batch", "steps", "rounds", "busy")
COLUMNS += columns_of("milliseconds", "share_of_idle")


def train(name: str, batch: int, steps: int) -> None:
    """Answers each line of standard input with the seconds of a step."""
    import torch

    from mixture_of_tokens import MixtureOfTokensForCausalLM, config_from_name
    from mixture_of_tokens.utils.cpu import keep_large_blocks

    keep_large_blocks()
    torch.manual_seed(0)
    config = config_from_name(name)
    model = MixtureOfTokensForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (batch, config.max_position_embeddings))
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print((time.perf_counter() - start) / steps, flush=True)


class Trained:
    """A process that trains when it is asked to."""

    def __init__(self, waiting: str, args: argparse.Namespace):
        self.model = args.model
        own = {name: value for name, value in os.environ.items() if name not in OWN_CHOICE}
        words = [sys.executable, __file__, "--train", "--model", args.model]
        words += ["--batch-size", str(args.batch_size), "--steps", str(args.steps)]
        environment = own | WAITING[waiting]
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def seconds(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"--model {self.model}: the process that trains it ended")
        return float(answer)


def measure(args: argparse.Namespace) -> list[dict]:
    if args.busy[0] != 0 or len(set(args.busy)) < len(args.busy):
        raise ValueError("--busy: the first number must be 0, what the others are compared with, and none comes twice")
    trained = {waiting: Trained(waiting, args) for waiting in WAITING}
    seconds = {(busy, waiting): [] for busy in args.busy for waiting in WAITING}
    try:
        for each in trained.values():
            each.seconds()  # a warm-up: caches, threads, the allocator
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            for busy in random.sample(args.busy, len(args.busy)):
                others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                try:
                    for waiting in random.sample([*WAITING], len(WAITING)):
                        seconds[busy, waiting].append(trained[waiting].seconds())
                finally:
                    for other in others:
                        other.kill()
                        other.wait()
    finally:
        for each in trained.values():
            each.process.kill()
            each.process.wait()
    conditions = surroundings("cpu") | {"model": args.model, "batch": args.batch_size}
    conditions |= {"steps": args.steps, "rounds": args.rounds}
    rows = []
    for (busy, waiting), own in seconds.items():
        times, idle = np.array(own), np.array(seconds[args.busy[0], waiting])
        row = conditions | {"busy": busy, "waiting": waiting}
        rows.append(row | quartiles(milliseconds=1e3 * times, share_of_idle=times / idle))
    return rows


def table(rows: list[dict]) -> str:
    def cell(row: dict | None) -> str:
        return "" if row is None else f"{float(row['milliseconds']):,.0f} = {with_quartiles(row, 'share_of_idle')}"

    of = {(int(row["busy"]), row["waiting"]): row for row in rows}
    counts = dict.fromkeys(busy for busy, _ in of)
    lines = [(busy, *(cell(of.get((busy, waiting))) for waiting in WAITING)) for busy in counts]
    first = rows[0]
    facts = f"{first['model']}, {first['hardware']}, {first['cores']} cores, {first['threads']} threads, torch "
    facts += f"{first['torch']}, {first['rounds']} rounds, commit {first['commit']}, {first['date'][:10]}: "
    facts += "ms a step, and as a multiple of the idle one"
    head = ("busy processes", "OpenMP's own waiting", "as `mot` sets it", "one thread")
    return f"{facts}\n\n" + markdown([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MoT-Nano/32E/8")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 3], help="numbers of processes; the first is 0")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    if "--train" in sys.argv:
        args = parser.parse_args()
        train(args.model, args.batch_size, args.steps)
        return
    run(parser, RESULTS, COLUMNS, measure, table, by=("hardware", "cores", "threads", "model", "torch"))


if __name__ == "__main__":
    main()
