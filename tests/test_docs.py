"""What README and docs show runs as it stands, prints what it says, and stands once."""

import gzip
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixture_of_tokens import plan
from mixture_of_tokens.commands import cli
from mixture_of_tokens.conversion import verify, verify_gguf
from mixture_of_tokens.conversion.to_hf import to_plain
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.planning.cost import flops_per_token, parameters
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of
from mixture_of_tokens.settings import recipes
from mixture_of_tokens.settings.names import SIZES
from mixture_of_tokens.settings.routings import OF_A_ROUTER, SETTINGS, TABLE, properties
from mixture_of_tokens.training import merging

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, DOCS / "README.md", *sorted({*DOCS.rglob("*.md")} - {DOCS / "README.md"})]
LINKING = [
    *PAGES,
    *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "experiments/LOG.md", "experiments/README.md")),
]
ENGINES = DOCS / "guide" / "serve.md"  # whose code test_engines.py runs
WHOLE = ("train", "layer", "recipe", "dense", "compare")  # guides that test_guides.py runs
GUIDES = [DOCS / "guide" / f"{name}.md" for name in WHOLE]
DRY = ("train", "sweep", "compare")
WITH_A_RUN, READING = ("generate", "evaluate", "audit", "transition", "export"), "MoT-Nano/4E/2"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_every_page_can_be_found():
    index = DOCS / "README.md"
    assert "(docs/README.md)" in README.read_text()
    linked = re.findall(r"\]\(([^)#\s]+)", index.read_text())
    assert [page for page in PAGES[2:] if page.relative_to(DOCS).as_posix() not in linked] == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page not in (*GUIDES, ENGINES)],
    ids=lambda page: page.stem,
)
@pytest.mark.usefixtures("tiny_cache")
def test_python_blocks_run(page, small_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").symlink_to(small_corpus)
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)  # in one namespace, as a reader would type them
    if page == README:
        assert names["y"].shape == names["x"].shape == (64, 16, 256)
        assert torch.equal(names["y"][5, 10:], names["x"][5, 10:])
    if page.stem == "training":
        assert (tmp_path / "my-model" / "model.safetensors").is_file()


def processes_of(words: list[str]) -> int:
    """That torchrun starts, on all machines; of a number that a scheduler gives, two."""
    counts = [words[words.index(flag) + 1] for flag in ("--nproc-per-node", "--nnodes") if flag in words]
    return math.prod(int(count) if count.isdigit() else 2 for count in counts)


