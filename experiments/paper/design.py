"""Design: none of five changes to the layer lowers the loss, at the default's FLOPs and rate.

    python experiments/paper/design.py            # what is missing of six Nanos; an hour of one core
    python experiments/paper/design.py --table    # the table of what is committed

Each row changes one thing of MoT-Nano/32E/8: all blocks sparse in place of the later half; groups of 16 with as many
experts, which are narrower then; first weights drawn three times as wide or as narrow; normalized mixtures; plain
experts with ReLU, the paper's. Peak rates are the defaults'; one seed. Expected: at the default's FLOPs, within 5 %,
none lowers the loss by more than 0.01. The paper has no table of it. What fills the empty rows of a group is studied in
`../partial_groups`, shared experts in `../routings`, the temperature in `temperature.py`.
"""

from nano import BASE, against, flops_of, row, signed, table_of
from studies import Said, Study, System, verdict

from mixture_of_tokens.settings.routings import MIXTURE

BETTER, MORE = 0.01, 1.05
EVERYWHERE = f"[{', '.join([MIXTURE.kind] * 4)}]"
CHANGES = (
    System(BASE.name, {"mlp_layer_types": EVERYWHERE}, title="all blocks"),
    System("MoT-Nano/16E/16"),
    System(BASE.name, {"initializer_scale": "1"}),
    System(BASE.name, {"initializer_scale": "0.1"}),
    System(BASE.name, {"normalize_mixture": "true"}),
    System(BASE.name, {"gated": "false", "hidden_act": "relu"}, title="plain experts"),
)


def says() -> Said | None:
    """Of the changes that cost what the default does."""
    rows = [row(system) for system in CHANGES]
    above = {
        each.system.label: found.mean
        for each in rows
        if (found := against(each, row(BASE))) is not None and flops_of(each) <= MORE * flops_of(row(BASE))
    }
    if not above:
        return None
    best = min(above, key=lambda label: above[label])
    measured = f"{signed(above[best])} with the best of {len(above)} changes ({best}), Nano, one seed"
    return [measured], verdict(above[best] >= -BETTER, in_part=False)


STUDY = Study(
    id="design",
    claim="None of five changes to the layer lowers the loss, at the default's FLOPs and rate (ours)",
    paper="no table of it",
    rows=[row(system) for system in (BASE, *CHANGES)],
    says=says,
    table=table_of,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
