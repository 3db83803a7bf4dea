"""What is read off finished runs: hand-made curves, numbers worked out by hand."""

import json
import math
import re
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring, tostring

import pytest

from mixture_of_tokens.planning.cost import flops_per_token, memory
from mixture_of_tokens.reports import page
from mixture_of_tokens.reports.comparison import by_model, comparison, reached
from mixture_of_tokens.reports.figures import Line, panel
from mixture_of_tokens.reports.findings import findings, why_no_time
from mixture_of_tokens.reports.page import _curves, _measure, _switches, _through_the_switch
from mixture_of_tokens.reports.report import summary_of
from mixture_of_tokens.reports.reproduce import Places, commands_of
from mixture_of_tokens.runs.records import MetricsRow, RunConfig, RunFacts, Switch, Transition
from mixture_of_tokens.runs.run import Load, Run, Stages, pack, read_run
from mixture_of_tokens.utils.formatting import Result, short
from mixture_of_tokens.utils.rendering import NOTHING

CORPUS = {"hash": "h", "train": {"documents": 1, "tokens": 2, "bytes": 3}}


def run(directory, name="Transformer-Nano", seed=0, losses=(3.0, 2.0), seconds=10.0, model=(), **changed) -> Run:
    """Evaluated every 5 steps and as many tokens, 10 s apart."""
    rows = [
        MetricsRow(step=5 * i, tokens=5 * i, seconds=seconds * i, tokens_per_second=1, eval_loss=loss)
        for i, loss in enumerate(losses, 1)
    ]
    steps = changed.get("steps", rows[-1].step)
    facts = RunFacts(
        name=name,
        seed=seed,
        steps=steps,
        tokens=rows[-1].tokens,
        evaluated_on=changed.get("evaluate_on", "validation"),
        final_loss=losses[-1] + 0.01,
        bits_per_byte=1.0,
        seconds=rows[-1].seconds,
        tokens_per_second=1,
        vocab_size=512,
        parameters=1,
        forward_flops_per_token=1,
        corpus=changed.pop("corpus", CORPUS),
        versions={},
        commit=None,
        sample="",
        hardware="",
        cores=1,
        threads=1,
    )
    asked: dict = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "batch_size": 128,
        "learning_rate": 0.01,
        "data": [],
        "field": "text",
        "max_bytes": None,
        "tokenizer": None,
        "evaluate_on": "validation",
        "training": {"save_steps": seed},
        "model": dict(model),
        "micro_batch": 128,
    }
    return Run(Path(directory), RunConfig(**asked | changed), facts, rows)


def after_a_switch(made: Run, step: int, at_the_switch: float, flops: float = 1.0) -> Run:
    losses = {"source_in_groups": 2.0, "source_alone": 2.0, "plain_switch": 3.0, "at_the_switch": at_the_switch}
    seconds = next((row.seconds for row in made.rows if row.step == step), 1.0)
    spent = {"step": step, "tokens": step, "seconds": seconds, "flops_per_token": flops}
    return replace(made, switch=Switch(**spent, **losses, branch_errors={}))


def test_a_loss_is_reached_on_the_line_between_two_evaluations(tmp_path):
    target = run(tmp_path, losses=(3.0, 2.4, 2.0))
    # From 2.2 at step 5 and 30 s to 1.8 at step 10 and 60 s: 2.0 is halfway.
    other = run(tmp_path, losses=(2.2, 1.8, 1.7), seconds=30.0)
    found = reached(other, target)
    assert found is not None
    assert (found.step, found.seconds) == pytest.approx((7.5, 45.0))
    assert (found.of_steps, found.of_time) == pytest.approx((0.5, 1.5))
    assert found.of_flops == pytest.approx(0.5)  # the same model
    assert reached(target, other) is None  # 2.0 is never 1.7
    own = reached(target, target)
    assert own is not None
    assert own.of_steps == 1.0  # its own end at its end


def test_a_loss_that_is_there_at_the_first_evaluation_is_reached_there(tmp_path):
    found = reached(run(tmp_path, losses=(1.5, 1.0)), run(tmp_path, losses=(3.0, 2.0)))
    assert found is not None
    assert (found.step, found.of_steps) == (5, 0.5)


def test_runs_on_different_texts_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match="saw different text"):
        reached(run(tmp_path / "one"), run(tmp_path / "other", corpus=CORPUS | {"hash": "i"}))


