"""One feed-forward layer: Mixture of Tokens beside its peers, its literal formulation and its bare matrix products.

    python benchmarks/layer.py             measure, print, append to benchmarks/results.csv
    python benchmarks/layer.py --gated     the same with SwiGLU feed-forwards, where transformers' block is a peer
    python benchmarks/layer.py --table     the latest results of benchmarks/results.csv as Markdown; measures nothing

Cost at the default sizes on two CPU cores: about ten minutes and 10 GB of memory. The machine must be quiet: one busy
process beside it makes two threads wait for each other at every matrix product. Wide quartiles are the sign.

All providers run in one process and take turns, in an order that is shuffled every round: a layer that runs alone
finds its tensors in the cache. A share is taken within each round, and the median over the rounds is reported.

Providers, all with the dense layer's active FLOPs and, but for `dense`, with G times its parameters (G: group size):

    dense                  the feed-forward without experts
    mot/K                  MixtureOfTokens.matched of granularity K: G * K experts of width intermediate / K
    token_choice           top-1 of G experts, capacity 1.25: tokens beyond it are dropped, empty places computed
    token_choice_dropless  top-1 of G experts, nothing is dropped
    expert_choice          G experts, each takes one token of a group
    qwen3_eager            transformers' Qwen3MoeSparseMoeBlock, top-1 of G experts, with its loop over experts
    qwen3_grouped_mm       the same through torch's grouped_mm. The block is always gated: among plain layers it has
                           2/3 of their width, for the same FLOPs, and the row has a note
    literal/K              the equations of mot/K as einsum and bmm under autograd, with the same router and result
    matmuls/K              the floor of mot/K: its matrix products alone (router, dispatch, up, down, combine; two
                           for each in the backward), in the row's dtype, contiguous, into existing buffers

Columns (a row is a JSON line on stdout; progress and a summary go to stderr):

    pass                   forward: without gradients. forward+backward: with those of all weights and of the input
    milliseconds           median of the repeats; milliseconds_low and milliseconds_high: their quartiles
    tokens_per_second      tokens / median
    peak_memory_mib        of forward + backward above weights and input, so activations and gradients; of each layer
                           alone, on the CPU in a process of its own
    share_of_dense         time of dense / own time: 0.8 is 80 % of the dense layer's speed
    share_of_floor         time of matmuls/K / own time: 1 minus this is the most that better software could gain
    note                   what is special about a row

and under which conditions: date, commit, versions, hardware, threads, sizes, dtype, allocator. Weights and input have
the row's dtype; the routers of this library compute in fp32 all the same. The input is random, so that sparse routers
are about as balanced as a balancing loss makes them. The number of threads is that of OMP_NUM_THREADS.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from providers import FLOORS, LAYERS, Provider, Sizes, build, granularity, qwen3_width
from results import (
    MACHINE,
    append,
    check_columns,
    columns_of,
    latest,
    read,
    surroundings,
    threads_of,
    with_brief_spinning,
)
from tqdm import tqdm

from mixture_of_tokens.utils.cpu import keep_large_blocks
from mixture_of_tokens.utils.formatting import markdown

PROVIDERS = (*LAYERS, *FLOORS)
PASSES = ("forward", "forward+backward")
WARM_UP = 2  # rounds
SIZES = tuple(field.name for field in fields(Sizes))
TIMES = (*columns_of("milliseconds"), "tokens_per_second", "peak_memory_mib")
SHARES = ("share_of_dense", "share_of_floor")
COLUMNS = (*MACHINE, "allocator", *SIZES, "dtype", "repeats", "provider", "pass", *TIMES, *SHARES, "note")


def resident(field: str) -> int:
    """VmRSS: bytes this process has now. VmHWM: the most it ever had (that of getrusage includes its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_memory(name: str, sizes: Sizes, dtype: torch.dtype, device: str, keep: bool) -> float:
    """MiB that forward + backward adds. On the CPU it must be called in a fresh process."""
    # A tiny layer first, so that libraries loaded on first use do not count.
    tiny = replace(sizes, hidden=32, intermediate=96, tokens=sizes.group_size, context=1)
    build(name, tiny, dtype, device).forward_backward()
    provider = build(name, sizes, dtype, device)
    if keep:
        keep_large_blocks()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        provider.forward_backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    provider.forward_backward()
    return (resident("VmHWM") - before) / 2**20


def peak_memories(names: Sequence[str], sizes: Sizes, dtype: torch.dtype, device: str, keep: bool) -> dict[str, float]:
    bar = tqdm([name for name in names if name in LAYERS], desc=f"{dtype} memory", unit="layer")
    if device == "cuda":
        return {name: peak_memory(name, sizes, dtype, device, keep) for name in bar}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixture_of_tokens.training.train"])
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return {name: pool.submit(peak_memory, name, sizes, dtype, device, keep).result() for name in bar}


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(providers: dict[str, Provider], repeats: int, device: str, title: str) -> dict[tuple, np.ndarray]:
    """Seconds (repeats,) by (provider, pass)."""
    times = {(name, kind): np.zeros(repeats) for name in providers for kind in PASSES}
    with tqdm(total=len(times) * (WARM_UP + repeats), desc=f"{title} time", unit="run") as bar:
        for round_number in range(-WARM_UP, repeats):
            for name, kind in random.Random(round_number).sample(list(times), len(times)):
                provider = providers[name]
                elapsed = seconds(provider.forward if kind == "forward" else provider.forward_backward, device)
                provider.reset()
                if round_number >= 0:
                    times[name, kind][round_number] = elapsed
                bar.update()
    return times


def measure(args: argparse.Namespace, sizes: Sizes, dtype: torch.dtype, conditions: dict) -> list[dict]:
    memory = {}
    if args.memory:
        memory = peak_memories(args.providers, sizes, dtype, args.device, conditions["allocator"] == "keep")
    providers = {name: build(name, sizes, dtype, args.device) for name in args.providers}
    times = interleaved(providers, args.repeats, args.device, str(dtype))
    rows = []
    for (name, kind), own in times.items():
        low, median, high = np.percentile(own, (25, 50, 75))
        row = dict.fromkeys(COLUMNS) | conditions | {"provider": name, "pass": kind}
        row |= {"milliseconds": round(median * 1e3, 3), "tokens_per_second": round(sizes.tokens / median)}
        row |= {"milliseconds_low": round(low * 1e3, 3), "milliseconds_high": round(high * 1e3, 3)}
        others = {"share_of_dense": "dense"}
        if name.startswith(("mot/", "literal/", "matmuls/")):
            others["share_of_floor"] = f"matmuls/{granularity(name)}"
        for share, other in others.items():
            if other in providers:
                row[share] = round(float(np.median(times[other, kind] / own)), 4)
        if kind == "forward+backward" and name in memory:
            row["peak_memory_mib"] = round(memory[name], 1)
        if name.startswith("qwen3") and not sizes.gated:
            row["note"] = f"gated, width {qwen3_width(sizes)}"
        rows.append(row)
    return rows


def tables(rows: list[dict]) -> str:
    """Markdown: for each of the conditions under which there are results, the latest of them."""
    parts = []
    for run in latest(rows, ("hardware", "threads", "onednn_isa", "waiting", "allocator", *SIZES, "dtype")):
        parts.append(
            "{feed_forward} {hidden} x {intermediate}, {dtype}, groups of {group_size}, {tokens} tokens, "
            "context {context}, {repeats} repeats; {hardware}, {with_threads}, oneDNN ISA {onednn_isa}, "
            "allocator {allocator}; torch {torch}, transformers {transformers}, commit {commit}, {date}\n"
            "".format_map(run[0] | {"with_threads": threads_of(run[0])})
        )
        lines = []
        for one, both in zip(run[::2], run[1::2], strict=True):
            assert one["provider"] == both["provider"]
            spread = "{milliseconds_low} to {milliseconds_high}".format_map(both)
            cells = [one[column] for column in ("provider", "milliseconds", *SHARES)]
            cells += [both["milliseconds"], spread, *(both[column] for column in SHARES)]
            lines.append([*cells, both["tokens_per_second"], both["peak_memory_mib"], both["note"]])
        header = ["", "forward, ms", "of dense", "of floor", "forward + backward, ms", "quartiles", "of dense"]
        parts.append(markdown([[*header, "of floor", "tokens/s", "peak MiB", "note"], *lines]) + "\n")
    return "\n".join(parts)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def some_of(legal: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = [word for word in text.split(",") if word not in legal]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; legal are {', '.join(legal)}")
        return [word for word in legal if word in text.split(",")]

    return parse


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--hidden", type=positive, default=512, help="width of a token (512)")
    add("--intermediate", type=positive, help="width of the dense layer (2048; gated 1376, which is the same FLOPs)")
    add("--group-size", type=positive, default=32, help="tokens in a group, and experts at granularity 1 (32)")
    add("--tokens", type=positive, default=8192, help="tokens in a batch: groups of whole examples (8192)")
    add("--context", type=positive, default=256, help="tokens of an example (256)")
    kind = parser.add_mutually_exclusive_group().add_argument
    text = "feed-forwards without a gate, ReLU, as in the paper (default)"
    kind("--plain", dest="feed_forward", action="store_const", const="plain", default="plain", help=text)
    kind("--gated", dest="feed_forward", action="store_const", const="gated", help="SwiGLU feed-forwards")
    add("--dtypes", type=some_of(("float32", "bfloat16")), default="float32,bfloat16", help="(float32,bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    add("--providers", type=some_of(PROVIDERS), default=",".join(PROVIDERS), help="a selection, by comma (all)")
    add("--repeats", type=positive, default=15, help=f"rounds that count, after {WARM_UP} that do not (15)")
    add(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: glibc keeps large blocks, as `mot train` has it; default: it returns them to the system (keep)",
    )
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too (yes)")
    out = Path(__file__).resolve().parent / "results.csv"
    add("--out", type=Path, default=out, help="where rows are appended (benchmarks/results.csv)")
    add("--no-save", dest="save", action="store_false", help="append nothing")
    add("--table", action="store_true", help="print the latest results of --out as Markdown; measures nothing")
    args = parser.parse_args()
    if args.table:
        if not args.out.exists():
            parser.error(f"argument --table: {args.out} does not exist; measure first, without --table")
        return args
    args.intermediate = args.intermediate or (1376 if args.feed_forward == "gated" else 2048)
    if args.tokens % (args.context * args.group_size):
        parser.error(f"argument --tokens: {args.tokens} is no multiple of --context times --group-size")
    uneven = [name for name in args.providers if args.intermediate % granularity(name)]
    if uneven:
        parser.error(f"argument --intermediate: {args.intermediate} is no multiple of the granularity of {uneven[0]}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device")
    if args.memory and args.device == "cpu" and sys.platform != "linux":
        parser.error("argument --memory: the peak memory on a CPU is known on Linux only; give --no-memory")
    if args.save:
        try:
            check_columns(args.out, COLUMNS)
        except (OSError, ValueError) as error:
            parser.error(f"argument --out: {error}")
    return args


def main() -> None:
    args = parse()
    if args.table:
        print(tables(read(args.out)), end="")
        return
    sizes = Sizes(**{name: getattr(args, name) for name in SIZES})
    kept = args.allocator == "keep" and keep_large_blocks()
    conditions = surroundings(args.device) | asdict(sizes) | {"repeats": args.repeats}
    conditions["allocator"] = "keep" if kept else "default"
    rows = []
    for dtype in args.dtypes:
        measured = measure(args, sizes, getattr(torch, dtype), conditions | {"dtype": dtype})
        for row in measured:
            print(json.dumps(row), flush=True)
        if args.save:
            append(args.out, COLUMNS, measured)
        rows += measured
    print("\n" + tables(rows), file=sys.stderr, end="")


if __name__ == "__main__":
    with_brief_spinning()
    main()
