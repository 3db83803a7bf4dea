"""What one serves after equal training time: a dense model, Token Choice, or a Mixture of Tokens switched to it.

    python experiments/verdict.py --time 3 --out experiments/verdict     # a quarter of an hour, idle machine
    python experiments/verdict.py --seconds 150,600,2400 --seeds 1,2,3 --out experiments/verdict    # a day on two cores
    python experiments/verdict.py --table --out experiments/verdict      # Markdown, in a second

`--time` measures, in rounds that take every system in turn: milliseconds of a training step before and after the
switch, seconds of the fit at the switch, and what the export costs plain transformers at batch 1, for a row and for a
token written. It writes `timings.csv`. The medians say how many steps a budget holds, for each system its own whole
schedule; of a Mixture of Tokens' budget the fit and a tenth of its steps come after the switch. So what is trained may
train beside other work, or be stopped: the same command goes on. All is exported, and scored by plain transformers in
another process, each row alone, over the whole validation text.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from mixture_of_tokens.formatting import with_spread
from mixture_of_tokens.loss import IGNORE
from mixture_of_tokens.reports.comparison import summary
from mixture_of_tokens.runs.loading import text_of

SYSTEMS = ("Transformer-Nano", "TC-Nano/32E", "MoT-Nano/32E", "MoT-Nano/32E/8")
TIMED_STEPS = 100
SHARE_AFTER = 0.1  # of the source's steps, after the switch
TIMINGS = ("system", "round", "step_ms", "step_after_ms", "fit_seconds", "row_ms", "token_ms")
PLAIN_TRANSFORMERS = """
import statistics, sys, time
sys.modules["mixture_of_tokens"] = None
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
what, directory, text, ignore = sys.argv[1], sys.argv[2], load_file(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(directory).eval()

def median_ms(call, times=15):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)

with torch.inference_mode():
    if what == "loss":
        nats = 0.0
        for ids, labels in zip(text["ids"].split(32), text["labels"].split(32)):
            logits = model(ids, use_cache=False).logits.flatten(0, 1)
            nats += float(F.cross_entropy(logits, labels.flatten(), ignore_index=ignore, reduction="sum"))
        print(nats / int((text["labels"] != ignore).sum()))
    else:
        row, new = text["ids"][:1], text["ids"].shape[1] // 2
        written = lambda: model.generate(row[:, :4], max_new_tokens=new, min_new_tokens=new, do_sample=False)
        print(median_ms(lambda: model(row, use_cache=False)), median_ms(written) / new)
"""


def mot(*words: object) -> None:
    """In a process of its own, as it is used, so that no earlier model's memory has a part in its speed."""
    subprocess.run([sys.executable, "-m", "mixture_of_tokens", *map(str, words)], check=True)


def directory_of(out: Path, system: str, *parts: object) -> Path:
    return out / "-".join([system.replace("/", "-"), *map(str, parts)])


