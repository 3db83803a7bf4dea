"""Run directories of somebody else: no file of one can run anything, whatever stands in it."""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from transformers import modeling_utils
from transformers.distributed.checkpoint import save_optimizer_distributed

from mixture_of_tokens.parallel.optimizer_state import load_optimizer, save_optimizer
from mixture_of_tokens.training import trainer
from mixture_of_tokens.utils import manifest
from processes import mot, rows_of

NAME, STEPS = "MoT-Nano/4E/2", 4
FLAGS = ["train", NAME, "--steps", STEPS, "--batch-size", 32, "--device", "cpu"]
FLAGS += ["--training.save_steps", 2, "--training.eval_steps", 2, "--training.logging_steps", 1]
COMMANDS: dict[str, Callable[[Path, Path], tuple]] = {
    "transition": lambda run, out: (run, "--steps", 1, "--calibrate", "none", "--device", "cpu", "--out", out),
    "generate": lambda run, out: (run, "--prompt", "a", "--max-new-tokens", 1, "--device", "cpu"),
    "evaluate": lambda run, out: (run, "--regroupings", 1, "--device", "cpu"),
    "report": lambda run, out: (run, "--out", out),
    "export": lambda run, out: (run, out, "--distil-steps", 1),
}
OF_A_CHECKPOINT = ("generate", "evaluate", "export")


class Payload:
    """What makes a folder where it is unpickled."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def as_pickle(ran: Path, file: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(ran)))


def as_torch_saves(ran: Path, file: Path) -> None:
    with file.open("wb") as opened:  # torch does not open names that begin with a dot
        torch.save({"python": Payload(ran), "base_lrs": Payload(ran)}, opened)


PICKLES = [as_pickle, as_torch_saves]


def save_as_before(model, optimizer, checkpoint: Path) -> None:
    """As the versions did that knew of no other format than torch.distributed.checkpoint's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_optimizer_distributed(model, optimizer, str(checkpoint / "optimizer"))


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory) -> dict[str, Path]:
    """Two finished runs that differ in how checkpoints keep their optimizer's state: now, and before."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_optimizer", save_as_before)
        patch.setattr(trainer, "check_optimizer", lambda checkpoint: None)
        mot(*FLAGS, "--data", small_corpus, "--out", folder / "before")
    mot(*FLAGS, "--data", small_corpus, "--out", folder / "now")
    return {name: folder / name for name in ("now", "before")}


HALF = f"checkpoint-{STEPS // 2}"  # from which all of a checkpoint is read: there are steps left


def started(run: Path, out: Path) -> Path:
    """A copy of a finished run as it was after half of its steps."""
    shutil.copytree(run, out)
    (out / "run.json").unlink()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    return out


def sign(file: Path, run: Path) -> None:
    """Make the manifest beside or above a file, if there is one, one of what stands there now."""
    folder = next((folder for folder in file.parents if (folder / manifest.NAME).is_file()), None)
    if folder is None or run not in (folder, *folder.parents) or file.name == manifest.NAME:
        return
    facts = {name: fact for name, fact in manifest.read(folder).items() if name != "files"}
    names = manifest.read(folder)["files"]
    others = [path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in names]
    kept = {path: path.read_bytes() for path in others if path.name == "README.md"}  # in no manifest
    manifest.write(folder, **facts)
    assert manifest.fault(folder) is None
    assert all(path.read_bytes() == content for path, content in kept.items())


def status_of(command: str, *words: object) -> int:
    """Anything that is raised but a command's end fails the test."""
    try:
        mot(command, *words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def test_the_payloads_run_where_they_are_trusted(tmp_path):
    for write, load in ((as_pickle, pickle.loads), (as_torch_saves, None)):
        write(tmp_path / write.__name__, tmp_path / "file")
        if load is not None:
            load((tmp_path / "file").read_bytes())
        else:
            with pytest.raises(FileExistsError):  # there are two
                torch.load(tmp_path / "file", weights_only=False)
        assert (tmp_path / write.__name__).is_dir()


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != ".lock")


READ_BY_RESUME = ("optimizer.json", ".metadata", ".distcp", ".safetensors", "scheduler.pt", "rng_state.pth")


