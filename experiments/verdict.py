"""What one serves after equal training time: a dense model, Token Choice, or a Mixture of Tokens switched to it.

    python experiments/verdict.py --seconds 600,1200,2400 --seeds 1,2,3 --out runs/verdict    # a day on two cores
    python experiments/verdict.py --table runs/verdict/verdict.csv                            # Markdown

On a quiet machine. A short run of each system first gives its seconds a step, and so the steps that a budget holds, for
each its own whole schedule; of a Mixture of Tokens' budget as much is left as a tenth of its steps takes after the
switch. All that is trained is exported, and scored by plain transformers in another process, each row alone: loss over
the whole validation text, milliseconds of a forward pass over one row, and of a token written at batch 1. The same
command goes on where it was stopped.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from mixture_of_tokens import cli
from mixture_of_tokens.loading import text_of
from mixture_of_tokens.loss import IGNORE
from mixture_of_tokens.words import with_spread

SYSTEMS = ("Transformer-Nano", "TC-Nano/32E", "MoT-Nano/32E", "MoT-Nano/32E/8")
TIMED_STEPS = 100
SHARE_AFTER = 0.1  # of the source's steps, after the switch
COLUMNS = ("system", "budget", "seed", "steps", "seconds", "loss", "row_ms", "token_ms")

SCORE = """
import sys, time
sys.modules["mixture_of_tokens"] = None
import statistics, torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
directory, given, ignore = sys.argv[1], load_file(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(directory).eval()
nats, count = 0.0, 0
with torch.inference_mode():
    for ids, labels in zip(given["ids"].split(32), given["labels"].split(32)):
        logits = model(ids, use_cache=False).logits.flatten(0, 1)
        nats += float(F.cross_entropy(logits, labels.flatten(), ignore_index=ignore, reduction="sum"))
        count += int((labels != ignore).sum())
    def median(call, times=15):
        seconds = []
        for _ in range(times):
            start = time.perf_counter(); call(); seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds)
    row, new = given["ids"][:1], given["ids"].shape[1] // 2
    written = lambda: model.generate(row[:, :4], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    print(nats / count, median(lambda: model(row, use_cache=False)), median(written) / new)
"""


def mot(*words: object) -> None:
    cli.main([str(word) for word in words])


def directory_of(out: Path, system: str, *parts: object) -> Path:
    return out / "-".join([system.replace("/", "-"), *map(str, parts)])


def train(system: str, steps: int, seed: int, out: Path) -> Path:
    mot("train", system, "--steps", steps, "--seed", seed, "--out", out, "--resume")
    return out


def switched(source: Path, steps: int) -> Path:
    out = source.with_name(f"{source.name}-switched")
    mot("transition", source, "--steps", steps, "--out", out, "--resume")
    return out


def seconds_a_step(run: Path, first: int = 0) -> float:
    """Of the second half of a run's rows: the first is slower."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > first]
    middle, last = rows[len(rows) // 2], rows[-1]
    return (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])


def steps_within(budget: float, system: str, out: Path) -> tuple[int, int]:
    """Steps of the system, and after the switch."""
    timed = train(system, TIMED_STEPS, 0, directory_of(out, system, "timed"))
    each = seconds_a_step(timed)
    if not system.startswith("MoT"):
        return int(budget / each), 0
    after = seconds_a_step(switched(timed, TIMED_STEPS), first=TIMED_STEPS)
    steps = int(budget / (each + SHARE_AFTER * after))
    return steps, round(SHARE_AFTER * steps)


def score(run: Path) -> tuple[float, float, float]:
    """Loss of a run's export, each row alone, and its milliseconds for a row and for a token."""
    exported, given = run.with_name(f"{run.name}-exported"), run.with_name(f"{run.name}-given.safetensors")
    mot("export", run, exported, "--force")
    blocks = text_of(str(run)).validation
    batch = blocks.batch(np.arange(len(blocks)))
    save_file({"ids": batch["input_ids"].contiguous(), "labels": batch["shift_labels"].contiguous()}, given)
    command = [sys.executable, "-c", SCORE, str(exported), str(given), str(IGNORE)]
    loss, row, token = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-3:]
    given.unlink()
    return float(loss), float(row), float(token)


def verdict(system: str, budget: float, seed: int, out: Path) -> dict[str, object]:
    steps, after = steps_within(budget, system, out)
    run = train(system, steps, seed, directory_of(out, system, f"{budget:g}s", f"seed{seed}"))
    if after:
        run = switched(run, after)
    loss, row, token = score(run)
    seconds = json.loads((run / "run.json").read_text())["seconds"]
    label = f"{system}, switched" if after else system
    values = (label, budget, seed, steps + after, seconds, round(loss, 5), round(row, 3), round(token, 3))
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: list[dict[str, str]]) -> str:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    lines = [["", *(f"{float(budget):g} s" for budget in budgets), "ms a row", "ms a token"]]
    lines.append(["---", *["---:"] * (len(budgets) + 2)])
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        cells = []
        for budget in budgets:
            losses = [float(row["loss"]) for row in own if row["budget"] == budget]
            summary = {"mean": np.mean(losses), "least": min(losses), "greatest": max(losses), "seeds": len(losses)}
            cells.append(with_spread(summary, lambda loss: f"{loss:.3f}"))
        times = [f"{np.median([float(row[key]) for row in own]):.1f}" for key in ("row_ms", "token_ms")]
        lines.append([system, *cells, *times])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", default="600,1200,2400", help="training time of a model, budgets")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--out", type=Path, default=Path("runs/verdict"))
    parser.add_argument("--table", type=Path, help="print a CSV of this script as Markdown, and stop")
    given = parser.parse_args()
    if given.table is not None:
        with given.table.open() as file:
            print(table(list(csv.DictReader(file))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "verdict.csv"
    with results.open("w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in given.seeds.split(","):
            for budget in given.seconds.split(","):
                for system in given.systems.split(","):
                    writer.writerow(verdict(system, float(budget), int(seed), given.out))
                    file.flush()
    print(f"Everything is in {results}", file=sys.stderr)


if __name__ == "__main__":
    main()
