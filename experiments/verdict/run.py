"""What one serves after equal training time: a dense model, Token Choice, or a Mixture of Tokens switched to it.

Superseded by `fresh.py`: here the text is read up to 20 times, and the switch is by fitted scales.

    python experiments/verdict/run.py           # 16 hours of one thread, as measured beside other work
    python experiments/verdict/run.py --time    # speeds, on an idle machine: a quarter of an hour
    python experiments/verdict/run.py --table   # Markdown, as in ../LOG.md

`--time` measures, in rounds that take every system in turn: milliseconds of a training step before and after the
switch, seconds of the fit at the switch, and what the export costs plain transformers at batch 1, for a row and for a
token written. It writes timings.csv. The medians say how many steps a budget holds, for each system its own whole
schedule; of a Mixture of Tokens' budget the fit and a tenth of its steps come after the switch. So what is trained may
train beside other work, or be stopped: the same command goes on. All is exported, and scored by plain transformers in
another process, each row alone, over the whole validation text. It writes results.csv:

    steps, after     before the switch, and after it
    loss             of the export
    in_training      the last mean loss of training
    in_groups        of a Mixture of Tokens before its switch, in full groups, over the whole validation text

Runs before a switch are not kept by themselves: their rows are the first ones of those after it. Relative to Token
Choice the converted model is at +0.11 nats at 2.5 minutes, at +0.016 at 10 and at -0.018 at 40.
"""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from mixture_of_tokens.convert.export import in_plain_transformers
from mixture_of_tokens.disk import write_text
from mixture_of_tokens.formatting import markdown
from mixture_of_tokens.loss import IGNORE
from mixture_of_tokens.runs.loading import text_of
from mixture_of_tokens.runs.run import Run, read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, after_switch, directory_of, keep, read_csv, script, spread, write_csv

SYSTEMS = ("Transformer-Nano", "TC-Nano/32E", "MoT-Nano/32E/8")
BUDGETS = (150, 600, 2400)  # seconds
SEEDS = (1, 2, 3)
ROUNDS = 2
TIMED_STEPS = 100
SHARE_AFTER = 0.1  # of the source's steps, after the switch
TIMINGS = ("system", "round", "step_ms", "step_after_ms", "fit_seconds", "row_ms", "token_ms")
RESULTS = ("system", "budget", "seed", "steps", "after", "loss", "in_training", "in_groups")
MEASURE = """
import statistics, sys, time
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
    subprocess.run([sys.executable, "-m", "mixture_of_tokens", *map(str, words)], check=True, stdout=sys.stderr)


def train(system: str, steps: int, seed: int, out: Path, *flags: str) -> None:
    mot("train", system, "--steps", steps, "--seed", seed, *row_flags(steps), "--device", "cpu", "--out", out, *flags)


def row_flags(steps: int) -> list[str]:
    rows = {"logging_steps": max(10, steps // 200), "eval_steps": max(100, steps // 40)}
    return [word for field, every in rows.items() for word in (f"--training.{field}", str(every))]


def switched(source: Path, steps: int, *flags: str) -> Path:
    out = source.with_name(f"{source.name}-switched")
    mot("transition", source, "--calibrate", "scales", "--steps", steps, "--device", "cpu", "--out", out, *flags)
    return out


def by_plain_transformers(what: str, run: Path) -> list[float]:
    """The loss of a run's export or its milliseconds, from a process that cannot import this package."""
    exported, text = run.with_name(f"{run.name}-exported"), run.with_name(f"{run.name}-text.safetensors")
    mot("export", run, exported, "--force")
    blocks = text_of(str(run)).validation
    batch = blocks.batch(np.arange(len(blocks)))
    save_file({"ids": batch["input_ids"].contiguous(), "labels": batch["shift_labels"].contiguous()}, text)
    printed = in_plain_transformers(MEASURE, what, str(exported), str(text), str(IGNORE))
    shutil.rmtree(exported)
    text.unlink()
    return [float(word) for word in printed.split()]