def commands() -> dict[str, tuple[str, ...]]:
    """The words after `mot` of every command in a ```sh block, but those of GUIDES, and in what `make demo` runs.

    Of one that torchrun starts, the first word is WORLD_SIZE=N.
    """
    made = subprocess.run(["make", "-n", "-o", "install", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    shell = "".join(block for page in PAGES if page not in GUIDES for block in blocks(page, "sh")) + made.stdout
    lines = [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()]
    lines = [
        ["mot", f"WORLD_SIZE={processes_of(words)}", *words[words.index("mixture_of_tokens") + 1 :]]
        if "torchrun" in words
        else words
        for words in lines
    ]
    found = [tuple(rest) for name, *rest in filter(None, lines) if name in ("mot", ".venv/bin/mot")]
    assert len(found) > 20
    return {" ".join(words): words for words in found}


@pytest.mark.parametrize("words", commands().values(), ids=commands())
@pytest.mark.usefixtures("tiny_cache")
def test_commands_are_legal(words, tiny_runs, small_corpus, tmp_path, monkeypatch, capsys):
    """Those that train merge and check everything, and stop; the others do what they do."""
    monkeypatch.chdir(tmp_path)
    if words[0].startswith("WORLD_SIZE="):
        monkeypatch.setenv(*words[0].split("="))
        # Transformers' own arguments would wait for the other processes.
        monkeypatch.setattr(merging, "TrainingArguments", lambda **given: SimpleNamespace(fp16=False))
        monkeypatch.setattr(merging, "try_out", lambda arguments: None)
        words = words[1:]
    for name in ("README.md", "ARCHITECTURE.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "corpus").mkdir()
    rows = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in small_corpus.iterdir())
    (tmp_path / "corpus" / "0.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "prompts.txt").write_text("def \nclass \n")
    (command, *given), switched = words, False
    (tmp_path / "my-texts").symlink_to(small_corpus)
    if command in WITH_A_RUN and given[0] != "nano":  # which comes with the library
        (tmp_path / given[0]).parent.mkdir(exist_ok=True)
        switched = given[0].endswith("-transition")
        (tmp_path / given[0]).symlink_to(tiny_runs["TC-Nano/4E" if switched else READING])
    if command == "report":
        shutil.copytree(ROOT / "experiments" / "nano", tmp_path / given[0])
    if command in ("transition", "export") and "hub" not in words and not switched and "--calibrate" not in words:
        words = (*words, "--distil-steps", "4")
    if command == "export":  # another process would have to import transformers, as in test_export.py
        monkeypatch.setattr(verify, "compare_logits", lambda *given: (0.0, 1.0))
        monkeypatch.setattr(verify_gguf, "ENGINE", "none")
    if given[0] == "exported":
        (tmp_path / "exported").unlink()
        to_plain(load_model(str(tiny_runs["TC-Nano/4E"]))).save_pretrained(tmp_path / "exported")
        load_tokenizer_of(str(tiny_runs["TC-Nano/4E"])).save_pretrained(tmp_path / "exported")
        words = [word for word in words if word not in ("--distil-steps", "4")]
    dry = ["--dry-run"] if command in DRY and not {"--help", "--dry-run"} & {*words} else []
    if dry and "--minutes" in words:  # which has steps to time, and --dry-run makes none
        words = [word.replace("--minutes", "--steps") for word in words]
    cli.main([*words, *dry])
    shown = capsys.readouterr()
    assert shown.out or shown.err


def test_the_file_of_flags_is_legal(tmp_path, capsys):
    (text,) = blocks(DOCS / "reference" / "training.md", "yaml")
    (tmp_path / "flags.yaml").write_text(text)
    cli.main(["train", "--config", str(tmp_path / "flags.yaml"), "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["steps"], shown["training"]["save_steps"]) == ("MoT-Nano/32E/8", 300, 100)


def test_the_result_is_what_report_prints_of_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (shown,) = re.findall(r"```\n\$ mot report experiments/nano\n(.*?)```", text_of("results/systems"), flags=re.DOTALL)
    cli.main(["report", "experiments/nano", "--out", str(tmp_path / "report.html")])
    assert capsys.readouterr().out.split("The page: ")[0].strip() == shown.strip()


def text_of(stem: str) -> str:
    return (DOCS / f"{stem}.md").read_text()


def test_the_sizes_are_those_that_names_stand_for():
    table = text_of("reference/names").split("| size | hidden size |")[1].split("\n\n")[0]
    shown = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    assert [row[0] for row in shown] == list(SIZES)
    for (name, *row, of_dense), size in zip(shown, SIZES.values(), strict=True):
        mixture, dense = (
            sum(flops_per_token(config_from_name(model)).forward.values())
            for model in (f"MoT-{name}/32E/8", f"Transformer-{name}")
        )
        assert of_dense == f"{mixture / dense:.2f}", name
        assert row[:4] == [str(size.hidden_size), str(size.blocks), str(size.context), f"{size.batch * size.context:,}"]
        for millions, model in zip(row[4:], (f"Transformer-{name}", f"MoT-{name}/32E/8"), strict=True):
            count = parameters(config_from_name(model))["total"] / 1e6
            assert millions == f"{count:,.{2 if count < 1 else 1 if count < 100 else 0}f}", model


def test_the_defaults_of_training_are_the_recipes():
    table = text_of("reference/training").split("### Defaults")[1].split("\n\n")[1].splitlines()[2:]
    expected = []
    for size, recipe in recipes.RECIPES.items():
        others = {rate: [] for rate in recipes.LEARNING_RATES.values()}
        for (its, system), rate in recipes.LEARNING_RATES.items():
            others[rate] += [system] * (its == size)
        rates = [f"{recipe.learning_rate:g}", *(f"{', '.join(them)} {rate:g}" for rate, them in others.items() if them)]
        numbers = [f"{number:,}" for number in (recipe.steps, recipe.warmup_steps, SIZES[size].batch)]
        expected.append([size, "; ".join(rates), *numbers])
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == expected


def test_the_settings_of_routings_are_the_configurations():
    config = MixtureOfTokensConfig()
    table = text_of("reference/routings").split("## Settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w.-]+) \| (.*?) \|", table, flags=re.MULTILINE)
    general = {"shared_experts": "all with experts", "gated": "all", "initializer_scale": "all"}
    own = {field: ", ".join(f"`{prefix}-`" for prefix in of) for field, of in SETTINGS.items()}
    assert {field: of for field, _, of in rows} == own | dict.fromkeys(OF_A_ROUTER, "all with a router") | general
    without = " and ".join(f"`{row.prefix}-`" for row in TABLE if not row.routed)
    assert f"\n{without} have no router." in table
    for field, default, _ in rows:
        value = getattr(config, field)
        assert default == (f"{value:.3g}" if isinstance(value, float) and value < 1 else str(value).lower()), field


def test_the_properties_of_routings_are_those_of_the_table():
    table = text_of("reference/routings").split("| name | routing |")[1].split("\n\n")[0].splitlines()[2:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")][:6] for line in table]
    assert shown == [[f"`{row.prefix}-`", row.title, *properties([row]).values()] for row in TABLE]


TABLES = {  # by script: its lines, and the page that shows what it prints with --table
    "experiments/nano/run.py": (11, "results/systems"),
    "experiments/prose/run.py": (11, "results/systems"),
    "experiments/long/run.py": (11, "results/systems"),
    "experiments/routings/run.py": (44, "results/systems"),
    "experiments/switch/run.py": (34, "results/conversion"),
    "experiments/switch/when.py": (10, "results/conversion"),
    "experiments/switch/few.py": (21, "results/alone"),
    "experiments/upcycle/run.py": (52, "results/upcycling"),
    "experiments/transition/run.py": (20, "../experiments/LOG"),
    "experiments/verdict/fresh.py": (124, "results/equal-time"),
    "experiments/verdict/forms.py": (11, "results/README"),
    "experiments/verdict/attention.py": (80, "../experiments/LOG"),
    "experiments/alone/run.py": (54, "../experiments/LOG"),
    "experiments/documents/run.py": (14, "../experiments/LOG"),
    "experiments/router_z/run.py": (6, "../experiments/LOG"),
    "experiments/partial_groups/run.py": (14, "results/alone"),
    "experiments/paper/ledger.py": (12, "results/paper"),
    "experiments/paper/fig6.py": (14, "results/paper"),
    "experiments/paper/alone.py": (17, "results/paper"),
    "experiments/paper/early.py": (5, "results/equal-time"),
    "experiments/paper/length.py": (12, "results/paper"),
    "experiments/paper/fig7.py": (17, "results/paper"),
    "experiments/paper/router_rate.py": (5, "results/paper"),
    "experiments/paper/random_groups.py": (5, "results/paper"),
    "experiments/paper/fig4.py": (14, "results/paper"),
    "experiments/paper/fig5.py": (12, "results/paper"),
    "experiments/paper/fig8.py": (12, "results/conversion"),
    "experiments/paper/temperature.py": (7, "results/paper"),
    "experiments/paper/design.py": (9, "results/paper"),
    "experiments/paper/table1.py": (5, "results/paper"),
    "experiments/paper/table3.py": (7, "results/paper"),
    "benchmarks/generate.py": (17, "results/speed"),
    "benchmarks/engines.py": (21, "guide/serve"),
    "benchmarks/rounding.py": (6, "guide/serve"),
    "benchmarks/neighbours.py": (15, "results/speed"),
    "benchmarks/train.py": (73, "results/speed"),
    "benchmarks/placements.py": (30, "reference/scaling"),
}


@pytest.mark.parametrize("script", TABLES)
def test_tables_are_what_their_scripts_make_of_the_committed_runs(script, monkeypatch, capsys):
    lines, page = TABLES[script]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, "--table"])
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n") == lines
    assert [part for part in printed.split("\n\n") if part.strip() not in text_of(page)] == []


def test_shares_of_dense_are_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    rows = results.read(ROOT / "benchmarks" / "results.csv")
    conditions = ("hardware", "dtype", "onednn_isa", "allocator", "feed_forward")
    of = {}
    for run in results.latest(rows, conditions):
        for row in run:
            if row["pass"] == "forward+backward":
                of[(*(row[name] for name in conditions), row["provider"])] = row
    epyc, xeon = "AMD EPYC", "Intel(R) Xeon(R) Processor"
    machines = [(epyc, "all"), (xeon, "all"), (xeon, "all with AMX")]
    columns = [(machine, dtype, isa) for machine, isa in machines for dtype in ("float32", "bfloat16")]
    providers = ["mot/1", "mot/8", "mot/16", "literal/8", "token_choice", "token_choice_dropless", "expert_choice"]
    providers.append("qwen3_grouped_mm")
    shown = text_of("results/speed").split("| | EPYC, fp32 |")[1].split("\n\n")[0].splitlines()[2:]
    for provider, line in zip(providers, shown, strict=True):
        for column, cell in zip(columns, line.split("|")[2:-1], strict=True):
            if not cell.strip():
                continue
            row = of[(*column, "keep", "plain", provider)]
            expected = f"{float(row['share_of_dense']):.2f}"
            floor = f" ({float(row['share_of_floor']):.2f})" if row["share_of_floor"] else ""
            assert cell.strip() == expected + floor, (provider, column)
    conditions = (xeon, "float32", "all with AMX", "default", "plain")
    without = [f"{float(of[*conditions, mot]['share_of_dense']):.2f}" for mot in providers[:2]]
    assert "ran at {} and {} of dense".format(*without) in " ".join(text_of("results/speed").split())


def prose_of(page: Path) -> str:
    """Without code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return set(map(anchor_of, headings))


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = prose_of(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_tests_that_pages_name_are_there():
    named = [name for page in LINKING for name in re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)`", page.read_text())]
    assert len(set(named)) > 30
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


def test_changes_that_were_tried_are_as_in_what_they_link_to():
    section = text_of("results/paper").split("## What was tried where figures 6 and 7 fall short")[1].split("\n##")[0]
    rows = re.findall(r"^\| (.*\[.*) \|$", section, flags=re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        there = ""
        for target in re.findall(r"\]\(([^)]+)\)", row):
            path, anchor = target.split("#")
            there += section_of((DOCS / "results" / path) if path else DOCS / "results" / "paper.md", anchor)
        numbers = re.findall(r"[+-]?\d\.\d{3,4}\b", row)
        assert numbers
        losses = [float(number) for number in numbers if number[0].isdigit()]
        differences = {f"{one - other:+.3f}" for one in losses for other in losses}
        assert [number for number in numbers if number not in there and number not in differences] == [], row


def section_of(page, anchor: str) -> str:
    """From a heading to the next one that is not below it."""
    parts = re.split(r"^(#+) (.*)$", page.read_text(), flags=re.MULTILINE)[1:]
    found: list[str] = []
    for level, heading, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if found and len(level) <= len(found[0]):
            break
        if found or anchor_of(heading) == anchor:
            found += [text] if found else [level, text]
    return "".join(found[1:])


def test_the_hours_of_the_figures_on_a_gpu_are_those_of_the_plan():
    section = section_of(DOCS / "reference" / "scaling.md", "the-papers-figures-on-a-gpu")
    rows = dict(re.findall(r"^\| (\S+-Mini\S*) \| ([\d.]+) \|$", section, flags=re.MULTILINE))
    (command,) = (words for words in commands().values() if "runs/mini" in words)
    assert list(rows) == [word for word in command if "-Mini" in word]
    minutes = {}
    for name in rows:
        planned = plan(name, steps=int(command[command.index("--steps") + 1]), tflops=300)
        minutes[name] = planned.training.seconds / 60
        assert rows[name] == f"{minutes[name]:.1f}", name
    assert f"| all, in hours | {sum(minutes.values()) / 60:.1f} |" in section
    mixture, dense = minutes["MoT-Mini/32E/16"], minutes["Transformer-Mini"]
    assert f"where it says {mixture / dense:.2f} of MoT-Mini/32E/16" in section
    assert f"where the plan says {dense * 250 / 150 / 60:.1f}" in section


def test_no_row_of_a_table_stands_twice():
    rows: Counter[str] = Counter()
    for page in (*PAGES, ROOT / "experiments" / "LOG.md"):
        lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("|")]
        rows.update(line for line in lines if re.search(r"\d\.\d", line))
    assert [row for row, times in rows.items() if times > 1] == []
    assert sum(rows.values()) > 60


def test_trainings_that_torchrun_starts_are_given_time_for_a_checkpoint():
    shell = "".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    started = [line for line in shell.splitlines() if "torchrun" in line and " train " in line]
    assert len(started) > 3
    assert [line for line in started if "--shutdown-timeout" not in line] == []
