"""`mot export --format hub`: a folder with its own code, where this library does not exist."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from mixture_of_tokens import MixtureOfTokensForCausalLM, export
from mixture_of_tokens.conversion import hub, verify
from mixture_of_tokens.runs.loading import load_model
from processes import Python, another_python, mot
from test_export import model_of

MIXED = "MoT-Nano/4E/2"
READ = """
import json, sys, torch
directory, trust = sys.argv[1], sys.argv[2] == "trust"
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust).eval()
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    logits = model(ids).logits
    alone = model(ids[:1]).logits
    written = model.generate(ids[:1, :4], max_new_tokens=9, min_new_tokens=9, do_sample=False)
found = {"kind": type(model).__name__, "module": type(model).__module__, "text": written[0].tolist()}
print(json.dumps(found | {"logits": logits.tolist(), "alone": alone.tolist()}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Iterator[Python]:
    """Where this library does not exist, and transformers copies code to a folder of the tests."""
    with another_python(HF_MODULES_CACHE=str(tmp_path_factory.mktemp("code"))) as python:
        yield python


@pytest.fixture
def saved(beside_a_tokenizer):
    return lambda kind, **options: beside_a_tokenizer(kind, model_of(kind, **options))


def read_by(python: Python, directory: Path, ids: torch.Tensor, trust: str = "trust") -> dict:
    return json.loads(python(READ, str(directory), trust, json.dumps(ids.tolist())))


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("experts", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_a_mixture_is_served_alone_by_few_experts_without_this_library(
    experts, tiny_runs, elsewhere, tmp_path, monkeypatch
):
    out, run = tmp_path / "out", str(tiny_runs[MIXED])
    made = export(run, out, format="hub", top_k=experts, device="cpu")
    assert (made.architecture, made.difference) == ("ServedAloneForCausalLM", pytest.approx(0, abs=1e-6))
    ids = torch.randint(512, (6, 17), generator=torch.Generator().manual_seed(1))
    found = read_by(elsewhere, out, ids)
    assert found["kind"] == "ServedAloneForCausalLM"
    assert found["module"].startswith("transformers_modules.")
    ours = load_model(run, alone=True, experts=experts or 2, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), ours(ids).logits)
        assert (torch.tensor(found["logits"]) - load_model(run, device="cpu")(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(
        torch.tensor(found["logits"])[:1], torch.tensor(found["alone"])
    )  # no row reaches another
    text = ours.generate(ids[:1, :4], max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert found["text"] == text[0].tolist()
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert re.search(r"^# license:", card, flags=re.MULTILINE)
    assert "trust_remote_code=True" in card
    assert f"a token goes to {experts or 2} of 8 experts" in card
    losses = re.search(r"(\d\.\d+) with texts in groups, (\d\.\d+) as it is served here, each alone", card)
    assert losses is not None
    assert 1 < float(losses[2]) < 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid_choice", "expert_choice", "uniform"])
def test_other_routings_as_they_are(kind, saved, elsewhere, tmp_path):
    """Whether rows influence each other is what the card says."""
    directory, out = saved(kind), tmp_path / "out"
    export(directory, out, format="hub", device="cpu", license="mit")
    model = MixtureOfTokensForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(1))
    found = read_by(elsewhere, out, ids)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert ("**Yes**" in card) == (kind != "sigmoid_choice")


def test_no_code_is_run_unless_it_is_trusted(saved, elsewhere, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(verify, "compare_logits", lambda *given: (0.0, 1.0))  # the other tests have it
    export(saved("sigmoid_choice"), out, format="hub", device="cpu")
    with pytest.raises(ValueError, match="trust_remote_code"):
        read_by(elsewhere, out, torch.tensor([[1, 2]]), "distrust")
    (out / "modeling.py").write_text("raise RuntimeError('it ran')")
    (out / "manifest.json").unlink()
    assert load_model(str(out), device="cpu").config.model_type == "mixture_of_tokens"  # by this library's own code


@pytest.mark.slow
def test_code_that_computes_something_else_is_noticed_and_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    """The control: gates that are rounded."""
    right = hub._relative
    gates = "scores.gather(-1, expert), expert"
    assert gates in Path(hub._source("layers.token_choice")).read_text()
    monkeypatch.setattr(hub, "_relative", lambda text: right(text).replace(gates, gates.replace("),", ").round(),")))
    with pytest.raises(SystemExit, match="2"):
        mot("export", saved("sigmoid_choice"), tmp_path / "out", "--format", "hub")
    assert "is not the same model, and was removed" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("soft_moe", [], "is not causal"),
        ("sigmoid_choice", ["--top-k", 2], "--top-k is for a Mixture of Tokens"),
        ("mixture_of_tokens", ["--top-k", 99], "a token can go to 1 to 6 experts"),
        ("sigmoid_choice", ["--scores", "softmax"], "--scores and --distil-steps"),
        ("sigmoid_choice", ["--quantize", "f16"], "--quantize is for --format gguf"),
    ],
)
@pytest.mark.filterwarnings("ignore:Served alone")
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(kind, words, message, saved, tmp_path, capsys):
    directory = saved(kind)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "out", "--format", "hub", *words)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown
    assert not list(tmp_path.glob("*out*"))
