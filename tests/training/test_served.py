"""A loss for each way that texts can be served: beside the final loss, in a run's summary, in tables and on cards."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from mixture_of_tokens import MixtureOfTokensForCausalLM
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.forward_hooks import serving_alone
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.reports.comparison import by_model, comparison
from mixture_of_tokens.reports.report import summary_of
from mixture_of_tokens.runs.loading import text_of
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.rendering import card_of
from processes import mot

MIXTURE = "MoT-Nano/4E/2"  # of eight experts, two of which cost what a dense feed-forward does
pytestmark = pytest.mark.usefixtures("tiny_cache")


def test_a_mixture_is_measured_in_groups_alone_and_alone_by_few(tiny_runs):
    run = tiny_runs[MIXTURE]
    model, text = AutoModelForCausalLM.from_pretrained(run / "model"), text_of(str(run)).validation
    assert isinstance(model, MixtureOfTokensForCausalLM)

    def loss() -> float:
        groups = 30 * 32 // 8 // 32  # an eighth of the rows that were trained on
        return evaluate_blocks(model, text, group_size=32, batch_size=32, groups=groups)["loss"]

    expected = {"in_groups": loss()}
    with serving_alone(model):
        expected["alone"] = loss()
    with serving_alone(model, 2):
        expected["alone_by_few"] = loss()
    served = read_run(run).facts.served
    assert served == pytest.approx(expected, abs=1e-5)
    assert len({f"{value:.6f}" for value in expected.values()}) == 3


@pytest.mark.parametrize("name", ["Transformer-Nano", "TC-Nano/4E"])
def test_what_mixes_nothing_has_one_loss(name, tiny_runs):
    run = read_run(tiny_runs[name])
    assert set(run.facts.served or {}) == {"alone"}
    assert run.facts.served["alone"] == pytest.approx(run.facts.final_loss, abs=0.3)  # of a part of the text
    assert "alone" not in str(run).replace("served alone", "")
    assert "A prompt, continued:" in str(run)


def test_a_summary_tells_the_losses_alone(tiny_runs):
    run = read_run(tiny_runs[MIXTURE])
    served = run.facts.served or {}
    told = f"{served['alone_by_few']:.4f} by 2 of 8 experts, {served['alone']:.4f} by all experts"
    assert f"Each text alone, over a part of that text: {told}; in groups {served['in_groups']:.4f}\n" in str(run)
    assert "A prompt, served alone and continued:" in str(run)


def test_a_report_has_them_side_by_side_and_a_run_of_an_earlier_version_has_none(tiny_runs, tmp_path, capsys):
    mot("report", *tiny_runs.values(), "--out", tmp_path / "page.html")
    shown = capsys.readouterr().out
    served = {name: read_run(run).facts.served for name, run in tiny_runs.items()}
    table = shown.partition("loss, of a part of the text")[2].partition("\n\n")[0].splitlines()[1:]
    rows = {line.split()[0]: line.split()[1:] for line in table}
    mixture = {way: f"{value:.4f}" for way, value in served[MIXTURE].items()}
    assert rows[MIXTURE] == [mixture["in_groups"], mixture["alone_by_few"], "(2", "of", "8)", mixture["alone"]]
    assert rows["TC-Nano/4E"] == [f"{served['TC-Nano/4E']['alone']:.4f}"]
    page = (tmp_path / "page.html").read_text()
    assert "As texts are served" in page
    assert f"{served[MIXTURE]['alone_by_few']:.3f} (2 of 8)" in page
    old = tmp_path / "old"
    shutil.copytree(tiny_runs[MIXTURE], old)
    facts = json.loads((old / "run.json").read_text())
    del facts["served"]
    (old / "run.json").write_text(json.dumps(facts))
    assert "alone, over a part" not in str(read_run(old))
    assert "of a part of the text" not in summary_of(comparison(by_model([read_run(old)])))


@pytest.mark.slow
def test_what_cannot_be_served_alone_says_so_little(small_corpus, tmp_path, capsys):
    flags = ("--steps", 2, "--batch-size", 32, "--data", small_corpus, "--device", "cpu")
    mot("train", "EC-Nano/4E", *flags, "--out", tmp_path / "ec")
    assert "alone" not in capsys.readouterr().out
    assert set(read_run(tmp_path / "ec").facts.served or {}) == {"in_groups"}
    mot("train", MIXTURE, *flags, "--evaluate-on", "tuning", "--out", tmp_path / "tuning")
    assert read_run(tmp_path / "tuning").facts.served is None  # settings are chosen there, by many runs


def test_a_card_says_whether_rows_influence_each_other(tiny_runs):
    cards = {name: (run / "model" / "README.md").read_text() for name, run in tiny_runs.items()}
    assert "**Rows of a batch influence each other**: they are mixed in groups of 4" in cards[MIXTURE]
    assert "`model.serve_alone(num_experts_alone=2)` by 2 of the 8 experts" in cards[MIXTURE]
    assert "Rows of a batch do not influence each other" in cards["Transformer-Nano"]
    for name in ("EC-Nano/4E/2", "Uniform-Nano/4E/2"):
        card = card_of("run.md.j2", name=name, config=config_from_name(name))
        assert "**Rows of a batch influence each other**" in card
        assert "num_experts_alone" not in card


def test_a_short_training_that_gains_no_time_says_why_in_its_last_line(tiny_runs, tmp_path, capsys):
    mot("report", tiny_runs["Transformer-Nano"], tiny_runs[MIXTURE], "--out", tmp_path / "page.html")
    shown = " ".join(capsys.readouterr().out.split())
    result = comparison(by_model([read_run(tiny_runs[name]) for name in ("Transformer-Nano", MIXTURE)]))
    time = result.models[1].reached["Transformer-Nano"].of_time
    assert ("no time is gained in so short a training" in shown) == (time is None or time.mean >= 1)
