"""A whole training step: every system beside the dense model, and Trainer beside a bare loop.

    python benchmarks/train.py             measure, print, append to benchmarks/train.csv
    python benchmarks/train.py --widths    wider models too, by the bare loop: a step's time beside its FLOPs
    python benchmarks/train.py --processes 2    one process, and several that share its rows, by Trainer
    python benchmarks/train.py --table     the latest results of benchmarks/train.csv as Markdown; measures nothing

Cost at Nano on two CPU cores: about seven minutes, ten with --widths --rounds 3 --steps 4, twenty with --processes.
The machine must be quiet.

Every model is trained in turns of `--steps` steps by two loops, in an order that is shuffled every round:

    trainer   what `mot train` runs: with logging, router telemetry, TensorBoard and progress bar, without evaluations
              and checkpoints, which a run's clock leaves out
    loop      forward, backward, clipping, fused AdamW and the schedule over the same batches, and nothing else

With --processes the first row of a model is one process with all cores; the others are as many processes, each with its
part of the cores and of the rows, as copies (DDP), as shards (FSDP2), and with the experts divided. Every turn has
processes of its own, and its share is of the same model in one process.

Columns: width, the hidden size, with a feed-forward some 2.67 times as wide; flops_of_first, the FLOPs of a step over
the first model's (with --processes over the same model's: 1); milliseconds, the median over the rounds of a step's time
(low, high: quartiles); share_of_first, the time of a step over the first model's by the same loop; overhead, Trainer's
time over the bare loop's, minus 1.
Both ratios are taken within each round, and their median is reported with its quartiles.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import (
    MACHINE,
    columns_of,
    in_turns,
    quartiles,
    run,
    surroundings,
    threads_of,
    with_brief_spinning,
    with_quartiles,
)
from transformers import TrainingArguments, get_scheduler

from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.planning.communication import legal_placements
from mixture_of_tokens.planning.cost import training_flops
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import build
from mixture_of_tokens.utils.cpu import cores, keep_large_blocks
from mixture_of_tokens.utils.formatting import markdown
from mixture_of_tokens.utils.process import is_main

RESULTS = Path(__file__).with_name("train.csv")
WIDTHS = (32, 64, 128, 256)
PLACEMENTS = {"copies": [], "shards": ["--shard"], "experts divided": ["--shard", "--expert-parallel"]}
WARM_UP = 3  # steps of every turn before its clock starts
COLUMNS = (*MACHINE, "batch", "steps", "rounds", "width", "model", "loop", "flops_of_first")
COLUMNS += columns_of("milliseconds", "share_of_first", "overhead")


def sizes_of(width: int) -> dict[str, int]:
    """Fields of a model of this width: heads of 32, and a feed-forward whose eighth is a multiple of four."""
    return {
        "hidden_size": width,
        "num_attention_heads": width // 32,
        "intermediate_size": round(8 * width / 3 / 32) * 32,
    }


class Turn:
    """One model by one loop."""

    def __init__(self, name: str, loop: str, width: int | None, args: argparse.Namespace, out: str):
        training = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": "20"}
        options = Options(
            steps=args.steps + WARM_UP,
            batch_size=args.batch_size,
            data=args.data,
            device=args.device,
            training=training,
            model={} if width is None else {field: str(value) for field, value in sizes_of(width).items()},
            shard=args.shard,
            expert_parallel=args.expert_parallel,
        )
        merged = merge(name, 0, None, options)
        self.config, self.placement, self.loop = merged.config, merged.placement, loop
        self.arguments = TrainingArguments(output_dir=out, **merged.arguments)
        self.flops = training_flops(self.config.model_config, self.config.batch_size)
        self.arguments._n_gpu = min(1, self.arguments.n_gpu)  # as `mot train` has it

    def seconds_per_step(self) -> float:
        trainer, _ = build(self.config, self.arguments, self.placement)
        return self._trainer(trainer) if self.loop == "trainer" else self._bare(trainer)

    def _trainer(self, trainer) -> float:
        seconds: list[float] = []
        on_step_end = trainer.run_log.on_step_end

        def timed(*args: Any, **kwargs: Any) -> None:
            on_step_end(*args, **kwargs)
            if len(seconds) == WARM_UP - 1:
                self._wait()
            seconds.append(trainer.clock.seconds)

        trainer.run_log.on_step_end = timed
        trainer.train()
        return (trainer.clock.seconds - seconds[WARM_UP - 1]) / (len(seconds) - WARM_UP)

    def _bare(self, trainer) -> float:
        model, args, rows = trainer.causal_lm.train(), self.arguments, trainer.rows
        optimizer = trainer.create_optimizer()
        names = ("lr_scheduler_type", "warmup_steps", "lr_scheduler_kwargs")
        kind, warm, options = (self.config.training[name] for name in names)
        schedule = get_scheduler(kind, optimizer, warm, args.max_steps, options)
        start, batch = 0.0, self.config.batch_size
        for step in range(args.max_steps):
            if step == WARM_UP:
                self._wait()
                start = time.perf_counter()
            inputs = rows.__getitems__(list(range(step * batch, (step + 1) * batch)))
            inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
            model(**inputs, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            model.balance()
            schedule.step()
            optimizer.zero_grad()
        self._wait()
        return (time.perf_counter() - start) / (args.max_steps - WARM_UP)

    def _wait(self) -> None:
        if self.arguments.device.type == "cuda":
            torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> list[dict]:
    keep_large_blocks()
    args.steps = args.steps or (20 if args.processes else 40 if args.widths is None else 10)
    conditions = surroundings(args.device) | {"steps": args.steps, "rounds": args.rounds}
    if args.processes:
        return _over_processes(args, conditions)
    if args.widths is None:
        return _measured(args, None, ("trainer", "loop"), conditions)
    return [row for width in args.widths or WIDTHS for row in _measured(args, width, ("loop",), conditions)]


def _measured(args: argparse.Namespace, width: int | None, loops: tuple[str, ...], conditions: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as out:
        keys = [(name, loop) for name in args.models for loop in loops]
        turns = {key: Turn(*key, width, args, f"{out}/{i}") for i, key in enumerate(keys)}
        for turn in turns.values():
            turn.seconds_per_step()  # a warm-up: caches, threads, the allocator
        of = "" if width is None else f", width {width}"
        times = in_turns(keys, args.rounds, lambda *key: turns[key].seconds_per_step(), of)
    milliseconds = {key: 1e3 * seconds for key, seconds in times.items()}
    rows = []
    for (name, loop), own in milliseconds.items():
        config, flops = turns[name, loop].config, turns[name, loop].flops
        row = conditions | {"model": name, "loop": loop, "batch": config.batch_size}
        row |= {"width": config.model_config.hidden_size}
        row |= {"flops_of_first": round(flops / turns[args.models[0], loop].flops, 4)}
        figures = {"milliseconds": own, "share_of_first": own / milliseconds[args.models[0], loop]}
        if loop == "trainer":
            figures["overhead"] = own / milliseconds[name, "loop"] - 1
        rows.append(row | quartiles(**figures))
    return rows


def _over_processes(args: argparse.Namespace, conditions: dict) -> list[dict]:
    width = args.widths[0] if args.widths else None
    with tempfile.TemporaryDirectory() as out:
        turns = {name: Turn(name, "trainer", width, args, out) for name in args.models}
    ways = {"one process": (1, [])}
    for way, flags in PLACEMENTS.items():
        ways[f"{args.processes} processes, {way}"] = (args.processes, [f"{flag}={args.processes}" for flag in flags])
    divided = Placement(args.processes, 1, args.processes)
    keys = [
        (name, way)
        for name, turn in turns.items()
        for way in ways
        if "divided" not in way or divided in legal_placements(turn.config.model_config, args.processes)
    ]
    times = in_turns(keys, args.rounds, lambda name, way: _in_processes(args, name, *ways[way]))
    rows = []
    for (name, way), own in times.items():
        config = turns[name].config
        row = conditions | {"model": name, "loop": way, "batch": config.batch_size, "flops_of_first": 1.0}
        row |= {"width": config.model_config.hidden_size}
        rows.append(row | quartiles(milliseconds=1e3 * own, share_of_first=own / times[name, "one process"]))
    return rows


def _in_processes(args: argparse.Namespace, name: str, count: int, flags: list[str]) -> float:
    """Seconds a step of a model in new processes, which share the cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    own = ["--turn", "--models", name, "--steps", str(args.steps), *flags]
    own += [] if args.batch_size is None else ["--batch-size", str(args.batch_size)]
    own += ["--widths", str(args.widths[0])] if args.widths else []
    own += ["--device", args.device] if args.device else []
    own += ["--data", *args.data] if args.data else []
    threads = {"OMP_NUM_THREADS": str(max(1, (cores()) // count))}
    command = [sys.executable, *launcher, __file__, *own]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} has failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    return float(done.stdout.split()[-1])


def take_a_turn(args: argparse.Namespace) -> None:
    """Print the seconds a step of one model, in one of the processes."""
    keep_large_blocks()
    with tempfile.TemporaryDirectory() as out:
        turn = Turn(args.models[0], "trainer", args.widths[0] if args.widths else None, args, out)
        seconds = turn.seconds_per_step()
    if is_main():
        print(seconds)


def table(rows: list[dict]) -> str:
    first = rows[0]
    facts = f"{first['hardware']}, {threads_of(first)}, torch {first['torch']}, {first['batch']} rows a step, "
    facts += f"{first['rounds']} rounds of {first['steps']} steps, commit {first['commit']}, {first['date'][:10]}"
    if len({row["width"] for row in rows}) > 1:
        return f"{facts}: time of a step over {first['model']}'s, by its FLOPs over those\n\n{_by_width(rows)}"
    lines = []
    for row in rows:
        overhead = with_quartiles(row, "overhead", ".1%") if row.get("overhead") not in (None, "") else ""
        shown = (with_quartiles(row, "milliseconds", ".1f"), with_quartiles(row, "share_of_first"), overhead)
        lines.append((f"{row['model']}, {row['loop']}", *shown))
    if first["loop"] == "one process":
        lines = [line[:-1] for line in lines]
        facts += f", width {first['width']}"
        return f"{facts}\n\n" + markdown([("", "ms a step", "of one process"), *lines])
    return f"{facts}\n\n" + markdown([("", "ms a step", f"of {first['model']}'s", "over the bare loop"), *lines])


def _by_width(rows: list[dict]) -> str:
    """A line a width, and its models beside the first: time, in brackets its quartiles, FLOPs, and time by FLOPs."""
    first, *models = dict.fromkeys(row["model"] for row in rows)
    of = {(row["width"], row["model"]): row for row in rows}
    lines = []
    for width in dict.fromkeys(row["width"] for row in rows):
        cells = [f"{float(of[width, first]['milliseconds']):,.0f}"]
        for row in (of[width, model] for model in models):
            time, flops = float(row["share_of_first"]), float(row["flops_of_first"])
            cells.append(f"{with_quartiles(row, 'share_of_first')} / {flops:.2f} = {time / flops:.2f}")
        lines.append((width, *cells))
    return markdown([("width", f"{first}, ms", *models), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=[
            "Transformer-Nano",
            "MoT-Nano/32E",
            "MoT-Nano/32E/4",
            "MoT-Nano/32E/8",
            "TC-Nano/32E",
            "TC-Nano/32E/8",
        ],
    )
    parser.add_argument("--widths", nargs="*", type=int, help="wider models; without a number 32 64 128 256")
    parser.add_argument("--steps", type=int, help="of a turn; by default 40, 20 with --processes, 10 with --widths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--data", nargs="+", default=[], help="as in mot train")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, help="several processes beside one")
    for flag in ("--shard", "--expert-parallel"):
        parser.add_argument(flag, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    if "--turn" in sys.argv:
        take_a_turn(parser.parse_args())
        return
    run(parser, RESULTS, COLUMNS, measure, table, by=("hardware", "threads", "batch", "torch", "steps"))


if __name__ == "__main__":
    with_brief_spinning()
    main()
