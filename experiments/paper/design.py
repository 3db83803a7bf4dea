"""Design: no other choice of the layer's is better than the defaults.

    python experiments/paper/design.py            # what is missing of eighteen Nanos; an hour and a half of one core
    python experiments/paper/design.py --table    # the table of what is committed

Each row changes one thing of MoT-Nano/32E/8: all blocks sparse in place of the later half; groups of 16 and of 64 with
as many experts, which are narrower or wider then; first weights drawn three times as wide or as narrow; normalized
mixtures; plain experts with ReLU, the paper's; twice and half the temperature. Peak rates are the defaults'. Expected:
none lowers the loss by more than 0.01 at the default's FLOPs. The paper has no table of it. What stands for the rows
that a group lacks has a study of its own (`../partial_groups`), shared experts too (`../routings`).
"""

from nano import BASE, against, losses_of, row, run_named, signed, table_of
from studies import CONFIRMED, CONTRADICTED, Study, System

from mixture_of_tokens.formatting import ratio
from mixture_of_tokens.model.routings import MIXTURE

BETTER = 0.01
EVERYWHERE = f"[{', '.join([MIXTURE.kind] * 4)}]"
CHANGES = (
    System(BASE.name, {"mlp_layer_types": EVERYWHERE}, title="all blocks"),
    System("MoT-Nano/16E/16"),
    System("MoT-Nano/64E/4"),
    System(BASE.name, {"initializer_scale": "1"}),
    System(BASE.name, {"initializer_scale": "0.1"}),
    System(BASE.name, {"normalize_mixture": "true"}),
    System(BASE.name, {"gated": "false", "hidden_act": "relu"}, title="plain experts"),
    System(BASE.name, {"router_temperature": "0.5"}),
    System(BASE.name, {"router_temperature": "0.125"}),
)


def of_flops(system: System) -> str:
    """Forward FLOPs, as a share of the default's."""
    run, base = run_named(system), run_named(BASE)
    return (
        ""
        if run is None or base is None
        else ratio(run.facts.forward_flops_per_token / base.facts.forward_flops_per_token)
    )


def says() -> tuple[str, str] | None:
    if not all(map(losses_of, CHANGES)):
        return None
    above = {system.label: found.mean for system in CHANGES if (found := against(system, BASE)) is not None}
    best = min(above, key=lambda label: above[label])
    measured = f"of {len(above)} changes {best} is the best: {signed(above[best])}"
    return measured, CONFIRMED if above[best] >= -BETTER else CONTRADICTED


STUDY = Study(
    id="design",
    claim="No other choice of the layer's is better than the defaults (ours)",
    paper="no table of it",
    rows=[row(system) for system in (BASE, *CHANGES)],
    says=says,
    table=lambda rows: table_of(rows, {"FLOPs": of_flops}),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
