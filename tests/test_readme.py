"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

from mixture_of_tokens.report import report

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)  # in one namespace, as a reader would type them
    assert names["y"].shape == (32, 512)
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_first_look_is_what_report_prints_of_the_committed_runs(capsys):
    shown = re.search(r"```\n\$ mot report (.*?) (.*?)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert shown is not None
    report(README.parent / shown[1], README.parent / shown[2])
    assert capsys.readouterr().out == shown[3]
