"""Tokens a second that a model writes, by the rows of a batch: Mixture of Tokens beside dense and Token Choice.

    python benchmarks/generate.py            measure, print, append to benchmarks/generate.csv
    python benchmarks/generate.py --table    the latest results of benchmarks/generate.csv as Markdown; measures nothing

Cost at Nano on two CPU cores: half a minute. The machine must be quiet.

Untrained models continue random prompts greedily, with the KV cache and without a stop token, so that all write the
same number of tokens. A turn is one call of `generate`; models and batches take turns in an order that is shuffled
every round. Columns: tokens_per_second of the whole batch, the median over the rounds (low, high: quartiles);
share_of_first, that over the first model's at the same batch size, taken within each round. Batches that are no
multiple of a Mixture of Tokens' group size have an incomplete group; a lone row passes through all experts. A name with
a number, as in MoT-Nano/32E/8:8, is served alone, each token by so many experts.
"""

import argparse
import time
from pathlib import Path

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

from mixture_of_tokens import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.utils.cpu import keep_large_blocks
from mixture_of_tokens.utils.formatting import markdown

RESULTS = Path(__file__).with_name("generate.csv")
COLUMNS = (*MACHINE, "prompt", "new", "rounds", "model", "batch", *columns_of("tokens_per_second", "share_of_first"))


def seconds(model, batch: int, args: argparse.Namespace) -> float:
    ids = torch.randint(1, model.config.vocab_size, (batch, args.prompt), device=args.device)
    start = time.perf_counter()
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new, do_sample=False, eos_token_id=None
    )
    written.cpu()  # waits for the device
    assert written.shape == (batch, args.prompt + args.new)
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> list[dict]:
    keep_large_blocks()
    torch.manual_seed(0)
    models = {}
    for label in args.models:
        name, _, few = label.partition(":")
        config = config_from_name(name, vocab_size=args.vocab_size)
        if args.prompt + args.new > config.max_position_embeddings:
            raise ValueError(f"{args.prompt} + {args.new} tokens do not fit the context of {name}")
        models[label] = MixtureOfTokensForCausalLM(config).to(args.device).eval()
        if few:
            models[label].serve_alone(num_experts_alone=int(few))
    turns = [(name, batch) for name in models for batch in args.batches]
    for name, batch in turns:
        seconds(models[name], batch, args)  # a warm-up: caches, threads, the allocator
    times = in_turns(turns, args.rounds, lambda name, batch: seconds(models[name], batch, args))
    speeds = {(name, batch): batch * args.new / own for (name, batch), own in times.items()}
    conditions = surroundings(args.device) | {"prompt": args.prompt, "new": args.new, "rounds": args.rounds}
    rows = []
    for (name, batch), own in speeds.items():
        figures = quartiles(tokens_per_second=own, share_of_first=own / speeds[args.models[0], batch])
        rows.append(conditions | {"model": name, "batch": batch} | figures)
    return rows


def table(rows: list[dict]) -> str:
    first, batches = rows[0], list(dict.fromkeys(int(row["batch"]) for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{float(row['tokens_per_second']):,.0f}"
        if row["model"] != first["model"]:
            cell += f" = {with_quartiles(row, 'share_of_first')}"
        cells.setdefault(row["model"], []).append(cell)
    facts = f"{first['hardware']}, {threads_of(first)}, torch {first['torch']}, {first['new']} tokens after "
    facts += f"{first['prompt']}, {first['rounds']} rounds, commit {first['commit']}, {first['date'][:10]}: tokens/s, "
    facts += f"and as a share of {first['model']}'s"
    titles = {label: label.replace(":", ", alone, experts: ") for label in cells}
    return f"{facts}\n\n" + markdown([("rows", *batches), *((titles[it], *line) for it, line in cells.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mixtures = ["MoT-Nano/32E", "MoT-Nano/32E/8", "MoT-Nano/32E/8:8"]
    models = ["Transformer-Nano", *mixtures, "TC-Nano/32E", "TC-Nano/32E/8"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=8, help="tokens before")
    parser.add_argument("--new", type=int, default=48, help="tokens to write")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run(parser, RESULTS, COLUMNS, measure, table, by=("hardware", "threads", "prompt", "new", "torch"))


if __name__ == "__main__":
    with_brief_spinning()
    main()