def check_that_nothing_runs(
    run: Path, names: list[str], commands: Iterable[str], run_command: Callable, capsys
) -> None:
    """Each file in turn is replaced, and all commands are tried."""
    assert names
    copy, out, ran = (run.parent / name for name in ("copy", "out", "ran"))
    for name, write in product(names, PICKLES):
        if write is as_torch_saves and not name.endswith(READ_BY_RESUME):
            continue
        shutil.copytree(run, copy)
        write(ran, copy / name)
        sign(copy / name, copy)
        for command in commands:
            assert run_command(command, copy, out) in (0, 2), (name, command)
            assert not ran.exists(), f"{command} has run {name}"
            said = capsys.readouterr().err
            assert "Traceback" not in said
            if command == "train" and name.startswith(f"{HALF}/optimizer"):
                assert len([line for line in said.splitlines() if "mot: error" in line and "optimizer" in line]) == 1
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
        shutil.rmtree(copy)


@pytest.fixture
def tried(runs, small_corpus, tmp_path, caplog) -> Iterator[Callable]:
    """Calls a command on a run; `train` goes on with it. Its log has no tracebacks."""

    def call(command: str, run: Path, out: Path) -> int:
        if command == "train":
            return status_of(*FLAGS, "--data", small_corpus, "--out", run, "--resume")
        finished = (run / f"checkpoint-{STEPS}").exists()
        return status_of(command, *COMMANDS[command](run if finished else run / HALF, out))

    yield call
    assert not [record for record in caplog.records if record.name == "root" and record.exc_info]


@pytest.mark.parametrize("kind", ["now", "before"])
def test_no_file_that_a_resumption_reads_runs_anything(kind, runs, tried, tmp_path, capsys):
    run = started(runs[kind], tmp_path / "run")
    names = [name for name in files_of(run) if name.startswith(f"{HALF}/") and name.endswith(READ_BY_RESUME)]
    check_that_nothing_runs(run, names, ["train"], tried, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["now", "before"])
def test_no_optimizer_that_a_transition_reads_runs_anything(kind, runs, tried, tmp_path, capsys):
    names = [name for name in files_of(runs[kind]) if f"checkpoint-{STEPS}/optimizer" in name]
    run = shutil.copytree(runs[kind], tmp_path / "run")
    check_that_nothing_runs(run, names, ["transition"], tried, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["now", "before"])
def test_no_file_of_a_run_directory_runs_anything(kind, runs, tried, tmp_path, capsys):
    run = shutil.copytree(runs[kind], tmp_path / "finished")
    saved = [name for name in files_of(run) if name.startswith("checkpoint-")]
    check_that_nothing_runs(run, sorted({*files_of(run)} - {*saved}), COMMANDS, tried, capsys)
    check_that_nothing_runs(run, saved, ["transition"], tried, capsys)
    for name in saved:  # all at once: the others read none of them
        as_pickle(tmp_path / "ran", run / name)
    for command in COMMANDS.keys() - {"transition"}:
        assert tried(command, run, tmp_path / command) == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["now", "before"])
def test_no_file_of_a_run_that_has_not_ended_runs_anything(kind, runs, tried, tmp_path, capsys):
    run = started(runs[kind], tmp_path / "run")
    check_that_nothing_runs(run, files_of(run), ["train"], tried, capsys)
    served = [name for name in files_of(run / HALF) if fnmatch(name, "*config.json") or fnmatch(name, "[mt]*")]
    check_that_nothing_runs(run, [f"{HALF}/{name}" for name in served], OF_A_CHECKPOINT, tried, capsys)


def test_new_checkpoints_have_no_pickle_but_torchs_own_of_numbers(runs):
    found = []
    for name in files_of(runs["now"]):
        if (runs["now"] / name).read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            found.append(Path(name).name)
            torch.load(runs["now"] / name, weights_only=Path(name).name != "rng_state.pth")
    assert set(found) == {"rng_state.pth", "scheduler.pt"}


