"""Models by run directory and by name, and the device that they are loaded on."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
import yaml

from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs.loading import load_model, text_of
from processes import mot

MIXED = "MoT-Nano/4E/2"
READS = {
    "generate": ("--prompt", "a", "--max-new-tokens", 1),
    "evaluate": ("--regroupings", 1),
    "audit": ("--batches", 1),
}


def test_code_beside_a_model_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_relative_path_of_text_is_looked_for_where_the_command_runs(tiny_runs, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_runs["TC-Nano/4E"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": ["texts"]}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="its --data as seen from here: texts: there is no such file or folder"):
        text_of("run")


@pytest.mark.parametrize("command", READS)
def test_a_command_runs_on_the_cpu_of_a_machine_with_a_gpu(command, tiny_runs, monkeypatch, capsys):
    run = tiny_runs[MIXED]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mot(command, run, *READS[command], "--device", "cpu")
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [*READS, "export"])
def test_a_device_that_is_not_here_is_refused(command, tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = (tmp_path / "out",) if command == "export" else READS[command]
    with pytest.raises(SystemExit, match="2"):
        mot(command, tiny_runs[MIXED], *words, "--device", "cuda")
    assert "--device cuda: torch sees no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "name", "words", "message"),
    [
        ("generate", MIXED, ["--experts", 2], "--experts says how many experts serve a text alone; give --alone too"),
        ("audit", MIXED, ["--experts", 2], "--experts says how many experts serve a text alone; give --alone too"),
        ("evaluate", MIXED, ["--experts", 9], "a token can go to 1 to 8 experts, not 9"),
        ("evaluate", "TC-Nano/4E", ["--experts", 2], "--experts is for a Mixture of Tokens"),
        ("audit", MIXED, ["--alone", "--experts", 9], "a token can go to 1 to 8 experts, not 9"),
        ("generate", "TC-Nano/4E", ["--alone", "--experts", 2], "--experts is for a Mixture of Tokens"),
    ],
)
def test_few_experts_are_a_mixtures_alone(command, name, words, message, tiny_runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot(command, tiny_runs[name], *READS[command], *words)
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_a_name_that_is_no_directory_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="2"):
        mot("audit", "MoT-Nanoo")
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("mot: error: MoT-Nanoo: there is no such directory. As a name on the Hub it cannot be")


@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_a_mistyped_run_is_answered_with_the_nearest_one(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mime.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        mot(command, "runs/mien")
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("there is no such directory; did you mean runs/mine?")


def test_the_card_of_a_run_s_model_says_how_to_load_it(tiny_runs):
    folder = tiny_runs["MoT-Nano/4E/2"] / "model"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    made: dict = {}
    exec(code.replace("this/directory", str(folder)), made)
    assert isinstance(made["model"], MixtureOfTokensForCausalLM)
    assert len(made["tokenizer"]) == made["model"].config.vocab_size
