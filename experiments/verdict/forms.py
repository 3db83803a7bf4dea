"""How far each way to use a mixture ends above the best Token Choice: a table of docs/results/README.md.

    python experiments/verdict/forms.py --table

It trains nothing. Nanos are those of fresh.csv, after equal time, Micros those of ../paper, after equal steps; what is
trained as it is served is that of ../alone/runs.csv. All losses are of the whole validation text; but for "in groups"
each row is alone. Of what was tried, settings and rates, each way has the best by its mean, as Token Choice has.
Differences are means of the seeds that both have.
"""

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))

import early
from common import read_csv, script, signed
from studies import EXPERIMENT
from systems import BUDGET, LONG_BUDGET

from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.formatting import loss, markdown

HERE = Path(__file__).parent
Losses = dict[int, float]  # by seed
FORMS = {  # a pattern for the labels of fresh.csv, and the column
    "Token Choice": (r"S?TC-.*", "loss"),
    "the dense model": (r"Transformer-.*", "loss"),
    "in groups to the end": (r"MoT-.*, switched", "in_groups"),
    "the same, served alone": (r"MoT-.*, switched", "alone"),
    "turned into Token Choice at the end": (r"MoT-.*, switched", "loss"),
    "after a tenth": (r"MoT-.*, switched early(?!.*25%).*", "loss"),
    "after a quarter": (r"MoT-.*, switched early.*25%.*", "loss"),
}
MICROS = {"Token Choice": "*TC-Micro-*", "the dense model": "Transformer-Micro", "in groups to the end": "MoT-Micro-*"}
AS_SERVED = {"blend": "trained as it is served", "token": "the same, experts read the token itself"}


def best(tried: Iterable[Losses]) -> Losses:
    """The one of the lowest mean; nothing of nothing."""
    return min(tried, key=lambda losses: statistics.fmean(losses.values()), default={})


def by_settings(pairs: Iterable[tuple[object, int, float]]) -> list[Losses]:
    """Of settings, seeds and losses, the losses of each setting."""
    found: dict[object, Losses] = {}
    for settings, seed, value in pairs:
        found.setdefault(settings, {})[seed] = value
    return list(found.values())


def as_served(size: str, system: str, reads: str, steps: int | None = None) -> list[Losses]:
    """Of the long runs in the loop of ../alone, the one with this number of steps or any."""
    rows = [row for row in read_csv(HERE.parent / "alone" / "runs.csv") if row["validation"]]
    rows = [row for row in rows if row["name"].startswith(size) and (row["system"], row["reads"]) == (system, reads)]
    rows = [row for row in rows if steps in (None, int(row["steps"]))]
    return by_settings(((row["rate"], row["balance"]), int(row["seed"]), float(row["validation"])) for row in rows)


def nanos(budget: int) -> dict[str, Losses]:
    rows = [row for row in read_csv(HERE / "fresh.csv") if row["budget"] == str(budget)]
    found = {
        form: best(
            by_settings(
                (row["system"], int(row["seed"]), float(row[column]))
                for row in rows
                if re.fullmatch(pattern, row["system"])
            )
        )
        for form, (pattern, column) in FORMS.items()
    }
    if budget == BUDGET:
        found |= {form: best(as_served("Nano", "alone", reads)) for reads, form in AS_SERVED.items()}
    return found


def micros(steps: int) -> dict[str, Losses]:
    def kept(pattern: str) -> list[Losses]:
        files = EXPERIMENT.kept.glob(f"{pattern}{'' if pattern.endswith('-*') else '-'}{steps}-seed*.json")
        named = ((re.fullmatch(r"(.*)-seed(\d+)", file.stem), file) for file in files)
        return by_settings((m[1], int(m[2]), read_run(file).facts.final_loss) for m, file in named if m is not None)

    found = {form: kept(pattern) for form, pattern in MICROS.items()}
    found["Token Choice"] += as_served("Micro", "TC", "blend", steps)
    found |= {form: as_served("Micro", "alone", reads, steps) for reads, form in AS_SERVED.items()}
    switched = {seed: read_run(early.file_of(of, seed)).facts.final_loss for of, seed in early.RUNS if of == steps}
    found["after a quarter"] = [switched]
    if steps == early.SHORT:
        alone = read_csv(EXPERIMENT.kept / "alone.csv")
        found["the same, served alone"] = [{int(row["seed"]): float(row["alone"]) for row in alone}]
    return {form: best(filter(None, tried)) for form, tried in found.items()}


def table() -> str:
    columns: Mapping[str, Callable[[], dict[str, Losses]]] = {
        "Nano, 10 minutes": lambda: nanos(BUDGET),
        "Nano, 40 minutes": lambda: nanos(LONG_BUDGET),
        "Micro, 12 million tokens": lambda: micros(early.SHORT),
        "Micro, 25 million tokens": lambda: micros(2 * early.SHORT),
    }
    found = {title: of() for title, of in columns.items()}
    choice = {title: of["Token Choice"] for title, of in found.items()}
    rows = [["", *columns]]
    rows.append(
        ["Token Choice: loss", *(f"{loss(statistics.fmean(of.values()))} ({len(of)})" for of in choice.values())]
    )
    for form in [*list(FORMS)[1:], *AS_SERVED.values()]:
        cells = []
        for title, of in found.items():
            own, other = of.get(form, {}), choice[title]
            both = own.keys() & other.keys()
            over = statistics.fmean(own[seed] - other[seed] for seed in both) if both else None
            cells.append("" if over is None else f"{signed(over)} ({len(both)})")
        rows.append([form, *cells])
    return markdown(rows)


if __name__ == "__main__":
    script(__doc__, lambda: None, table)