def train(system: str, steps: int, seed: int, out: Path, *flags: str) -> Path:
    rows = ("--training.logging_steps", max(10, steps // 200), "--training.eval_steps", max(100, steps // 40))
    mot("train", system, "--steps", steps, "--seed", seed, *rows, "--out", out, *flags)
    return out


def switched(source: Path, steps: int, *flags: str) -> Path:
    out = source.with_name(f"{source.name}-switched")
    mot("transition", source, "--steps", steps, "--out", out, *flags)
    return out


def by_plain_transformers(what: str, run: Path) -> list[float]:
    """The loss of a run's export or its milliseconds, from a process that cannot import this package."""
    exported, text = run.with_name(f"{run.name}-exported"), run.with_name(f"{run.name}-text.safetensors")
    mot("export", run, exported, "--force")
    blocks = text_of(str(run)).validation
    batch = blocks.batch(np.arange(len(blocks)))
    save_file({"ids": batch["input_ids"].contiguous(), "labels": batch["shift_labels"].contiguous()}, text)
    command = [sys.executable, "-c", PLAIN_TRANSFORMERS, what, str(exported), str(text), str(IGNORE)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    shutil.rmtree(exported)
    text.unlink()
    return [float(word) for word in printed.split()]


def step_ms(run: Path, first: int = 0) -> float:
    """Of the second half of a run's rows: the first is slower."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > first]
    middle, last = rows[len(rows) // 2], rows[-1]
    return 1000 * (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])


def time_system(system: str, number: int, out: Path) -> dict[str, object]:
    run = directory_of(out, system, "timed", number)
    for earlier in (run, run.with_name(f"{run.name}-switched")):
        shutil.rmtree(earlier, ignore_errors=True)
    train(system, TIMED_STEPS, number, run)
    each, after, fit = step_ms(run), 0.0, 0.0
    if system.startswith("MoT"):
        run = switched(run, TIMED_STEPS)
        after, fit = step_ms(run, first=TIMED_STEPS), json.loads((run / "switch.json").read_text())["fit_seconds"]
    row, token = by_plain_transformers("milliseconds", run)
    values = (system, number, *(round(value, 3) for value in (each, after, fit, row, token)))
    return dict(zip(TIMINGS, values, strict=True))


def timings(out: Path) -> dict[str, dict[str, list[float]]]:
    """By system, of every round."""
    with (out / "timings.csv").open() as file:
        rows = list(csv.DictReader(file))
    of = {system: [row for row in rows if row["system"] == system] for system in SYSTEMS}
    return {system: {key: [float(row[key]) for row in own] for key in TIMINGS[2:]} for system, own in of.items() if own}


def steps_within(budget: float, rounds: dict[str, list[float]]) -> tuple[int, int]:
    """Steps that fit into the seconds by the medians of the rounds, and those after the switch."""
    timing = {key: statistics.median(values) for key, values in rounds.items()}
    if not timing["step_after_ms"]:
        return int(1000 * budget / timing["step_ms"]), 0
    each = timing["step_ms"] + SHARE_AFTER * timing["step_after_ms"]
    steps = int(1000 * (budget - timing["fit_seconds"]) / each)
    return steps, round(SHARE_AFTER * steps)


def verdict(system: str, budget: float, seed: int, out: Path) -> None:
    steps, after = steps_within(budget, timings(out)[system])
    run = directory_of(out, system, f"{budget:g}s", f"seed{seed}")
    final = run.with_name(f"{run.name}-switched") if after else run
    if (final / "verdict.json").exists():
        return
    train(system, steps, seed, run, "--resume")
    if after:
        switched(run, after, "--resume")
    (loss,) = by_plain_transformers("loss", final)
    facts = {"system": system, "budget": budget, "seed": seed, "steps": steps, "after": after, "loss": loss}
    (final / "verdict.json").write_text(json.dumps(facts, indent=2) + "\n")


def spread(values: dict[str, float] | None, form: str) -> str:
    return "" if values is None else with_spread(values, form.format)


def read(run: Path) -> dict:
    """The facts of a run that was scored, its last loss in training, and how often it read its text."""
    facts, whole = (json.loads((run / name).read_text()) for name in ("verdict.json", "run.json"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    in_training = [row["train_loss"] for row in rows if "train_loss" in row][-1]
    return facts | {"in_training": in_training, "readings": whole["tokens"] / whole["corpus"]["train"]["tokens"]}


def table(out: Path) -> str:
    found = [read(path.parent) for path in out.glob("*/verdict.json")]
    budgets = sorted({facts["budget"] for facts in found})
    lines = [["", "", *(f"{budget / 60:g} min" for budget in budgets), "ms a row", "ms a token"]]
    lines.append(["---", "---", *["---:"] * (len(budgets) + 2)])
    scored = {facts["system"] for facts in found}
    for system, rounds in timings(out).items():
        if system not in scored:
            continue
        losses, in_training, steps = [], [], []
        for budget in budgets:
            own = [facts for facts in found if (facts["system"], facts["budget"]) == (system, budget)]
            losses.append(spread(summary(facts["loss"] for facts in own), "{:.3f}"))
            in_training.append(spread(summary(facts["in_training"] for facts in own), "{:.3f}"))
            counts = {" + ".join(f"{facts[key]:,}" for key in ("steps", "after") if facts[key]) for facts in own}
            often = sorted({f"{facts['readings']:.1f}" for facts in own})
            steps.append(f"{' or '.join(sorted(counts))} ({' or '.join(often)})" if own else "")
        label = f"{system}, switched" if any(rounds["step_after_ms"]) else system
        milliseconds = [spread(summary(rounds[key]), "{:.1f}") for key in ("row_ms", "token_ms")]
        lines.append([label, "loss", *losses, *milliseconds])
        lines.append(["", "in training", *in_training, "", ""])
        lines.append(["", "steps (times the text)", *steps, "", ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/verdict"))
    parser.add_argument("--time", type=int, metavar="ROUNDS", help="measure speeds on an idle machine, and stop")
    parser.add_argument("--table", action="store_true", help="print what has been scored as Markdown, and stop")
    parser.add_argument("--seconds", default="150,600,2400", help="training time of a model, budgets")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    given = parser.parse_args()
    systems = given.systems.split(",")
    if given.table:
        print(table(given.out))
    elif given.time is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        rows = [time_system(system, number, given.out) for number in range(given.time) for system in systems]
        file = given.out / "timings.csv"
        if file.is_file():  # those of other systems stay
            with file.open() as before:
                rows = [row for row in csv.DictReader(before) if row["system"] not in systems] + rows
        with file.open("w") as after:
            writer = csv.DictWriter(after, TIMINGS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        for budget in given.seconds.split(","):
            for seed in given.seeds.split(","):
                for system in systems:
                    verdict(system, float(budget), int(seed), given.out)
        print(f"Everything is in {given.out}; --table prints it", file=sys.stderr)


if __name__ == "__main__":
    main()