@pytest.mark.parametrize("kind", [pytest.param("now", marks=pytest.mark.slow), "before"])
def test_a_run_goes_on_from_checkpoints_of_either_kind(kind, runs, small_corpus, tmp_path):
    """Bit for bit, and from then on checkpoints are of the new kind."""
    out = started(runs[kind], tmp_path / "run")
    mot(*FLAGS, "--data", small_corpus, "--out", out, "--resume")
    ends = [load_file(run / "model" / "model.safetensors") for run in (out, runs["now"])]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [row["train_loss"] for row in rows_of(out)] == [row["train_loss"] for row in rows_of(runs["now"])]
    assert (out / f"checkpoint-{STEPS}" / "optimizer" / "optimizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["now", "before"])
def test_a_transition_carries_the_optimizer_of_either_kind(kind, runs, tmp_path):
    out = tmp_path / "out"
    mot("transition", *COMMANDS["transition"](runs[kind], out))
    other = tmp_path / "other"
    mot("transition", *COMMANDS["transition"](runs["now"], other))
    ends = [load_file(run / "model" / "model.safetensors") for run in (out, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def made_and_stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, betas=(0.5, 0.75))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize("save", [save_optimizer, save_as_before])
def test_an_optimizers_state_comes_back_with_the_types_it_had(save, tmp_path):
    model, optimizer = made_and_stepped()
    save(model, optimizer, tmp_path)
    other, again = fresh()
    load_optimizer(other, again, tmp_path)
    before, after = optimizer.state_dict(), again.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert type(after["param_groups"][0]["betas"]) is tuple
    for number, state in before["state"].items():
        assert all(torch.equal(after["state"][number][name], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_no_tensor_in_an_earlier_checkpoint_runs_nothing(tmp_path):
    """torch.distributed.checkpoint loads such values with all that a pickle can do."""
    model, optimizer = made_and_stepped()
    optimizer.param_groups[0]["eps"] = Payload(tmp_path / "ran")
    save_as_before(model, optimizer, tmp_path)
    with pytest.raises(OSError, match="optimizer cannot be read"):
        load_optimizer(*fresh(), tmp_path)
    assert not (tmp_path / "ran").exists()
    state = {"optimizer": {"param_groups.weight.eps": 0}}
    dcp.load(state, checkpoint_id=tmp_path / "optimizer", planner=DefaultLoadPlanner())  # the control
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", "x"), ("lr", None), ("lr", True), ("betas", [0.5]), ("betas", [0.5, "x"]), ("amsgrad", 3), ("fused", "x")],
)
def test_an_optimizers_values_of_another_type_are_refused(field, value, tmp_path):
    save_optimizer(*made_and_stepped(), tmp_path)
    file = tmp_path / "optimizer" / "optimizer.json"
    written = json.loads(file.read_text())
    written["values"][f"param_groups.weight.{field}"] = value
    file.write_text(json.dumps(written))
    with pytest.raises(OSError, match="optimizer cannot be read: "):
        load_optimizer(*fresh(), tmp_path)


def test_state_that_no_safe_file_holds_is_refused(tmp_path):
    model, optimizer = made_and_stepped()
    optimizer.param_groups[0]["eps"] = object()
    with pytest.raises(ValueError, match="the state of AdamW cannot be saved"):
        save_optimizer(model, optimizer, tmp_path)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "scaler.pt", "trainer_state.json"])
@pytest.mark.parametrize("content", [[1, 2], {}, {"python": 1, "base_lrs": 1, "scale": "x"}, "text"], ids=str)
def test_something_else_in_a_checkpoint_is_one_line(name, content, runs, small_corpus, tmp_path, capsys):
    out = started(runs["now"], tmp_path / "run")
    file = out / HALF / name
    if name.endswith(".json"):
        file.write_text(json.dumps(content))
    else:
        torch.save(content, file)
    sign(file, out)
    assert status_of(*FLAGS, "--data", small_corpus, "--out", out, "--resume") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "mot: error" in line]
    assert len(told) == 1
    assert name in told[0]
    assert "weights_only" not in told[0]


def test_another_models_weights_in_a_checkpoint_are_refused(runs, tiny_runs, small_corpus, tmp_path, capsys):
    out = started(runs["now"], tmp_path / "run")
    file = out / HALF / "model.safetensors"
    shutil.copy(tiny_runs["TC-Nano/4E"] / "model" / "model.safetensors", file)
    sign(file, out)
    assert status_of(*FLAGS, "--data", small_corpus, "--out", out, "--resume") == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_no_configuration_names_code_on_the_hub(runs, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *words, **_: asked.append(words))
    run = shutil.copytree(runs["now"], tmp_path / "run")
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "some/kernel"}))
    sign(file, run)
    assert status_of("generate", *COMMANDS["generate"](run, tmp_path)) == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["attn_implementation"] = "some/kernel"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert status_of("transition", *COMMANDS["transition"](run, tmp_path / "out")) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "attn_implementation" in line]) == 2
    assert asked == []