def test_a_run_after_a_switch_counts_its_source_s_flops_and_has_the_loss_at_the_switch(tmp_path):
    whole = run(tmp_path, losses=(3.0, 2.0, 1.8))  # at steps 5, 10 and 15 and as many tokens
    each = whole.flops
    curve = after_a_switch(whole, 10, 2.5, flops=3 * each).curve
    assert [(point.step, point.loss) for point in curve] == [(5, 3.0), (10, 2.0), (10, 2.5), (15, 1.8)]
    assert [point.flops / each for point in curve] == pytest.approx([15, 30, 30, 35])
    assert [point.seconds for point in curve] == [10, 20, 20, 30]


def test_flops_are_counted_by_the_experts_that_tokens_had(tmp_path):
    """Measured at tokens 5, 10 and 15: 3, 1 and 1 in one layer, 5, 3 and 1 in the other."""
    made = run(tmp_path, "ReMoE-Nano/32E", losses=(3.0, 2.0, 1.8))
    nominal = made.flops
    experts = 3 * flops_per_token(made.model_config, batch=128).forward["experts"]  # of one expert a token, both passes
    for row, pair in zip(made.rows, ((3, 5), (1, 3), (1, 1)), strict=True):
        row.layers = {str(i): {"experts_per_token": float(count)} for i, count in zip((2, 3), pair, strict=True)}
        row.layers["0"] = {"branch_to_residual": 1.0}
    extra = [5 * 3, 5 * 3 + 5 * (3 + 1) / 2, 5 * 3 + 5 * (3 + 1) / 2 + 5 * (1 + 0) / 2]  # beyond one, on straight lines
    expected = [nominal * row.tokens + experts * more for row, more in zip(made.rows, extra, strict=True)]
    assert [point.flops for point in made.curve] == pytest.approx(expected)
    pack(made, tmp_path / "kept.json", telemetry=False)
    kept = read_run(tmp_path / "kept")
    assert kept.rows[0].layers == {"2": {"experts_per_token": 3.0}, "3": {"experts_per_token": 5.0}}
    assert [point.flops for point in kept.curve] == [point.flops for point in made.curve]


def test_a_comparison_has_the_flops_that_were_measured_and_the_memory_of_a_devices_rows(tmp_path):
    made = run(tmp_path, "ReMoE-Nano/4E")
    made = replace(made, rows=[replace(row, layers={"2": {"experts_per_token": 3.0}}) for row in made.rows])
    made = replace(made, config=replace(made.config, micro_batch=32))
    (model,) = comparison(by_model([made])).models
    forward, backward = (sum(f.values()) for f in flops_per_token(made.model_config, batch=128, experts_per_token=3.0))
    assert model.flops_per_token == pytest.approx({"forward": forward, "training": forward + backward})
    assert model.memory_estimate == sum(memory(made.model_config, 32).values())
    assert model.memory_estimate < sum(memory(made.model_config, 128).values())


def test_a_switch_that_trains_nothing_has_its_evaluations_from_its_source_alone(tmp_path):
    source = run(tmp_path / "source", losses=(3.0, 2.0))
    switched = run(tmp_path / "switched", losses=(3.0, 2.0), steps=0, first_step=10)
    assert switched.inherited(source) == 2
    assert switched.inherited(switched) == source.inherited(switched) == 0


@pytest.mark.parametrize(("values", "told"), [((0.0, 0.0004, 0.0009), ""), ((0.5, 0.50001), "0.5 in every layer")])
def test_a_measure_is_called_constant_where_it_is_told_with_the_same_digits(values, told):
    lines = {"TC": {"2": (list(range(1, len(values) + 1)), list(values))}}
    said, figures = _measure("Dropped tokens", lines, ["TC"], {})
    assert bool(said) == bool(told) == (not figures)
    assert all(told in sentence and "throughout" in sentence for sentence in said)


def test_the_stages_of_a_switch_are_read_off_the_rows_after_it(tmp_path):
    # The switch after step 10, then 15, 20 and 25; a tenth of 15 steps, rounded down, is one: evaluated at step 15.
    whole = run(tmp_path, losses=(3.0, 2.0, 2.4, 1.9, 1.8), steps=15, first_step=10)
    for row, loads in zip(whole.rows, ((1, 1), (1, 1), (7.0, 3.0), (5.0, 5.0), (2.0, 4.0)), strict=True):
        row.layers = {str(i): {"largest_load": load, "dropped": load / 100} for i, load in enumerate(loads)}
    assert after_a_switch(whole, 10, 2.5).stages == Stages(15, 2.4, 1.8, Load(7.0, 0.07), Load(4.0, 0.04))


