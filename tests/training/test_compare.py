"""`mot compare` and the page that it and `mot report` write."""

import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from mixture_of_tokens import report
from mixture_of_tokens.reports import samples
from mixture_of_tokens.reports.findings import differing
from mixture_of_tokens.reports.page import _thinned
from mixture_of_tokens.reports.samples import continued
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of
from mixture_of_tokens.settings.options import DEFAULTS
from mixture_of_tokens.training.compare import _Planned, _time_left
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.utils.rendering import TEMPLATES, page_of
from processes import mot, rows_of

NAMES = ("Transformer-Nano", "MoT-Nano/4E/2", "TC-Nano/4E")
VOID = ("meta", "br", "hr", "img", "link", "input", "path", "use")


@pytest.fixture(scope="module")
def flags(small_corpus):
    short = ("--steps", 6, "--batch-size", 32, "--training.eval_steps", 2, "--device", "cpu", "--data", small_corpus)
    return ("--seeds", "0,1", *short)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, flags):
    out = tmp_path_factory.mktemp("compare") / "all"
    mot("compare", *NAMES, *flags, "--learning-rate", "1e-3,1e-2,1e-2", "--out", out)
    return out


@pytest.fixture(scope="module")
def page(compared):
    return (compared / "report.html").read_text()


def runs(compared: Path) -> dict[tuple[str, int], dict]:
    facts = [json.loads(file.read_text()) for file in compared.glob("*/run.json")]
    return {(each["name"], each["seed"]): each for each in facts}


def test_every_model_has_every_seed_the_same_text_and_its_own_rate(compared):
    facts = runs(compared)
    assert set(facts) == {(name, seed) for name in NAMES for seed in (0, 1)}
    assert len({each["corpus"]["hash"] for each in facts.values()}) == 1
    rates = {
        directory.name: yaml.safe_load((directory / "config.yaml").read_text())["learning_rate"]
        for directory in compared.iterdir()
        if directory.is_dir()
    }
    assert rates["Transformer-Nano-seed1"] == 1e-3
    assert rates["MoT-Nano-4E-2-seed1"] == rates["TC-Nano-4E-seed0"] == 1e-2


