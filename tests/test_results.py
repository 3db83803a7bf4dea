"""What is read off finished runs: hand-made curves, numbers worked out by hand."""

import json
from dataclasses import replace

import pytest
import yaml

from mixture_of_tokens.reports.comparison import by_model, comparison, reached
from mixture_of_tokens.runs.run import Run, read, through_the_switch

CORPUS = {"hash": "h", "train": {"documents": 1, "tokens": 2, "bytes": 3}}


def run(directory, name="Transformer-Nano", seed=0, losses=(3.0, 2.0), seconds=10.0, every=5, **facts) -> Run:
    """Evaluated every 5 steps and as many tokens, 10 s apart."""
    rows = [
        {"step": every * i, "tokens": every * i, "seconds": seconds * i, "eval_loss": loss}
        for i, loss in enumerate(losses, 1)
    ]
    steps = rows[-1]["step"]
    facts = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps,
        "seconds": rows[-1]["seconds"],
        "final_loss": losses[-1] + 0.01,
        "bits_per_byte": 1.0,
        "parameters": 1,
        "vocab_size": 512,
        "evaluated_on": "validation",
        "corpus": CORPUS,
        "versions": {},
    } | facts
    settings = {"name": name, "seed": seed, "batch_size": 128, "learning_rate": 0.01}
    settings |= {"model": {}, "training": {"save_steps": seed}}
    return Run(directory, facts, settings, rows)


def test_a_loss_is_reached_on_the_line_between_two_evaluations(tmp_path):
    target = run(tmp_path, losses=(3.0, 2.4, 2.0))
    # From 2.2 at step 5 and 30 s to 1.8 at step 10 and 60 s: 2.0 is halfway.
    other = run(tmp_path, losses=(2.2, 1.8, 1.7), seconds=30.0)
    found = reached(other, target)
    assert found is not None
    assert (found["step"], found["seconds"]) == pytest.approx((7.5, 45.0))
    assert (found["of_steps"], found["of_time"]) == pytest.approx((0.5, 1.5))
    assert found["of_flops"] == pytest.approx(0.5)  # the same model
    assert reached(target, other) is None  # 2.0 is never 1.7
    assert (reached(target, target) or {})["of_steps"] == 1.0  # its own end at its end


def test_a_loss_that_is_there_at_the_first_evaluation_is_reached_there(tmp_path):
    found = reached(run(tmp_path, losses=(1.5, 1.0)), run(tmp_path, losses=(3.0, 2.0)))
    assert found is not None
    assert (found["step"], found["of_steps"]) == (5, 0.5)


def test_a_run_after_a_switch_counts_its_source_s_flops_and_has_the_loss_at_the_switch(tmp_path):
    whole = run(tmp_path, losses=(3.0, 2.0, 1.8))  # at steps 5, 10 and 15 and as many tokens
    each = whole.flops[1]
    switch = {"step": 10, "tokens": 10, "seconds": 20.0, "flops_per_token": 3 * each, "at_the_switch": 2.5}
    curve = replace(whole, switch=switch).curve
    assert [(point["step"], point["loss"]) for point in curve] == [(5, 3.0), (10, 2.0), (10, 2.5), (15, 1.8)]
    assert [point["flops"] / each for point in curve] == pytest.approx([15, 30, 30, 35])
    assert [point["seconds"] for point in curve] == [10, 20, 20, 30]


def test_the_stages_of_a_switch_are_read_off_the_rows_after_it(tmp_path):
    whole = run(tmp_path, losses=(3.0, 2.0, 2.4, 1.9, 1.8))  # the switch after step 10, then 15, 20 and 25
    for row, loads in zip(whole.rows, ((1, 1), (1, 1), (7.0, 3.0), (5.0, 5.0), (2.0, 4.0)), strict=True):
        row["layers"] = {str(i): {"largest_load": load, "dropped": load / 100} for i, load in enumerate(loads)}
    whole.settings["steps"] = 15  # a tenth of which, rounded down, is one: evaluated at step 15
    stages = through_the_switch(replace(whole, switch={"step": 10, "at_the_switch": 2.5}))
    assert stages["after_a_tenth"] == {"step": 15, "loss": 2.4}
    assert (stages["at_the_switch"], stages["at_the_end"]) == (2.5, 1.8)
    first, last = {"largest_load": 7.0, "dropped": 0.07}, {"largest_load": 4.0, "dropped": 0.04}
    assert stages["routers"] == {"first": first, "last": last}


