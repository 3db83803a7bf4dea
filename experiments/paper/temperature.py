"""Temperature: learned, it sharpens the router's weights and hurts the loss.

    python experiments/paper/temperature.py            # what is missing of eight Nanos; forty minutes of one core
    python experiments/paper/temperature.py --table    # the table of what is committed

Mixtures of Tokens whose temperature is fixed, learned from the same start, or annealed: at 0.25, Nano's own, and at 1,
the authors'. Expected: learned ones have a lower entropy of the mixtures, and a higher loss. The authors' blog post:
4.0441 learned against 3.7672 fixed at about 100,000 steps of a Mini; entropy of its four layers, 1 being even, 0.827,
0.412, 0.024 and 0.058 learned, 0.946, 0.644, 0.351 and 0.282 fixed. One rate for all of them, which was swept at 0.25.
"""

import statistics

from nano import BASE, against, last_measured, losses_of, row, signed, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Study, System

LEARNED = {"learnable_temperature": "true"}
FIXED_AT = {"0.25": BASE, "1": System(BASE.name, {"router_temperature": "1"})}
LEARNED_FROM = {at: System(BASE.name, {**fixed.model, **LEARNED}) for at, fixed in FIXED_AT.items()}
ANNEALED = System(BASE.name, {"router_temperature": "0.5"}, anneal_temperature_to=0.125)
SYSTEMS = (FIXED_AT["0.25"], LEARNED_FROM["0.25"], FIXED_AT["1"], LEARNED_FROM["1"], ANNEALED)


def entropy(system: System) -> list[float]:
    return last_measured(system, "mixture_entropy")


def says() -> tuple[str, str] | None:
    told, worse, sharper = [], [], []
    for at, fixed in FIXED_AT.items():
        learned = LEARNED_FROM[at]
        if not losses_of(fixed) or not losses_of(learned):
            return None
        above = against(learned, fixed)
        assert above is not None
        before, after = statistics.mean(entropy(fixed)), statistics.mean(entropy(learned))
        told.append(
            f"learned from {at}: loss {signed(above.mean)}, mean entropy {before:.2f} fixed, {after:.2f} learned"
        )
        worse.append(above.least > 0)
        sharper.append(after < before)
    if all(worse) and all(sharper):
        return "; ".join(told), CONFIRMED
    return "; ".join(told), NOT_HERE if any(worse) else CONTRADICTED


STUDY = Study(
    id="temperature",
    claim="A learned temperature sharpens routing and hurts",
    paper="loss +0.277; mean entropy 0.56 fixed, 0.33 learned (Mini, 100,000 steps)",
    rows=[row(system) for system in SYSTEMS],
    says=says,
    table=lambda rows: table_of(
        rows, {"entropy of a mixture, by layer": lambda system: ", ".join(f"{each:.2f}" for each in entropy(system))}
    ),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
