"""What rounding costs a model in llama.cpp: its loss over many tokens, by the type of a GGUF file's matrices.

    python benchmarks/rounding.py EXPORTED TEXT_OF [--tokens 65000]   # adds rows to rounding.csv
    python benchmarks/rounding.py --table

EXPORTED is what `mot export` wrote for transformers, TEXT_OF the run whose validation text is scored: whole blocks of
the model's context, each by itself, all but the first token of a block. llama.cpp writes every token of the text by
force and tells how likely it was. A Micro takes some minutes a type, of one core.
"""

import argparse
import csv
import multiprocessing
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixture_of_tokens.conversion.llama_cpp import Engine
from mixture_of_tokens.conversion.to_gguf import write_gguf
from mixture_of_tokens.conversion.verify_gguf import questions_of
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.runs.loading import text_of
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.formatting import markdown

RESULTS = Path(__file__).resolve().parent / "rounding.csv"
TYPES = ("f32", "q8_0", "q4_0")


def nats(file: str, rows: list[list[int]], forced: int, vocab_size: int) -> float:
    """The mean over all but the first token of every row, by llama.cpp."""
    engine, total, count = Engine(file, len(rows[0]) + 1, 1), 0.0, 0
    for row in tqdm(rows, Path(file).stem, unit="row", leave=False, file=sys.stderr):
        for t in range(1, len(row)):
            said = engine.after(row[:t], row[t], 1)
            if said and said[0]["id"] == row[t]:
                total -= said[0]["logprob"]
            else:
                total -= engine.log_probabilities(row[:t], vocab_size, forced)[row[t]]
            count += 1
    return total / count


@torch.no_grad()
def expected(plain, rows: torch.Tensor) -> float:
    """The same by transformers."""
    found = [plain(part).logits.log_softmax(-1)[:, :-1].gather(-1, part[:, 1:, None]) for part in rows.split(16)]
    return -float(torch.cat(found).double().mean())


def measure(exported: str, run: str, tokens: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer, blocks = AutoTokenizer.from_pretrained(exported), text_of(run).validation
    number = min(len(blocks), -(-tokens // (blocks.context - 1)))
    spread = np.linspace(0, len(blocks) - 1, number).round().astype(int)  # over all of the text
    rows = blocks.batch(spread)["input_ids"]
    forced = questions_of(plain, tokenizer, rows[:1])["forced"]
    made = [
        ("transformers", expected(plain, rows), sum(path.stat().st_size for path in Path(exported).glob("*.safe*")))
    ]
    with TemporaryDirectory() as folder:
        for kind in TYPES:
            file = Path(folder) / f"{kind}.gguf"
            write_gguf(plain, tokenizer, file, kind, "model")
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # llama.cpp's server ends with its process
                loss = pool.apply(nats, (str(file), rows.tolist(), forced, plain.config.vocab_size))
            made.append((kind, loss, file.stat().st_size))
            print(made[-1], file=sys.stderr)
    where = {"tokens": rows[:, 1:].numel(), "commit": provenance.commit()}
    name = f"{read_run(Path(run)).facts.name}, as {type(plain).__name__}"
    new = [{"model": name, "type": kind, "loss": f"{loss:.6f}", "bytes": size} | where for kind, loss, size in made]
    old = list(csv.DictReader(RESULTS.read_text().splitlines())) if RESULTS.is_file() else []
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(row for row in old if row["model"] != name), *new])


def table() -> str:
    rows = list(csv.DictReader(RESULTS.read_text().splitlines()))
    lines = [["", "by", "loss", "beside transformers", "tokens", "MB"]]
    for row in rows:
        first = next(each for each in rows if each["model"] == row["model"])
        apart = f"{float(row['loss']) - float(first['loss']):+.5f}" if row is not first else ""
        by = row["type"] if row is first else f"llama.cpp, {row['type']}"
        lines.append(
            [
                row["model"],
                by,
                f"{float(row['loss']):.4f}",
                apart,
                f"{int(row['tokens']):,}",
                f"{int(row['bytes']) / 1e6:.1f}",
            ]
        )
    return markdown(lines, left=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", nargs="?")
    parser.add_argument("text_of", nargs="?")
    parser.add_argument("--tokens", type=int, default=65_000)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        measure(given.exported, given.text_of, given.tokens)
    print(table())