def test_runs_after_a_switch_are_one_model_whatever_their_sources_and_not_that_from_scratch(tmp_path):
    def after(seed):
        made = run(tmp_path / f"after{seed}", "TC-Nano/32E", seed)
        made.settings.update({"first_step": 5, "transition": {"source": f"of-{seed}", "calibrate": "full"}})
        return replace(made, switch={"step": 5, "tokens": 5, "seconds": 1, "flops_per_token": 1, "at_the_switch": 2.5})

    scratch = [run(tmp_path / f"scratch{seed}", "TC-Nano/32E", seed) for seed in (0, 1)]
    models = by_model([*scratch, after(0), after(1)])
    assert [len(model) for model in models.values()] == [2, 2]
    assert list(models) == ["TC-Nano/32E", "MoT-Nano/32E, switched"]
    plain = after(0)
    plain.settings["transition"] = {"source": "of-0", "calibrate": "none"}
    labels = ["TC-Nano/32E", "MoT-Nano/32E, switched (calibrate full)"]
    labels.append("MoT-Nano/32E, switched (calibrate none)")
    assert list(by_model([scratch[0], after(0), plain])) == labels


def test_a_comparison_is_made_seed_by_seed_with_its_spread(tmp_path):
    dense = [run(tmp_path / f"d{seed}", seed=seed, losses=(3.0, 2.0 + seed / 10)) for seed in (0, 1)]
    name = "MoT-Nano/32E/4"
    # Seed 0 gets to dense's 2.0 halfway between its evaluations; seed 1 never gets to 2.1.
    mixed = [run(tmp_path / "m0", name, 0, (2.5, 1.5), 20.0), run(tmp_path / "m1", name, 1, (3.0, 2.2), 20.0)]
    written = comparison(by_model([dense[1], dense[0], mixed[1], mixed[0]]))
    assert written["seeds"] == [0, 1]
    first, second = written["models"]
    assert first["final_loss"] == pytest.approx({"mean": 2.06, "least": 2.01, "greatest": 2.11, "seeds": 2})
    difference = second["final_loss_difference"]
    assert difference == pytest.approx({"mean": -0.2, "least": -0.5, "greatest": 0.1, "seeds": 2})
    to_dense = second["reached"]["Transformer-Nano"]
    assert to_dense["of_steps"] == pytest.approx({"mean": 0.75, "least": 0.75, "greatest": 0.75, "seeds": 1})
    assert to_dense["of_time"]["mean"] == pytest.approx(1.5)
    # When dense ended, at 20 s, the mixtures had 2.5 and 3.0.
    assert second["equal_time_loss"]["mean"] == pytest.approx(2.75)
    assert second["equal_time_loss_difference"]["greatest"] == pytest.approx(3.0 - 2.1)
    # An evaluation's FLOPs are its tokens' times the training FLOPs of a token, 3 to 1 of the forward pass.
    training = first["flops_per_token"]["training"]
    assert first["runs"][0]["curve"][-1]["flops"] == pytest.approx(10 * training)
    assert training == pytest.approx(3 * first["flops_per_token"]["forward"], rel=0.01)
    json.dumps(written, allow_nan=False)


def test_one_name_with_two_settings_is_two_models_named_by_what_differs(tmp_path):
    runs = [run(tmp_path / "a"), run(tmp_path / "b", name="MoT-Nano/32E"), run(tmp_path / "c", name="MoT-Nano/32E")]
    runs[2].settings["model"]["router_temperature"] = 0.5
    assert list(by_model(runs)) == [
        "Transformer-Nano",
        "MoT-Nano/32E (router_temperature 0.25)",
        "MoT-Nano/32E (router_temperature 0.5)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": {"hash": "other"}}, "saw different corpora"),
        ({"evaluated_on": "tuning"}, "different splits, so they cannot be compared: validation in a, tuning in b"),
        ({"steps": 11}, "different numbers of steps"),
        ({"seed": 1}, "has the seeds 0, MoT-Nano/32E 1"),
        ({"name": "Transformer-Nano"}, "the same model with the same seed"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(change, message, tmp_path):
    first, other = run("a"), run("b", **({"name": "MoT-Nano/32E"} | change))
    with pytest.raises(ValueError, match=message):
        by_model([first, other])


def test_damaged_and_unevaluated_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no whole run directory"):
        read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="has no eval_loss"):
        read(tmp_path)