def test_the_numbers_are_those_of_the_runs(compared):
    written, facts = json.loads((compared / "compare.json").read_text()), runs(compared)
    assert written["baseline"] == "Transformer-Nano"
    assert [model["label"] for model in written["models"]] == list(NAMES)
    for model in written["models"]:
        losses = [facts[model["label"], seed]["final_loss"] for seed in (0, 1)]
        dense = [facts["Transformer-Nano", seed]["final_loss"] for seed in (0, 1)]
        assert model["final_loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert (model["final_loss"]["least"], model["final_loss"]["greatest"]) == (min(losses), max(losses))
        assert model["final_loss_difference"]["least"] == pytest.approx(
            min(a - b for a, b in zip(losses, dense, strict=True))
        )
        spreads = [facts[model["label"], seed]["regrouping_spread"] for seed in (0, 1)]
        assert (model["regrouping_spread"] or {}).get("greatest") == (None if spreads == [None, None] else max(spreads))
        assert model["parameters"]["total"] == facts[model["label"], 0]["parameters"]
        assert model["flops_per_token"]["forward"] == pytest.approx(
            facts[model["label"], 0]["forward_flops_per_token"], abs=1
        )
        for run in model["runs"]:
            rows = rows_of(compared / run["directory"])
            assert [point["loss"] for point in run["curve"]] == [r["eval_loss"] for r in rows if "eval_loss" in r]


@pytest.mark.slow
def test_called_again_it_trains_nothing_and_prints_the_same(compared, flags, capsys):
    before = {file: file.stat().st_mtime_ns for file in compared.glob("*/*")}
    words = ("compare", *NAMES, *flags, "--learning-rate", "1e-3,1e-2,1e-2", "--out", compared)
    mot(*words, "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((compared / "compare.json").read_text())
    mot(*words)
    shown = capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in compared.glob("*/*")} == before
    for name in NAMES:
        assert re.search(rf"^{name} +\d\.\d{{4}} ", shown, flags=re.MULTILINE)
        assert f"{name} continues 'def ':" in shown
    assert " ".join(shown.split()).count("Three ways to group the text differ by") == sum(
        "MoT" in name for name in NAMES
    )
    assert f"The page: {compared / 'report.html'}" in shown


def test_the_time_left_is_that_of_the_same_model_or_by_flops_that_of_another(compared, tmp_path):
    """One run took 20 s; another seed of it, and a model of three times its FLOPs, are to come."""
    (done,) = copied([compared / "Transformer-Nano-seed0"], tmp_path)
    facts = json.loads((done / "run.json").read_text())
    (done / "run.json").write_text(json.dumps(facts | {"seconds": 20.0}))
    planned = ((NAMES[0], done, 1e9), (NAMES[0], tmp_path / "a", 1e9), (NAMES[1], tmp_path / "b", 3e9))
    plans = [_Planned(merge(name, 0, None, DEFAULTS), directory, flops) for name, directory, flops in planned]
    assert _time_left(plans, 1, {}) == "; about 80 s of training left"
    assert _time_left(plans, 2, {}) == "; about 60 s of training left"
    assert _time_left(plans[:1], 1, {}) == _time_left(plans[1:], 0, {}) == ""
    assert _time_left(plans, 1, {NAMES[0]: 30.0}) == "; about 120 s left"  # with its evaluations


@pytest.mark.slow
def test_a_smaller_comparison_in_the_same_place_says_what_it_leaves_out(compared, flags, tmp_path, capsys):
    there = tmp_path / "all"
    shutil.copytree(compared, there)
    given = ("--learning-rate", "1e-3,1e-2", "--out", there)
    mot("compare", *NAMES[:2], *flags, *given)
    gone = ", ".join(str(there / f"{NAMES[2].replace('/', '-')}-seed{seed}") for seed in (0, 1))
    told, _, rest = capsys.readouterr().err.partition("\n")  # before anything is trained
    assert told == f"mot: {there} will compare these runs, and no longer {gone}; mot report compares any runs"
    assert "Run 1 of 4" in rest
    mot("compare", *NAMES[:2], *flags, *given)
    assert "no longer" not in capsys.readouterr().err


@pytest.mark.slow
def test_another_page_or_file_is_not_replaced(compared, flags, tmp_path, capsys):
    there = tmp_path / "all"
    shutil.copytree(compared, there)
    before = (there / "report.html").read_bytes()
    some = [there / f"{name.replace('/', '-')}-seed0" for name in NAMES[:2]]
    with pytest.raises(SystemExit, match="2"):
        mot("report", *some)
    assert f"{there / 'report.html'} is the page of the comparison there: name another" in capsys.readouterr().err
    mot("report", *some, "--out", tmp_path / "two.html")
    assert (there / "report.html").read_bytes() == before
    (there / "report.html").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        mot("compare", *NAMES, *flags, "--learning-rate", "1e-3,1e-2,1e-2", "--out", there)
    assert "is no page of a report" in capsys.readouterr().err
    assert (there / "report.html").read_text() == "mine"


def test_another_configuration_in_the_same_place_is_refused_before_anything_is_trained(compared, flags, capsys):
    before = {file: file.stat().st_mtime_ns for file in compared.glob("*/*")}
    with pytest.raises(SystemExit) as stopped:
        mot("compare", "EC-Nano/4E", *NAMES, *flags, "--learning-rate", "3e-3", "--out", compared)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "was started with --learning-rate 0.001, now it is 0.003" in err
    assert err.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in compared.glob("*/*")} == before


def test_one_model_under_two_names_is_named_twice(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        mot("compare", "MoT-Nano/4E", "MoT-Nano/4E/1", *flags, "--out", tmp_path / "none")
    assert stopped.value.code == 2
    assert "a model is named twice" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_that_diverges_is_named(flags, tmp_path, capsys):
    out = tmp_path / "diverges"
    rates = ("--seeds", 0, *flags[2:], "--training.max_grad_norm", 0, "--learning-rate", "1e-3,1e30")
    threads = set(threading.enumerate())
    with pytest.raises(SystemExit) as stopped:
        mot("compare", *NAMES[:2], *rates, "--out", out)
    assert stopped.value.code == 1
    assert set(threading.enumerate()) <= threads  # TensorBoard's ends too
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"mot: error: {out / 'MoT-Nano-4E-2-seed0'}: ")
    assert line.endswith("try a lower learning rate, and remove that directory; finished runs stay")


