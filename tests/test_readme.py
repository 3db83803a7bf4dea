"""What the README shows runs as it stands, and prints what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixture_of_tokens import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DRY = ("train", "sweep", "compare")
READING = dict.fromkeys(("generate", "evaluate", "audit", "transition"), "MoT-Nano/4E/2") | {"export": "TC-Nano/4E"}


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # in one namespace, as a reader would type them
    assert names["y"].shape == (32, 512)
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def commands() -> list[list[str]]:
    made = subprocess.run(["make", "-n", "-o", "install", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)) + made.stdout
    lines = [shlex.split(line) for line in shell.splitlines() if "mot " in line]
    return [words[1:] for words in lines if words[0].endswith("bin/mot")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
@pytest.mark.usefixtures("tiny_cache")
def test_commands_are_legal(words, tiny_runs, tmp_path, monkeypatch, capsys):
    """Those that train merge and check everything, and stop; the others do what they do."""
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "ARCHITECTURE.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "prompts.txt").write_text("def \nclass \n")
    if words[0] in READING:
        (tmp_path / words[1]).parent.mkdir()
        (tmp_path / words[1]).symlink_to(tiny_runs[READING[words[0]]])
    if words[0] == "report":
        shutil.copytree(ROOT / "experiments" / "nano", tmp_path / words[1])
    cli.main([*words, "--dry-run"] if words[0] in DRY and "--help" not in words else words)
    shown = capsys.readouterr()
    assert shown.out or shown.err


def test_the_result_is_what_report_prints_of_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.search(r"```\n\$ mot report (\S+)\n(.*?)```", README, flags=re.DOTALL)
    assert shown is not None
    cli.main(["report", shown[1], "--out", str(tmp_path / "report.html")])
    assert capsys.readouterr().out.split("The page: ")[0].strip() == shown[2].strip()


REACHED = "reached.py nano prose long"
TRANSITION = "transition.py transition"
VERDICT = "verdict.py --table --out verdict"


@pytest.mark.parametrize(("words", "lines"), [(REACHED, 11), (TRANSITION, 16), (VERDICT, 11)])
def test_the_tables_are_what_their_scripts_make_of_the_committed_runs(words, lines):
    command = [sys.executable, *words.split()]
    table = subprocess.run(command, cwd=ROOT / "experiments", capture_output=True, text=True, check=True).stdout
    assert table.count("\n") == lines
    assert table in README
