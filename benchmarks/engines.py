"""The table of what `make test-engines` found in vLLM and llama.cpp: python benchmarks/engines.py --table"""

import argparse
import csv
from pathlib import Path

from mixture_of_tokens.utils.formatting import markdown

RESULTS = Path(__file__).resolve().parent / "engines.csv"
EXACT = ("vllm", "llama.cpp f32")


def table() -> str:
    """Largest difference of a log probability; "exact" where every top, greedy and line's token is alike as well."""
    with RESULTS.open(newline="") as file:
        rows = {(row["form"], row["engine"]): row for row in csv.DictReader(file)}
    head = ["", "vLLM", "llama.cpp, f32", "llama.cpp, q8_0: loss beside f32"]
    lines = [head]
    for form in dict.fromkeys(form for form, _ in rows):
        cells = [_exact(rows.get((form, engine))) for engine in EXACT]
        rounded = rows.get((form, "llama.cpp q8_0"))
        cells.append("" if rounded is None else f"{float(rounded['loss_apart']):+.4f}")
        lines.append([form, *cells])
    return markdown(lines)


def _exact(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    alike = row["top"] == row["positions"] and row["greedy"] == row["written"] and row["lines"] == "50"
    return f"{'exact' if alike else 'not exact'}, {float(row['difference']):.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the table (the default)")
    parser.parse_args()
    print(table())