@pytest.mark.parametrize("command", [("compare", "MoT-Nano/4E/2"), ("sweep", "MoT-Nano/4E/2", "--learning-rate", 0.01)])
def test_several_runs_do_not_go_into_a_run(command, compared, flags, capsys):
    run = compared / "MoT-Nano-4E-2-seed0"
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit, match="2"):
        mot(*command, *flags, "--out", run)
    assert f"{run} is a run of its own; name another directory for several" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


def test_it_can_be_moved_and_reported_on_without_its_weights(compared, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(compared, moved, ignore=shutil.ignore_patterns("model", "checkpoint-*", "report.html"))
    mot("report", moved, "--json")
    again, written = json.loads(capsys.readouterr().out), json.loads((moved / "compare.json").read_text())
    for model, before in zip(again["models"], written["models"], strict=True):
        assert [run.pop("directory") for run in model["runs"]] == [
            str(moved / run.pop("directory")) for run in before["runs"]
        ]
        assert model == before
    page = (moved / "report.html").read_text()
    assert "There are no samples" in page
    assert "mot compare" in page  # the command that made it, not only the one that reports


def test_samples_are_made_on_the_device_that_was_asked_for(compared, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = compared / "Transformer-Nano-seed0"
    assert continued({"one": run}, "cpu")["def "].keys() == {"one"}


def test_a_sample_is_what_was_written_after_its_own_prompt(compared, monkeypatch):
    asked = []

    def told(model, tokenizer, prompts, sampling):
        asked.append(prompts)
        return [f"after {prompt}" for prompt in prompts]

    monkeypatch.setattr(samples, "continue_prompts", told)
    written = continued({"one": compared / "Transformer-Nano-seed0"}, "cpu")
    assert written == {prompt: {"one": f"after {prompt}"} for prompt in samples.SHOWN}
    assert asked == [samples.PROMPTS]


def test_a_model_whose_logits_are_not_finite_has_no_samples(compared, tmp_path):
    runs = {"sound": compared / "Transformer-Nano-seed0", "broken": tmp_path / "broken"}
    model = load_model(str(runs["sound"]), device="cpu")
    with torch.no_grad():
        model.lm_head.weight *= 1e40
    model.save_pretrained(runs["broken"] / "model")
    load_tokenizer_of(str(runs["sound"])).save_pretrained(runs["broken"] / "model")
    assert continued(runs, "cpu")["def "].keys() == {"sound"}


def test_a_model_that_cannot_be_loaded_is_named_and_has_no_samples(compared, tmp_path, capsys):
    runs = {"sound": compared / "Transformer-Nano-seed0", "short": tmp_path / "short"}
    shutil.copytree(runs["sound"], runs["short"], ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = runs["short"] / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert continued(runs, "cpu")["def "].keys() == {"sound"}
    assert capsys.readouterr().err.startswith(f"mot: no samples of short: {runs['short']}/model is damaged: ")
    mot("report", runs["short"])
    assert "There are no samples" in (runs["short"] / "report.html").read_text()


@pytest.mark.parametrize("where", ["load_model", "continue_prompts"])
def test_a_gpu_that_is_full_costs_samples_and_not_the_report(compared, monkeypatch, capsys, where):
    def full(*args, **kwargs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual.")

    run = compared / "Transformer-Nano-seed0"
    monkeypatch.setattr(samples, where, full)
    mot("report", run)
    assert "There are no samples" in (run / "report.html").read_text()
    assert "no samples of Transformer-Nano: CUDA out of memory. Tried to allocate 2 GiB.\n" in capsys.readouterr().err


def test_one_run_and_one_without_measurements_have_pages_too(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "Transformer-Nano-seed0", run, ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    rows = rows_of(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "layers": {}}) + "\n" for row in rows))
    mot("report", run)
    page = (run / "report.html").read_text()
    assert "There is one seed" in page
    assert "no measurements of their layers" in page


def test_a_page_that_cannot_be_written_is_refused_as_a_run_is(compared, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        mot("report", compared / "Transformer-Nano-seed0", "--out", tmp_path / "file" / "x.html")
    assert f"{tmp_path / 'file'} is no directory that can be written to" in capsys.readouterr().err


@pytest.mark.slow
def test_a_page_takes_the_place_of_a_page_alone(compared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(compared / "Transformer-Nano-seed0", run, ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    before = (run / "run.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        mot("report", run, "--out", run / "run.json")
    assert f"{run / 'run.json'} is there already, and is no page of a report" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        mot("report", run, "--out", run)
    assert f"--out {run} is a directory: name a file, such as {run / 'report.html'}" in capsys.readouterr().err
    for _ in range(2):
        mot("report", run, "--out", tmp_path / "x.html")


def test_models_that_saw_other_text_are_refused(compared, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(compared / "TC-Nano-4E-seed0", other, ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    facts = json.loads((other / "run.json").read_text())
    facts["corpus"]["hash"] = "other"
    (other / "run.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as stopped:
        mot("report", compared / "Transformer-Nano-seed0", other, "--out", tmp_path / "x.html")
    assert stopped.value.code == 2
    assert "saw different text (" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def copied(runs: Iterable[Path], to: Path) -> list[Path]:
    """Without weights."""
    left_out = shutil.ignore_patterns("checkpoint-*", "model", "tensorboard")
    return [Path(shutil.copytree(run, to / run.name, ignore=left_out)) for run in runs]


def test_a_run_whose_measurements_lack_their_end_is_refused(compared, tmp_path):
    first, second = copied((compared / "Transformer-Nano-seed0", compared / "MoT-Nano-4E-2-seed0"), tmp_path)
    assert report(first, second, out=tmp_path / "x.html").comparison.models
    metrics, lines = first / "metrics.jsonl", (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    told = f"{metrics} lacks its end: the run has 6 steps, and no evaluation after step 4"
    with pytest.raises(ValueError, match=re.escape(told)):
        report(first, second, out=tmp_path / "x.html")
    metrics.write_text("".join(lines))
    facts = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(facts | {"steps": 4}))
    with pytest.raises(ValueError, match="the run has 4 steps by its results, and 6 by its configuration"):
        report(first, second, out=tmp_path / "x.html")


def test_seeds_that_were_evaluated_after_different_steps_are_refused(compared, tmp_path):
    runs = copied((compared / f"Transformer-Nano-seed{seed}" for seed in (0, 1)), tmp_path)
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(lines[-1:]))
    with pytest.raises(ValueError, match="seed1 are seeds of one model, but were evaluated after different steps"):
        report(*runs, out=tmp_path / "x.html")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seconds": 0}, "seconds cannot be 0"),
        ({"steps": 0}, "steps cannot be 0"),
        ({"corpus": {"hash": "1", "train": {"bytes": 1}}}, "train of the corpus has no number of documents, tokens,"),
    ],
)
def test_results_that_no_run_has_are_refused(changed, told, compared, tmp_path):
    (run,) = copied([compared / "Transformer-Nano-seed0"], tmp_path)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | changed))
    with pytest.raises(ValueError, match=f"{re.escape(str(run / 'run.json'))}: {told}"):
        report(run, out=tmp_path / "x.html")


@pytest.mark.slow
def test_a_size_that_is_not_the_name_s_is_told(flags, tmp_path):
    rows = ("--seeds", 0, *flags[2:])
    mot("train", "MoT-Nano/4E", *rows[2:], "--out", tmp_path / "8", "--model.group_size", 8)
    page = report(tmp_path / "8", out=tmp_path / "x.html")
    assert [model.label for model in page.comparison.models] == ["MoT-Nano/4E (group_size 8)"]
    assert "groups of 4 texts" in (text := (tmp_path / "x.html").read_text())
    assert "Settings in brackets take the place of the name's." in text


def test_of_a_long_run_every_nth_measurement_is_drawn():
    for count in (1, 2, 399, 400, 401, 799, 800, 801, 7500):
        drawn = _thinned(range(count))
        assert drawn[-1] == count - 1
        assert len({b - a for a, b in pairwise(drawn)}) <= 1
        assert len(drawn) == count if count <= 400 else 200 <= len(drawn) <= 400


def test_one_evaluation_is_a_point(compared, tmp_path):
    (run,) = copied([compared / "Transformer-Nano-seed0"], tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line.pop("eval_loss", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marked = []
    for directory in (run, compared / "Transformer-Nano-seed0"):
        report(directory, out=tmp_path / "x.html")
        figure = (tmp_path / "x.html").read_text().split("<figure", 2)[1]
        marked.append(len(re.findall(r"<use ", figure.split("</figure>")[0])))
    assert 0 < marked[0] < marked[1]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_the_output_s_encoding_lacks_is_no_error(encoding, compared, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
    mot("report", compared / "Transformer-Nano-seed0", "--out", tmp_path / "\N{MINUS SIGN}.html")
    assert rb"\u2212.html" in written.getvalue()


class Elements(HTMLParser):
    """All elements of a page, and that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_one_file_and_can_be_read_by_a_screen_reader(page):
    elements = Elements(page)
    assert elements.open == []
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "srcset"):
            link = attributes.get(name) or "#"
            assert link.startswith("#") or (tag == "a" and link == "https://arxiv.org/abs/2310.15961")
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in elements.found}
    assert not re.search(r"url\((?!#)|@import", page)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [
        attributes["href"][1:] for tag, attributes in elements.found if (attributes.get("href") or "").startswith("#")
    ]
    assert set(links) <= set(ids)
    figures = [attributes for tag, attributes in elements.found if tag == "svg"]
    assert len(figures) > 6
    assert all(figure.get("aria-label") or figure.get("aria-hidden") == "true" for figure in figures)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    assert ("html", {"lang": "en"}) in elements.found
    headers = [attributes for tag, attributes in elements.found if tag == "th"]
    assert all(attributes.get("scope") in ("col", "colgroup", "row") for attributes in headers)


def test_the_page_says_what_the_comparison_says(page, compared):
    written = json.loads((compared / "compare.json").read_text())
    for model in written["models"]:
        assert f">{model['final_loss']['mean']:.3f}<" in page
        assert f"{model['parameters']['total']:,}" in page
    assert written["corpus"]["hash"] in page
    assert "mot compare Transformer-Nano" in page
    assert written["environments"][0]["versions"]["torch"] in page


def test_what_comes_from_files_is_text_on_the_page():
    template = TEMPLATES.from_string('<pre title="{{ text }}">{{ text }}</pre>')
    shown = "&lt;script&gt;\N{REPLACEMENT CHARACTER}&amp;&#34;\N{REPLACEMENT CHARACTER}[0m"
    assert page_of(template, text='<script>\x00&"\x1b[0m') == f'<pre title="{shown}">{shown}</pre>'
    assert page_of(TEMPLATES.from_string("<pre>{{ text }}</pre>"), text="a\r\nb\rc") == "<pre>a\nb\nc</pre>"


def test_ids_of_two_figures_differ_and_their_references_follow():
    figure = '<svg><path id="{0}a"></path><use href="#{0}a" clip="url(#{0}a)"></use>id="a"</svg>'
    page = page_of(
        TEMPLATES.from_string('<p id="a">{{ figure | safe }}{{ figure | safe }}</p>'), figure=figure.format("")
    )
    assert page == f'<p id="a">{figure.format("f0-")}{figure.format("f1-")}</p>'


REPORT = """<script>addEventListener("load", () => {
    const wide = [...document.querySelectorAll("body *")].filter(
        (e) => !e.closest(".scroll, svg, details") && e.getBoundingClientRect().right > innerWidth + 1);
    parent.postMessage({
        wide: wide.map((e) => e.tagName + "." + e.className).join(" "),
        width: innerWidth,
        ink: getComputedStyle(document.body).color,
        curve: getComputedStyle(document.querySelector(".panels path[style*=series-1]")).stroke}, "*");
})</script>"""
FRAME = """<body><iframe style="border: 0; width: {width}px; height: 5000px" src="page.html"></iframe>
<script>onmessage = (e) => Object.assign(document.body.dataset, e.data)</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_overflow_in_light_and_dark(page, width, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    (tmp_path / "page.html").write_text(page.replace("</head>", REPORT + "</head>"))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    found = {}
    for mode, value in (("light", 1), ("dark", 0)):
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        words += [f"--user-data-dir={tmp_path / mode}", f"--blink-settings=preferredColorScheme={value}"]
        words += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
        found[mode] = dict(re.findall(r'data-(wide|width|ink|curve)="([^"]*)"', shown))
        assert (found[mode]["wide"], found[mode]["width"]) == ("", str(width))
    assert found["light"]["ink"] != found["dark"]["ink"]
    assert found["light"]["curve"] != found["dark"]["curve"]


def test_runs_that_were_not_made_alike_are_told_apart_by_what_differs():
    one = {"hardware": "a", "cores": 2, "threads": 2, "versions": {"torch": "2.13"}, "commit": "x"}
    assert differing([one]) is None
    assert differing([one, one | {"commit": "y"}]) == "The runs differ in commit: times may not be comparable."
    other = one | {"hardware": "b", "versions": {"torch": "2.12"}}
    assert differing([one, other]) == "The runs differ in hardware and versions: times may not be comparable."
