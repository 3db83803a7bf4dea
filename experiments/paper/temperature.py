"""Temperature: learned, it sharpens the router's weights and hurts the loss.

    python experiments/paper/temperature.py            # what is missing of four Nanos; half an hour of one core
    python experiments/paper/temperature.py --table    # the table of what is committed

The temperature is fixed at 0.25 (Nano's default) or at 1 (the authors'), or learned from one of these; one more model
was annealed from 0.5 to 0.125 (--anneal-temperature-to, which commit 8112891 was the last to have). Expected: where it
is learned, mixtures have a lower entropy, and the loss is higher. The authors' blog post: loss 4.0441 learned, 3.7672
fixed after about 100,000 steps of a Mini; entropy of its four layers, 1 being even, 0.827, 0.412, 0.024 and 0.058
learned, 0.946, 0.644, 0.351 and 0.282 fixed. One peak rate for all, which was swept at 0.25; one seed.
"""

import statistics

from nano import BASE, against, last_measured, row, signed, table_of
from studies import Said, Study, System, verdict

LEARNED = {"learnable_temperature": "true"}
FIXED_AT = {"0.25": BASE, "1": System(BASE.name, {"router_temperature": "1"})}
LEARNED_FROM = {at: System(BASE.name, {**fixed.model, **LEARNED}) for at, fixed in FIXED_AT.items()}
ANNEALED = System(BASE.name, {"router_temperature": "0.5"}, retired={"anneal_temperature_to": 0.125})
SYSTEMS = (FIXED_AT["0.25"], LEARNED_FROM["0.25"], FIXED_AT["1"], LEARNED_FROM["1"], ANNEALED)


def entropy(system: System) -> list[float]:
    return last_measured(system, "mixture_entropy")


def says() -> Said | None:
    told, as_claimed = [], []
    for at, fixed in FIXED_AT.items():
        learned = LEARNED_FROM[at]
        above = against(row(learned), row(fixed))
        if above is None:
            continue
        before, after = statistics.mean(entropy(fixed)), statistics.mean(entropy(learned))
        told.append(f"from {at}: loss {signed(above.mean)}, mean entropy {before:.2f} fixed, {after:.2f} learned")
        as_claimed.append((above.mean > 0, after < before))
    if not told:
        return None
    return told, verdict(all(map(all, as_claimed)), in_part=any(map(all, as_claimed)))


STUDY = Study(
    id="temperature",
    claim="A learned temperature sharpens routing and hurts",
    paper="loss 3.7672 fixed, 4.0441 learned (Mini, about 100,000 steps); mean entropy of the layers 0.56, 0.33",
    rows=[row(system) for system in SYSTEMS],
    says=says,
    table=lambda rows: table_of(
        rows, {"entropy of a mixture, by layer": lambda system: ", ".join(f"{each:.2f}" for each in entropy(system))}
    ),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