def step_ms(run: Run) -> float:
    """Of the second half of a run's rows, after a switch if there was one: the first is slower."""
    rows = run.rows if run.switch is None else after_switch(run, run.rows)
    middle, last = rows[len(rows) // 2], rows[-1]
    return 1000 * (last.seconds - middle.seconds) / (last.step - middle.step)


def time_system(system: str, number: int, trained: Path, steps: int = TIMED_STEPS) -> dict[str, object]:
    out = trained / directory_of(system, "timed", number)
    for earlier in (out, out.with_name(f"{out.name}-switched")):
        shutil.rmtree(earlier, ignore_errors=True)
    train(system, steps, number, out)
    each, after, fit = step_ms(read(out)), 0.0, 0.0
    if system.startswith("MoT"):
        out = switched(out, steps)
        run = read(out)
        assert run.switch is not None
        after, fit = step_ms(run), run.switch.fit_seconds or 0.0
    row, token = by_plain_transformers("milliseconds", out)
    values = (system, number, *(round(value, 3) for value in (each, after, fit, row, token)))
    return dict(zip(TIMINGS, values, strict=True))


def timings(kept: Path) -> dict[str, dict[str, list[float]]]:
    """By system, of every round."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in read_csv(kept / "timings.csv"):
        for key in TIMINGS[2:]:
            found.setdefault(row["system"], {}).setdefault(key, []).append(float(row[key]))
    return found


def steps_within(budget: float, rounds: dict[str, list[float]]) -> tuple[int, int]:
    """Steps that fit into the seconds by the medians of the rounds, and those after the switch."""
    timing = {key: statistics.median(values) for key, values in rounds.items()}
    if not timing["step_after_ms"]:
        return int(1000 * budget / timing["step_ms"]), 0
    each = timing["step_ms"] + SHARE_AFTER * timing["step_after_ms"]
    steps = int(1000 * (budget - timing["fit_seconds"]) / each)
    return steps, round(SHARE_AFTER * steps)


def scored(system: str, budget: int, seed: int, trained: Path, steps: int, after: int) -> Run:
    """The run whose export is scored, and beside it its loss, loss.txt."""
    out = trained / directory_of(system, f"{budget}s", f"seed{seed}")
    train(system, steps, seed, out, "--resume")
    if after:
        out = switched(out, after, "--resume")
    if not (out / "loss.txt").is_file():
        (found,) = by_plain_transformers("loss", out)
        write_text(out / "loss.txt", f"{found}\n")  # whole or not at all
    return read(out)


def result(system: str, budget: int, run: Run, of_export: float, source: Run | None) -> dict[str, object]:
    before = run.config.steps if run.switch is None else run.switch.step
    in_training = [row.train_loss for row in run.rows if row.train_loss is not None][-1]
    in_groups = "" if source is None else source.facts.final_loss
    values = (system, budget, run.seed, before, run.facts.steps - before, of_export, in_training, in_groups)
    return dict(zip(RESULTS, values, strict=True))


def make(experiment: Experiment) -> None:
    kept, trained = experiment
    runs, results = [], []
    for budget in BUDGETS:
        for seed in SEEDS:
            for system in SYSTEMS:
                steps, after = steps_within(budget, timings(kept)[system])
                run = scored(system, budget, seed, trained, steps, after)
                of_export = float((run.directory / "loss.txt").read_text())
                source = read(run.directory.with_name(run.directory.name.removesuffix("-switched"))) if after else None
                results.append(result(system, budget, run, of_export, source))
                runs.append(run)
    keep(runs, kept)
    write_csv(kept / "results.csv", RESULTS, results)


def table(kept: Path) -> str:
    found = read_csv(kept / "results.csv")
    budgets = list(dict.fromkeys(row["budget"] for row in found))
    rows = [["", "", *(f"{float(budget) / 60:g} min" for budget in budgets), "ms a row", "ms a token"]]
    for system, rounds in timings(kept).items():
        cells: list[list[str]] = [[], [], []]
        for budget in budgets:
            own = [row for row in found if (row["system"], row["budget"]) == (system, budget)]
            if own:
                cells[0].append(spread(row["loss"] for row in own))
                cells[1].append(spread(row["in_training"] for row in own))
                cells[2].append(steps_of(kept, own))
        label = f"{system}, switched" if any(rounds["step_after_ms"]) else system
        milliseconds = [spread(rounds[key], lambda value: f"{value:.1f}") for key in ("row_ms", "token_ms")]
        rows.append([label, "loss", *cells[0], *milliseconds])
        rows.append(["", "in training", *cells[1], "", ""])
        rows.append(["", "steps (times the text)", *cells[2], "", ""])
    return markdown(rows, left=2)


def steps_of(kept: Path, own: Sequence[dict[str, str]]) -> str:
    """Of the seeds of a system and a budget: steps, and how often they read the text."""
    counts = {" + ".join(f"{int(row[key]):,}" for key in ("steps", "after") if int(row[key])) for row in own}
    facts = [read(kept / name_of(row)).facts for row in own]
    often = {f"{each.tokens / each.corpus['train']['tokens']:.1f}" for each in facts}
    return f"{' or '.join(sorted(counts))} ({' or '.join(sorted(often))})"


def name_of(row: dict[str, str]) -> str:
    """Of the run of a row of results.csv."""
    after = "switched" if int(row["after"]) else ""
    return directory_of(row["system"], f"{row['budget']}s", f"seed{row['seed']}", after)


def timed(experiment: Experiment) -> None:
    rows = [time_system(system, number, experiment.trained) for number in range(ROUNDS) for system in SYSTEMS]
    write_csv(experiment.kept / "timings.csv", TIMINGS, rows)


if __name__ == "__main__":
    experiment = Experiment.named("verdict")
    times = ("measure speeds on an idle machine", lambda: timed(experiment))
    script(__doc__, lambda: make(experiment), lambda: table(experiment.kept), time=times)
