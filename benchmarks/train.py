"""A whole training step: every system beside the dense model, and Trainer beside a bare loop.

    python benchmarks/train.py             measure, print, append to benchmarks/train.csv
    python benchmarks/train.py --widths    wider models too, by the bare loop: a step's time beside its FLOPs
    python benchmarks/train.py --table     the latest results of benchmarks/train.csv as Markdown; measures nothing

Cost at Nano on two CPU cores: about six minutes, and ten with --widths. The machine must be quiet.

Every model is trained in turns of `--steps` steps by two loops, in an order that is shuffled every round:

    trainer   what `mot train` runs: with logging, router telemetry, TensorBoard and progress bar, without evaluations
              and checkpoints, which a run's clock leaves out
    loop      forward, backward, clipping, fused AdamW and the schedule over the same batches, and nothing else

Columns: width, the hidden size, with a feed-forward some 2.67 times as wide; flops_of_first, the FLOPs of a step over
the first model's; milliseconds, the median over the rounds of a step's time (low, high: quartiles); share_of_first, the
time of a step over the first model's by the same loop; overhead, Trainer's time over the bare loop's, minus 1.
Both ratios are taken within each round, and their median is reported with its quartiles.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import markdown, quartiles, run, surroundings, with_brief_spinning
from transformers import TrainingArguments, get_scheduler

from mixture_of_tokens.model.cost import training_flops
from mixture_of_tokens.process import keep_large_blocks
from mixture_of_tokens.training.options import Options
from mixture_of_tokens.training.recipes import merge
from mixture_of_tokens.training.train import build

RESULTS = Path(__file__).with_name("train.csv")
WIDTHS = (32, 64, 128, 256)
WARM_UP = 3  # steps of every turn before its clock starts
SPREAD = ("milliseconds", "share_of_first", "overhead")
COLUMNS = ("date", "commit", "torch", "transformers", "python", "hardware", "cores", "threads", "onednn_isa")
COLUMNS += ("batch", "steps", "rounds", "width", "model", "loop", "flops_of_first")
COLUMNS += tuple(f"{name}{end}" for name in SPREAD for end in ("", "_low", "_high"))


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
        )
        self.config, arguments, _ = merge(name, 0, None, options)
        self.arguments, self.loop = TrainingArguments(output_dir=out, **arguments), loop
        self.flops = training_flops(self.config.model_config, self.config.batch_size)
        self.arguments._n_gpu = min(1, self.arguments.n_gpu)  # as `mot train` has it

    def seconds_per_step(self) -> float:
        trainer, _ = build(self.config, self.arguments)
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
            schedule.step()
            optimizer.zero_grad()
        self._wait()
        return (time.perf_counter() - start) / (args.max_steps - WARM_UP)

    def _wait(self) -> None:
        if self.arguments.device.type == "cuda":
            torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> list[dict]:
    keep_large_blocks()
    args.steps = args.steps or (40 if args.widths is None else 10)
    conditions = surroundings(args.device) | {"steps": args.steps, "rounds": args.rounds}
    if args.widths is None:
        return _measured(args, None, ("trainer", "loop"), conditions)
    return [row for width in args.widths or WIDTHS for row in _measured(args, width, ("loop",), conditions)]


def _measured(args: argparse.Namespace, width: int | None, loops: tuple[str, ...], conditions: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as out:
        keys = [(name, loop) for name in args.models for loop in loops]
        turns = {key: Turn(*key, width, args, f"{out}/{i}") for i, key in enumerate(keys)}
        for turn in turns.values():
            turn.seconds_per_step()  # a warm-up: caches, threads, the allocator
        times = {key: [] for key in keys}
        for number in range(args.rounds):
            of = "" if width is None else f", width {width}"
            print(f"round {number + 1} of {args.rounds}{of}", file=sys.stderr)
            for key in random.sample(keys, len(keys)):
                times[key].append(turns[key].seconds_per_step())
    milliseconds = {key: 1e3 * np.array(seconds) for key, seconds in times.items()}
    rows = []
    for (name, loop), own in milliseconds.items():
        config, flops = turns[name, loop].config, turns[name, loop].flops
        row = conditions | {"model": name, "loop": loop, "batch": config.batch_size}
        row |= {"width": config.model_config.hidden_size}
        row |= {"flops_of_first": round(flops / turns[args.models[0], loop].flops, 4)}
        figures = {"milliseconds": own, "share_of_first": own / milliseconds[args.models[0], loop]}
        if loop == "trainer":
            figures["overhead"] = own / milliseconds[name, "loop"] - 1
        for figure, values in figures.items():
            row |= quartiles(figure, values)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    def cell(row: dict, name: str, form: str) -> str:
        return f"{float(row[name]):{form}} ({float(row[f'{name}_low']):{form}} to {float(row[f'{name}_high']):{form}})"

    first = rows[0]
    facts = f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, {first['batch']} rows a step, "
    facts += f"{first['rounds']} rounds of {first['steps']} steps, commit {first['commit']}, {first['date'][:10]}"
    if len({row["width"] for row in rows}) > 1:
        return f"{facts}: time and FLOPs of a step over {first['model']}'s\n\n{_by_width(rows)}"
    lines = []
    for row in rows:
        overhead = cell(row, "overhead", ".1%") if row.get("overhead") not in (None, "") else ""
        shown = (cell(row, "milliseconds", ".1f"), cell(row, "share_of_first", ".2f"), overhead)
        lines.append((f"{row['model']}, {row['loop']}", *shown))
    return f"{facts}\n\n" + markdown(("", "ms a step", f"of {first['model']}'s", "over the bare loop"), lines)


def _by_width(rows: list[dict]) -> str:
    """A line a width, and its models beside the first: time, its quartiles, and in brackets the FLOPs."""
    first, *models = dict.fromkeys(row["model"] for row in rows)
    of = {(row["width"], row["model"]): row for row in rows}
    lines = []
    for width in dict.fromkeys(row["width"] for row in rows):
        cells = [f"{float(of[width, first]['milliseconds']):,.0f}"]
        for row in (of[width, model] for model in models):
            time, low, high = (float(row[f"share_of_first{end}"]) for end in ("", "_low", "_high"))
            cells.append(f"{time:.2f} ({low:.2f} to {high:.2f}), FLOPs {float(row['flops_of_first']):.2f}")
        lines.append((width, *cells))
    return markdown(("width", f"{first}, ms", *models), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["Transformer-Nano", "MoT-Nano/32E", "MoT-Nano/32E/4", "MoT-Nano/32E/8", "TC-Nano/32E"],
    )
    parser.add_argument("--widths", nargs="*", type=int, help="by default 32 64 128 256")
    parser.add_argument("--steps", type=int, help="of a turn; by default 40, and 10 with --widths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--data", nargs="+", default=[], help="as in mot train")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    run(parser, RESULTS, COLUMNS, measure, table, by=("hardware", "threads", "batch", "torch", "steps"))


if __name__ == "__main__":
    with_brief_spinning()
    main()
