"""Table 3: mixtures do better downstream than the dense model.

    python experiments/paper/table3.py            # what is missing, with lm_eval on the path; an hour of one core
    python experiments/paper/table3.py --hub      # the authors' tasks, PIQA, HellaSwag and ARC-e, from the Hub
    python experiments/paper/table3.py --table    # the table of what is committed

Scored by lm-evaluation-harness, as it is, on Nanos and on figure 7's longest Micros (two hours each where their weights
are not in runs/), exported to plain transformers; a Mixture of Tokens is switched to Token Choice for that (`mot
export`). Install the harness into an environment of its own (`pip install
"lm-eval[hf]"`), since installed packages are the text of other scripts here, and put its `lm_eval` on the path.

Two tasks for each size are made of 2,000 places each in its validation text, without empty lines and those of more than
40 characters: which of four lines comes next, and which of four names of the text ends a line. Chance is 0.25.
Expected: all mixtures do better than the dense model in both tasks, by two standard errors of the difference. The
paper: MoT-Medium/32E/16 and /32E do better than the dense model in PIQA, HellaSwag and ARC-e (others' description of
its table 3; values not available). One seed.
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import micro
import nano
import numpy as np
from studies import DISTIL_STEPS, EXPERIMENT, FIRST_SEEDS, Row, Said, Study, System, verdict, with_weights

from mixture_of_tokens import export
from mixture_of_tokens.runs.loading import load_tokenizer_of, text_of
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import MIXTURE
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import read_csv, script, signed, write_csv

# By size, the dense model first.
ROWS = {
    "Nano": [nano.row(system) for system in (nano.DENSE, System("MoT-Nano/32E"), System("MoT-Nano/32E/4"))],
    "Micro": [Row(system, micro.LENGTHS[-1], (FIRST_SEEDS["Micro"],)) for system in (micro.DENSE, micro.BEST_MIXTURE)],
}
TASKS = {"next_line": "next line", "last_name": "last name of a line"}
HUB_TASKS = ("piqa", "hellaswag", "arc_easy")
PLACES, CHOICES, LINES = 2000, 4, 2  # of a task; of a place; of text before it
LONGEST = 40  # characters of a line
SCORES = EXPERIMENT.kept / "table3.csv"
TASK = {
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def next_lines(documents: Sequence[list[str]], draw: random.Random) -> list[dict[str, object]]:
    """Places in other documents give the wrong lines."""
    places = []
    while len(places) < PLACES:
        first, *others = draw.sample(documents, CHOICES)
        at = draw.randrange(LINES, len(first))
        choices = [first[at], *(draw.choice(other) for other in others)]
        if len(set(choices)) == CHOICES:
            places.append(_place("\n".join(first[at - LINES : at]) + "\n", choices, draw))
    return places


def last_names(documents: Sequence[list[str]], draw: random.Random) -> list[dict[str, object]]:
    """The lines before give the wrong names."""
    places = []
    while len(places) < PLACES:
        document = draw.choice(documents)
        at = draw.randrange(LINES, len(document))
        before, line = document[at - LINES : at], document[at]
        end = re.search(r"[A-Za-z_]{3,}(?=\W*$)", line)
        if end is None:
            continue
        names = sorted(set(re.findall(r"[A-Za-z_]{3,}", "\n".join(before))) - {end.group()})
        if len(names) >= CHOICES - 1:
            choices = [end.group(), *draw.sample(names, CHOICES - 1)]
            places.append(_place("\n".join([*before, line[: end.start()]]), choices, draw))
    return places


def _place(context: str, choices: Sequence[str], draw: random.Random) -> dict[str, object]:
    """The first choice is the right one, and is put among the others."""
    order = draw.sample(range(len(choices)), len(choices))
    return {"context": context, "choices": [choices[i] for i in order], "answer": order.index(0)}


def write_tasks(run: Path, folder: Path) -> None:
    """The tasks as files of the harness, made of a run's validation text."""
    text, tokenizer = text_of(str(run)).validation, load_tokenizer_of(str(run))
    begins = [0, *text.ends[:-1]]
    documents = []
    for begin, end in zip(begins, text.ends, strict=True):
        lines = [line for line in tokenizer.decode(text.tokens[np.arange(begin, end - 1)]).splitlines() if line.strip()]
        documents.append([line for line in lines if len(line) <= LONGEST])
    documents = [lines for lines in documents if len(lines) > LINES]
    for name, made in {"next_line": next_lines, "last_name": last_names}.items():
        places = folder / f"{name}.jsonl"
        places.write_text("".join(json.dumps(place) + "\n" for place in made(documents, random.Random(0))))
        task = {"task": name, **TASK, "dataset_kwargs": {"data_files": {"test": str(places.resolve())}}}
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML


def scores_of(directory: Path, tasks: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """What the harness finds for a checkpoint, by task. Raises SystemExit where it is not installed."""
    harness = shutil.which("lm_eval")
    if harness is None:
        sys.exit('table3.py: there is no lm_eval on the path: pip install "lm-eval[hf]" into an environment of its own')
    out = folder / "harness" / directory.name
    model = f"pretrained={directory},dtype=float32"
    command = [harness, "--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "32"]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--output_path", str(out)]
    subprocess.run(command, check=True)
    newest = max(out.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["results"]


def make(tasks: Sequence[str]) -> None:
    """Score what is not scored yet, exported and, where its weights are not in runs/, trained before."""
    rows: list[dict[str, Any]] = list(read_csv(SCORES))
    for size, (system, steps, (seed,)) in ((size, row) for size, its in ROWS.items() for row in its):
        missing = [task for task in tasks if (system.label, task) not in {(row["system"], row["task"]) for row in rows}]
        if not missing:
            continue
        run = with_weights(system, steps, seed)
        folder = EXPERIMENT.trained / "table3" / size
        folder.mkdir(parents=True, exist_ok=True)
        exported = folder / f"{run.name}-exported"
        if not exported.exists():
            mixture = parse_name(system.name).routing is MIXTURE
            export(str(run), exported, **({"distil_steps": DISTIL_STEPS} if mixture else {}))
        write_tasks(run, folder)
        for task, found in scores_of(exported, missing, folder).items():
            row = {"system": system.label, "task": task, "accuracy": found["acc,none"]}
            rows.append(row | {"standard_error": found["acc_stderr,none"]})
        write_csv(SCORES, list(rows[0]), rows)


def accuracies() -> dict[str, dict[str, tuple[float, float]]]:
    """Accuracy and its standard error, by system and task."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in read_csv(SCORES):
        found.setdefault(row["system"], {})[row["task"]] = (float(row["accuracy"]), float(row["standard_error"]))
    return found


def says() -> Said | None:
    found = accuracies()
    if any(task not in found.get(row.system.label, {}) for rows in ROWS.values() for row in rows for task in TASKS):
        return None
    told, better = [], []
    for size, rows in ROWS.items():
        for task, title in TASKS.items():
            dense, *mixtures = [found[row.system.label][task] for row in rows]
            told.append(f"{size}, {title}: {' and '.join(signed(each[0] - dense[0]) for each in mixtures)}")
            better += [(each[0] - dense[0]) / math.hypot(each[1], dense[1]) for each in mixtures]
    return told, verdict(min(better) > 2, in_part=min(better) > -2 and max(better) > 2)


def table_of(_: object = ()) -> str:
    found = accuracies()
    tasks = [task for task in (*TASKS, *HUB_TASKS) if any(task in of for of in found.values())] or list(TASKS)
    rows = [["accuracy (standard error)", *(TASKS.get(task, task) for task in tasks)]]
    for label, of in found.items():
        cells = [f"{of[task][0]:.3f} ({of[task][1]:.3f})" if task in of else "" for task in tasks]
        rows.append([label, *cells])
    return markdown(rows)


STUDY = Study(
    id="table3",
    claim="Mixtures do better downstream than the dense model",
    paper="so for MoT-Medium/32E/16 and /32E in PIQA, HellaSwag, ARC-e",
    says=says,
    table=table_of,
    heading="accuracy, over the dense model",
)


if __name__ == "__main__":
    hub = ("score the authors' tasks too, which are read from the Hub", lambda: make([*TASKS, *HUB_TASKS]))
    script(__doc__, lambda: make(list(TASKS)), table_of, hub=hub)