def test_runs_after_a_switch_are_one_model_whatever_their_sources_and_not_that_from_scratch(tmp_path):
    def after(seed, calibrate="full"):
        asked = Transition(source=f"of-{seed}", calibrate=calibrate, optimizer="carried")
        of_steps = {"steps": 5, "first_step": 5, "transition": asked}
        made = run(tmp_path / f"after{seed}", "TC-Nano/32E", seed, **of_steps)
        return after_a_switch(made, 5, 2.5)

    scratch = [run(tmp_path / f"scratch{seed}", "TC-Nano/32E", seed) for seed in (0, 1)]
    models = by_model([*scratch, after(0), after(1)])
    assert [len(model) for model in models.values()] == [2, 2]
    assert list(models) == ["TC-Nano/32E", "MoT-Nano/32E, switched"]
    plain = after(0, calibrate="none")
    labels = ["TC-Nano/32E", "MoT-Nano/32E, switched (calibrate full)"]
    labels.append("MoT-Nano/32E, switched (calibrate none)")
    assert list(by_model([scratch[0], after(0), plain])) == labels


def test_labels_of_switches_leave_out_what_follows_from_the_rest(tmp_path):
    def after(name, first_step=5, **asked):
        transition = Transition(source="of", optimizer="carried", **{"calibrate": "none"} | asked)
        given = {"steps": 10 - first_step, "first_step": first_step, "transition": transition}
        return after_a_switch(run(tmp_path / f"{len(list(tmp_path.iterdir()))}", name, **given), first_step, 2.5)

    softmax, sigmoid, annealed = after("TC-Nano/32E"), after("STC-Nano/32E"), after("TC-Nano/32E", 6, anneal=0.1)
    assert list(by_model([softmax, sigmoid])) == [
        "MoT-Nano/32E, switched (name TC-Nano/32E)",
        "MoT-Nano/32E, switched (name STC-Nano/32E)",
    ]
    assert list(by_model([softmax, annealed])) == [
        "MoT-Nano/32E, switched (steps 5)",
        "MoT-Nano/32E, switched (steps 4, anneal 0.1)",
    ]
    later = after("TC-Nano/32E", 6)
    assert list(by_model([softmax, later])) == ["MoT-Nano/32E, switched (steps 5)", "MoT-Nano/32E, switched (steps 4)"]


def test_a_comparison_is_made_seed_by_seed_with_its_spread(tmp_path):
    dense = [run(tmp_path / f"d{seed}", seed=seed, losses=(3.0, 2.0 + seed / 10)) for seed in (0, 1)]
    name = "MoT-Nano/32E/4"
    # Seed 0 gets to dense's 2.0 halfway between its evaluations; seed 1 never gets to 2.1.
    mixed = [run(tmp_path / "m0", name, 0, (2.5, 1.5), 20.0), run(tmp_path / "m1", name, 1, (3.0, 2.2), 20.0)]
    written = comparison(by_model([dense[1], dense[0], mixed[1], mixed[0]]))
    assert written.seeds == [0, 1]
    first, second = written.models
    assert astuple(first.final_loss) == pytest.approx((2.06, 2.01, 2.11, 2))
    assert astuple(second.final_loss_difference) == pytest.approx((-0.2, -0.5, 0.1, 2))
    to_dense = second.reached["Transformer-Nano"]
    assert astuple(to_dense.of_steps) == pytest.approx((0.75, 0.75, 0.75, 1))
    assert to_dense.of_time.mean == pytest.approx(1.5)
    # When dense ended, at 20 s, the mixtures had 2.5 and 3.0.
    assert second.equal_time_loss.mean == pytest.approx(2.75)
    assert second.equal_time_loss_difference.greatest == pytest.approx(3.0 - 2.1)
    # An evaluation's FLOPs are its tokens' times the training FLOPs of a token, 3 to 1 of the forward pass.
    training = first.flops_per_token["training"]
    assert first.runs[0].curve[-1].flops == pytest.approx(10 * training)
    assert training == pytest.approx(3 * first.flops_per_token["forward"], rel=0.01)
    json.dumps(written.as_dict(), allow_nan=False)


def test_one_name_with_two_settings_is_two_models_named_by_what_differs(tmp_path):
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "MoT-Nano/32E")]
    runs.append(run(tmp_path / "c", "MoT-Nano/32E", model={"router_temperature": 0.5}))
    assert list(by_model(runs)) == [
        "Transformer-Nano",
        "MoT-Nano/32E (router_temperature 0.25)",
        "MoT-Nano/32E (router_temperature 0.5)",
    ]


def test_settings_of_the_routing_that_are_not_the_names_are_told(tmp_path):
    common = {"capacity_factor": None, "router_temperature": 0.25}  # as of mot compare: each model reads some of them
    names = ("Transformer-Nano", "MoT-Nano/32E", "TC-Nano/32E")
    runs = [run(tmp_path / str(number), name, model=common) for number, name in enumerate(names)]
    assert list(by_model(runs)) == [
        "Transformer-Nano",
        "MoT-Nano/32E",
        "TC-Nano/32E (capacity_factor null, router_temperature 0.25)",
    ]


def test_settings_that_upstream_keeps_elsewhere_are_told_apart_too(tmp_path):
    eager = {"attn_implementation": "eager"}
    runs = [run(tmp_path / "a", "MoT-Nano/32E"), run(tmp_path / "b", "MoT-Nano/32E", model=eager)]
    assert list(by_model(runs)) == [
        "MoT-Nano/32E (attn_implementation null)",
        "MoT-Nano/32E (attn_implementation eager)",
    ]


def test_settings_that_are_as_by_default_and_paths_make_no_other_model(tmp_path):
    usual = run(tmp_path / "a", "MoT-Nano/32E")
    for number, same in enumerate(
        (
            {"training": {"adam_beta1": 0.9}},
            {"training": {"optim_args": None}},
            {"model": {"sliding_window": None}},
            {"data": ["there"]},
        ),
        1,
    ):
        other = run(tmp_path / str(number), "MoT-Nano/32E", seed=number, **same)
        assert list(by_model([usual, other])) == ["MoT-Nano/32E"]
    faster = run(tmp_path / "b", "MoT-Nano/32E", training={"adam_beta1": 0.8})
    assert list(by_model([usual, faster])) == ["MoT-Nano/32E (adam_beta1 0.9)", "MoT-Nano/32E (adam_beta1 0.8)"]


def test_a_loss_at_equal_time_of_some_seeds_says_so(tmp_path):
    names = {"Transformer-Nano": (10.0, 4.0), "TC-Nano/32E": (6.0, 6.0)}  # seconds between evaluations, by seed
    runs = [
        run(tmp_path / f"{name[:2]}{seed}", name, seed, losses=(3.0, 2.0), seconds=seconds[seed] / 2)
        for name, seconds in names.items()
        for seed in (0, 1)
    ]
    runs[2] = replace(runs[2], rows=[replace(row, seconds=row.seconds + 20) for row in runs[2].rows])
    found = comparison(by_model(runs))
    assert found.models[1].equal_time_loss.seeds == 1
    assert "At equal time of 1 of 2 seeds, when" in " ".join(findings(found)["TC-Nano/32E"])
    shown = tostring(table_of(by_model(runs), "Result"), encoding="unicode")
    assert shown.count("1 of 2 seeds") == 2  # the loss and the difference


def test_shares_that_are_one_as_shown_are_not_opposed(tmp_path):
    names = {"Transformer-Nano": 5.0, "TC-Nano/32E": 5.01}
    found = comparison(by_model([run(tmp_path / name[:2], name, seconds=each) for name, each in names.items()]))
    reached = found.models[1].reached["Transformer-Nano"].of_time
    assert reached is not None
    assert 1 < reached.mean < 1.005
    assert "in 1.00 of the steps (one seed) and 1.00 of the time" in " ".join(findings(found)["TC-Nano/32E"])


def body_of(models: dict[str, list[Run]], samples: dict[str, dict[str, str]] | None = None) -> Element:
    """The page of these, without its head."""
    (main,) = re.findall("(?s)<main>.*</main>", page.page(comparison(models), models, samples or {}, []))
    return fromstring(main)


def table_of(models: dict[str, list[Run]], title: str) -> Element:
    return next(table for table in body_of(models).iter("table") if table.findtext("caption") == title)


def text_in(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def cells(table: Element) -> list[list[tuple[str, str]]]:
    """Of each row, the head of each column and what stands below it."""
    head, *rows = [text_in(cell) for cell in table.findall(".//thead/tr")[-1]], *table.findall(".//tbody/tr")
    below = [[text_in(cell) for cell in row if cell.tag == "td"] for row in rows]
    return [list(zip(head[-len(row) :], row, strict=True)) for row in below]


def test_a_report_s_tables_have_each_number_in_its_column(tmp_path):
    """The mixture is at 2.0 after 5/6 of its second part: in step 9.17 of 10, after 22 of 20 s."""
    runs = [run(tmp_path / "d"), run(tmp_path / "m", "MoT-Nano/32E", losses=(2.5, 1.9), seconds=12.0)]
    models = by_model(runs)
    compared = comparison(models)
    dense, mixed = compared.models
    result, cost, properties, by_seed = (
        table_of(models, title) for title in ("Result", "Cost", "Properties", "Seed by seed")
    )
    assert cells(result)[1] == [
        ("Final loss", "1.910"),
        ("Difference", "\N{MINUS SIGN}0.100"),
        ("Bits per byte", "1.000"),
        ("Of the steps", "0.92"),
        ("Of the time", "1.10"),
        ("Of the FLOPs", f"{5.5 / 6 * mixed.flops_per_token['training'] / dense.flops_per_token['training']:.2f}"),
        ("Loss", "2.100"),
        ("Difference", "+0.100"),
    ]
    assert [shown for _, shown in cells(result)[0]] == ["2.010", NOTHING, "1.000", "1", "1", "1", "2.000", NOTHING]
    for model, row in zip(compared.models, cells(cost), strict=True):
        assert row[1:] == [
            ("Total", f"{model.parameters['total']:,}"),
            ("Active", f"{model.parameters['active']:,}"),
            ("Forward", short(model.flops_per_token["forward"])),
            ("Training", short(model.flops_per_token["training"])),
            ("A step", f"{model.seconds.mean / 10:.3g} s"),
            ("Tokens a second", f"{model.tokens_per_second.mean:,.0f}"),
            ("Estimate", f"{short(model.memory_estimate)}B"),
        ]
        assert model.parameters["total"] >= model.parameters["active"]
    assert {head.lower(): shown for head, shown in cells(properties)[1]} == mixed.properties
    shares = [shown for _, shown in cells(result)[1][3:6]]
    reaches = ["9", "22 s", short(5.5 / 6 * 10 * mixed.flops_per_token["training"])]
    assert [shown for _, shown in cells(by_seed)[1]] == ["1.9100", "1.0000", "24 s", *reaches, *shares]


def test_a_report_s_table_of_a_switch_has_each_loss_in_its_column(tmp_path):
    made = continued(run(tmp_path / "s", "MoT-Nano/32E", losses=(3.0, 2.0)), tmp_path / "a", [1.5], 2.25)
    assert made.switch is not None
    made = replace(made, switch=replace(made.switch, source_alone=2.4, fit_seconds=7.0))
    assert cells(table_of(by_model([made]), "The switch, stage by stage")) == [
        [
            ("In groups", "2.000"),
            ("Each row alone", "2.400"),
            ("Unchanged weights", "3.000"),
            ("As training begins", "2.250"),
            ("Jump left", "0.25"),
            ("Fit", "7.0 s"),
            ("After a tenth", "1.500"),
            ("End", "1.500"),
            ("Largest load", NOTHING),
            ("Dropped", NOTHING),
        ]
    ]


@pytest.fixture
def panels(monkeypatch) -> list[tuple[list[Line], dict]]:
    """The lines of each figure that is drawn from here on, and what else it is given."""
    drawn = []

    def record(lines, **given):
        drawn.append((lines, given))
        return "<svg></svg>"

    monkeypatch.setattr(page, "panel", record)
    return drawn


def test_a_report_s_curves_rings_and_switches_are_on_the_axis_of_their_figure(panels, tmp_path):
    """The ring is where the second line is at the first one's end: after 5/6 of it."""
    compared = {"seconds": 100.0}, {"name": "MoT-Nano/32E", "losses": (2.5, 1.9), "seconds": 120.0}
    runs = [run(tmp_path / str(i), **given) for i, given in enumerate(compared)]
    models = by_model(runs)
    switch = replace(runs[1].curve[0], step=7, tokens=7, seconds=150.0, flops=runs[1].flops * 7)
    _curves(comparison(models), {1: switch})
    power = 10.0 ** (len(f"{max(each.curve[-1].flops for each in runs):.0f}") - 1)
    assert len(panels) == 3
    for (lines, given), key, scale in zip(panels, ("step", "seconds", "flops"), (1, 60, power), strict=True):
        at = [[getattr(point, key) / scale for point in each.curve] for each in runs]
        assert [(line.series, list(line.x), list(line.y)) for line in lines] == [
            (0, pytest.approx(at[0]), [3.0, 2.0]),
            (1, pytest.approx(at[1]), [2.5, 1.9]),
        ]
        reached_at = at[1][0] + 5 / 6 * (at[1][1] - at[1][0])
        assert given["points"] == [(1, pytest.approx(reached_at), 2.0)]
        assert given["switches"] == [(1, pytest.approx(getattr(switch, key) / scale))]
    assert [given["x_label"].partition(", ")[0] for _, given in panels] == ["steps", "training time", "training FLOPs"]


def test_a_switch_is_a_line_in_its_own_figure_and_in_those_of_the_layers(panels, tmp_path):
    source = run(tmp_path / "s", "MoT-Nano/32E", losses=(3.0, 2.0))
    after = continued(source, tmp_path / "a", [1.5], 2.25)
    models = by_model([source, after])
    _through_the_switch(models, at := _switches(models))
    _, given = panels.pop()
    assert given["switches"] == [(1, 10)]
    assert given["points"] == [(1, 10, 3.0)]  # the loss with unchanged weights
    measured = {label: {"2": ([5, 10, 15], [0.1, 0.2, 0.3])} for label in models}
    _measure("Dropped tokens", measured, list(models), {i: point.step for i, point in at.items()})
    assert [list(given["switches"]) for _, given in panels] == [[], [(1, 10)]]


def test_a_page_of_one_model_compares_nothing_and_tells_its_layers_by_colour(panels, tmp_path):
    models = by_model([run(tmp_path / "m", "MoT-Nano/32E")])
    found = comparison(models)
    made = page.page(found, models, {}, [])
    assert [head for head, _ in cells(table_of(models, "Result"))[0]] == ["Final loss", "Bits per byte"]
    for word in ("baseline", "another model", "At equal time", "comparison of", "vs first", "reached at"):
        assert word not in made + summary_of(found), word
    assert "of all of the validation text" in made
    assert "of 512 tokens of the validation text" in page.page(replace(found, scored_tokens=512), models, {}, [])
    panels.clear()
    layers = {layer: ([5, 10], [0.1, 0.2]) for layer in ("2", "3")}
    _measure("Dropped tokens", dict.fromkeys(models, layers), list(models), {})
    assert [line.series for line in panels[0][0]] == [0, 1]


def test_samples_stand_beside_their_model_s_mark(tmp_path):
    models = by_model([run(tmp_path / "d"), run(tmp_path / "m", "MoT-Nano/32E")])
    written = {"def ": {"Transformer-Nano": "one", "MoT-Nano/32E": "two"}, "The ": {"MoT-Nano/32E": "three"}}
    figures = body_of(models, written).findall(".//section[@aria-labelledby='samples']//figure")
    assert [text_in(figure) for figure in figures] == [
        "Transformer-Nano def one",
        "MoT-Nano/32E def two",
        "MoT-Nano/32E The three",
    ]
    marks = [set(re.findall(r"--series-\d", tostring(figure, encoding="unicode"))) for figure in figures]
    assert marks == [{"--series-0"}, {"--series-1"}, {"--series-1"}]


def test_minutes_of_the_source_count_where_a_converted_run_is_compared(tmp_path):
    asked = {"source": "s", "calibrate": "distil", "optimizer": "fresh"}
    apart = run(tmp_path / "a", "TC-Nano/32E", steps=10, minutes=3.0)
    made = {"steps": 7, "minutes": 2.25, "first_step": 3}
    converted = run(tmp_path / "b", "TC-Nano/32E/4", **made, transition=Transition(**asked, source_minutes=0.75))
    assert len(by_model([apart, converted])) == 2
    for before in (None, 1.0):
        other = run(tmp_path / "c", "TC-Nano/32E/4", **made, transition=Transition(**asked, source_minutes=before))
        with pytest.raises(ValueError, match="they differ in --steps"):
            by_model([apart, other])


@pytest.mark.parametrize(
    ("names", "rates", "title"),
    [
        (["MoT-Nano/32E"], [0.01], "MoT-Nano/32E"),
        (["MoT-Nano/32E", "TC-Nano/32E"], [0.01], "MoT-Nano/32E and TC-Nano/32E compared"),
        (["MoT-Nano/32E"], [0.01, 0.02], "MoT-Nano/32E: learning_rate 0.01 and learning_rate 0.02 compared"),
        (["MoT-Nano/32E"], [0.01 * i for i in range(1, 6)], "MoT-Nano/32E: 5 settings compared"),
        (["MoT-Nano/32E", "TC-Nano/32E"], [0.01, 0.02, 0.03], "6 models compared"),
    ],
)
def test_a_page_s_title_says_once_what_its_models_have_in_common(names, rates, title, tmp_path):
    runs = [run(tmp_path / f"{name}{rate}", name, learning_rate=rate) for name in names for rate in rates]
    models = by_model(runs)
    assert f"<h1>{title}</h1>" in page.page(comparison(models), models, {}, [])


def test_what_runs_hold_is_text_wherever_it_stands_on_the_page(tmp_path):
    made, evil = run(tmp_path), "<x>'\"&"
    told = {
        "hardware": evil,
        "commit": evil,
        "versions": {evil: evil},
        "corpus": CORPUS | {"source": [evil], evil: evil},
    }
    models = {evil: [replace(made, facts=replace(made.facts, **told))]}
    shown = page.page(comparison(models), models, {evil: {evil: evil}}, [evil])
    assert "<x>" not in shown
    assert shown.count("&lt;x&gt;&#39;&#34;&amp;") > 20


def test_a_band_goes_from_the_least_to_the_greatest():
    """The line is at a third of it."""
    line = Line(0, [0, 1], [2, 2], [1, 1], [4, 4])
    drawn = fromstring(panel([line], label="", x_label="", y_label="", y_range=(0, 5)))
    band, mark, *_ = (use.attrib for use in drawn.iter("use") if "--series-0" in use.get("style", ""))
    (shape,) = (path.get("d", "") for path in drawn.iter("path") if f"#{path.get('id')}" == band["href"])
    heights = [float(band["y"]) + float(y) for y in re.findall(r"[ML] \S+ (\S+)", shape)]
    bottom, top = max(heights), min(heights)
    assert (bottom - float(mark["y"])) / (bottom - top) == pytest.approx(1 / 3)


def continued(source: Run, to, losses, at_the_switch: float) -> Run:
    """A run after a switch of `source`, of half as many steps."""
    asked = Transition(source=str(source.directory), calibrate="full", optimizer="carried")
    first = source.config.steps
    before = [row.eval_loss or 0.0 for row in source.rows]
    made = run(to, "TC-Nano/32E", source.seed, (*before, *losses), steps=5, first_step=first, transition=asked)
    made = replace(made, facts=replace(made.facts, steps=first + 5))
    return after_a_switch(made, first, at_the_switch)


def test_a_run_is_compared_with_its_source_at_unequal_steps_which_are_told(tmp_path):
    sources = [run(tmp_path / f"s{seed}", "MoT-Nano/32E", seed, (3.0, 2.0 + seed)) for seed in (0, 1)]
    # After step 10: seed 0 at 2.5 and then 1.5, so back at 2.0 in step 12.5; seed 1 at 3.1 and never again at 3.0.
    after = [continued(sources[0], tmp_path / "a0", [1.5], 2.5), continued(sources[1], tmp_path / "a1", [3.05], 3.1)]
    result = comparison(by_model([*sources, *after]))
    source, switched = result.models
    assert (source.steps, switched.steps, result.at_equal_steps) == (10, 15, False)
    back = [each.reached["MoT-Nano/32E"] for each in switched.runs]
    assert back[1] is None
    assert (back[0].step, back[0].of_steps) == (12.5, 1.25)
    assert switched.equal_time_loss is None  # when the source ended, there was no switched model
    assert source.equal_time_loss.mean == 2.5
    table = summary_of(result)
    said = " ".join(table.split())
    assert "After 15 steps, 5 more than MoT-Nano/32E," in said
    assert "At equal steps" not in said
    assert "Seconds of a switched model are with its source's, and without the fit at the switch" in said
    on = "MoT-Nano/32E, switched goes on from MoT-Nano/32E, and is back at its last loss after 2 more steps on 1 of 2"
    assert on in said  # 2.5
    assert "of the FLOPs" not in said  # which would count the source's
    assert said.count("of the steps") == 0
    assert "1.25" not in text_in(table_of(by_model([*sources, *after]), "Result"))
    assert said.split()[:4] == ["model", "steps", "loss", "spread"]
    backwards = comparison(by_model([*after, *sources]))
    assert "After 10 steps, 5 fewer than MoT-Nano/32E, switched," in summary_of(backwards)


def test_a_run_that_has_its_sources_loss_at_the_switch_needs_no_step_for_it(tmp_path):
    source = run(tmp_path / "s", "MoT-Nano/32E", losses=(3.0, 2.0))
    switched = continued(source, tmp_path / "a", [1.5], at_the_switch=1.9)
    worse = continued(source, tmp_path / "b", [2.5], at_the_switch=2.9)
    label = "MoT-Nano/32E, switched"
    for after, told in ((switched, "has its last loss from the switch on"), (worse, "does not come back to its last")):
        said = " ".join(findings(comparison(by_model([source, after])))[label])
        assert f"goes on from MoT-Nano/32E, and {told}" in said
        assert "of the steps" not in said


def test_a_short_mixture_that_takes_longer_to_the_dense_loss_says_why(tmp_path):
    dense = run(tmp_path / "d")
    slow, quick = (run(tmp_path / f"m{s}", "MoT-Nano/32E", losses=(2.5, 1.9), seconds=s) for s in (15.0, 5.0))
    choice = run(tmp_path / "t", "TC-Nano/32E", seconds=20.0)
    (why,) = why_no_time(comparison(by_model([dense, slow, choice])))
    assert "MoT-Nano/32E: no time is gained in so short a training" in why
    assert "a step takes 1.50 times Transformer-Nano's time" in why
    assert "81.9 k tokens are few" in why  # 10 steps of 128 rows of 64
    assert why_no_time(comparison(by_model([dense, quick]))) == []
    assert why_no_time(comparison(by_model([choice, slow]))) == []  # Token Choice is no dense model


def test_a_run_without_evaluations_is_named_whatever_it_is_compared_with():
    longer = run("a", steps=12)
    bare = replace(run("b"), rows=[])
    for runs in ([longer, bare], [bare]):
        with pytest.raises(ValueError, match=r"^b was not evaluated while it trained: its metrics"):
            by_model(runs)


def test_a_result_as_json_has_numbers_that_json_has():
    @dataclass
    class Found(Result):
        losses: dict
        seeds: tuple

    found = Found({"mean": math.inf, "each": [1.5, math.nan]}, (0, 1))
    assert json.loads(found.to_json(), parse_constant=pytest.fail) == {
        "losses": {"mean": None, "each": [1.5, None]},
        "seeds": [0, 1],
    }


def test_only_a_run_and_what_continues_it_may_have_unequal_steps(tmp_path):
    source = run(tmp_path / "s", "MoT-Nano/32E")
    after = continued(source, tmp_path / "a", [1.5], 2.5)
    dense, longer = run(tmp_path / "d", losses=(3.0, 2.2)), run(tmp_path / "l", losses=(3.0, 2.0, 1.9))
    assert len(by_model([dense, source, after])) == 3  # beside the source
    assert len(by_model([longer, source, after])) == 3  # beside what continues it
    other = run(tmp_path / "other", "MoT-Nano/32E", losses=(3.0, 2.1))
    for refused in ([dense, after], [source, longer], [other, after], [dense, longer, source, after]):
        with pytest.raises(ValueError, match=r"they differ in --steps: 1[05] and 1[05]"):
            by_model(refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": {"hash": "other"}}, "a and b saw different text .*, or another version of it"),
        ({"evaluate_on": "tuning"}, "they differ in --evaluate-on: validation and tuning"),
        ({"steps": 11}, "they differ in --steps: 10 and 11"),
        ({"model": {"group_size": 3}}, r"the size of their groups \(--model.group_size N .*\): 32 and 3"),
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
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text(str(run(tmp_path).config))
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read_run(tmp_path)
    never = replace(run(tmp_path), rows=[])
    with pytest.raises(ValueError, match="has no eval_loss"):
        comparison(by_model([never]))


def test_runs_of_one_name_are_made_again_in_different_places(tmp_path):
    places = Places()
    found = [run(tmp_path / "x" / "run"), run(tmp_path / "y" / "run", seed=1), run(tmp_path / "x" / "run")]
    commands = [commands_of(each, places) for each in found]
    assert [re.findall("--out (.*)", line) for (line,) in commands] == [["again/run"], ["again/run-2"], ["again/run"]]
    assert f"--config {tmp_path}/y/run/config.yaml " in commands[1][0]
    assert [places.of(each.directory) for each in found] == ["again/run", "again/run-2", "again/run"]


def test_a_run_is_called_by_the_name_of_its_folder_from_within_too(tmp_path, monkeypatch):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for place, directory in {"mine": ".", "mine/model": ".."}.items():
        monkeypatch.chdir(tmp_path / place)
        (line,) = commands_of(run(directory), Places())
        assert line == f"mot train --config {Path(directory) / 'config.yaml'} --out again/mine"
