"""Runs that are killed, stopped, damaged, and go on as if nothing had been."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixture_of_tokens.runs.checkpoints import keep_newest, newest
from mixture_of_tokens.runs.locking import owned
from mixture_of_tokens.runs.preconditions import check_free, check_resumed
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.signals import StopOnSignal
from mixture_of_tokens.utils.manifest import fault
from processes import finish, mot, mot_on_a_full_disk, rows_of, start

STEPS, SAVE = 48, 8
FLAGS = ["train", "TC-Nano/4E", "--steps", STEPS, "--batch-size", 32, "--device", "cpu"]
FLAGS += ["--training.save_steps", SAVE, "--training.logging_steps", 3, "--training.eval_steps", 16]
FLAGS += ["--data", "set by the fixture"]


@pytest.fixture(scope="module", autouse=True)
def data(small_corpus):
    FLAGS[-1] = small_corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(begin(out)) == 0, (out.parent / "log").read_text()
    return out


def begin(out: Path, *words: object):
    return start(mot, *FLAGS, "--out", out, *words, log=out.parent / "log")


def wait_for(happened, process) -> bool:
    """Whether it happened before the process ended."""
    while not happened():
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    return True


def assert_same(run: Path, whole: Path) -> None:
    """Weights bit for bit, every step once with the same figures, a clock that only goes forward."""
    expected, weights = load_file(whole / "model" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k and k != "data_wait"} for row in rows_of(r)]
        for r in (run, whole)
    ]
    assert timeless[0] == timeless[1]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows_of(run)))
    facts = [json.loads((r / "run.json").read_text()) for r in (run, whole)]
    assert facts[0]["final_loss"] == facts[1]["final_loss"]
    assert facts[0]["seconds"] >= rows_of(run)[-1]["seconds"]
    assert not list(run.glob("*.partial"))


def test_the_uninterrupted_run_logs_every_step_once(whole):
    steps = [row["step"] for row in rows_of(whole)]
    assert steps == sorted({*range(3, STEPS + 1, 3), *range(16, STEPS + 1, 16)})
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-48"]


@pytest.mark.slow
def test_killed_five_times_and_resumed_it_ends_as_if_uninterrupted(whole, tmp_path):
    out, choose = tmp_path / "run", random.Random(0)
    for kill in range(5):
        if kill == 2:  # in the midst of writing a checkpoint
            process = start(killed_while_saving, *FLAGS, "--out", out, "--resume", log=tmp_path / "log")
            process.join()
            assert (out / "checkpoint.partial").exists()
        else:
            process = begin(out, "--resume")
            length = len(rows_of(out)) if (out / "metrics.jsonl").exists() else 0
            more = choose.randint(1, 3)
            assert wait_for(lambda n=length + more: (out / "metrics.jsonl").exists() and lines(out) >= n, process)
            time.sleep(choose.uniform(0, 0.1))
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "run.json").exists()
    assert finish(begin(out, "--resume")) == 0, (tmp_path / "log").read_text()
    assert_same(out, whole)
    assert points(out) == points(whole)


def points(run: Path) -> dict[str, list[int]]:
    """The steps that TensorBoard shows of each curve."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    curves = [tag for tag in events.Tags()["scalars"] if tag in ("train/loss", "train/learning_rate", "eval/loss")]
    assert len(curves) == 3
    return {tag: [event.step for event in events.Scalars(tag)] for tag in curves}


def killed_while_saving(*words: object) -> None:
    from mixture_of_tokens.training import trainer

    trainer.save_optimizer = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    mot(*words)


def lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_at_once_and_the_run_goes_on_from_that_step(whole, tmp_path, number):
    out = tmp_path / "run"
    process = begin(out)
    assert wait_for(lambda: (out / "metrics.jsonl").exists() and lines(out) >= 3, process)
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    log = (tmp_path / "log").read_text()
    step = max(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    assert f"stopped by {number.name} after step {step}, which is saved; --resume goes on" in log
    assert not (out / "run.json").exists()
    if number == signal.SIGTERM:
        assert finish(begin(out, "--resume")) == 0
        assert_same(out, whole)


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_step():
    stop, before = StopOnSignal(lambda step: None), signal.getsignal(signal.SIGINT)
    with stop.installed():
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_after_text_at_fault_a_signal_is_noted_and_breaks_nothing_off():
    def at_fault(step: int) -> None:
        raise ValueError("no UTF-8")

    stop, control = StopOnSignal(at_fault), SimpleNamespace(should_save=False, should_training_stop=False)
    with stop.installed():
        stop.on_step_end(None, SimpleNamespace(global_step=1), control)
        signal.raise_signal(signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    assert not control.should_save
    stop.on_step_end(None, SimpleNamespace(global_step=2), control)
    assert control.should_save
    assert control.should_training_stop


WORKERS = ["--training.dataloader_num_workers", 2]


def mot_in_a_group(*words: object) -> None:
    """With its loader's workers, a process group of its own, as under systemd and batch systems."""
    os.setpgid(0, 0)
    mot(*words)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "method"), [(signal.SIGTERM, "forkserver"), (signal.SIGINT, "fork")])
def test_a_signal_to_the_whole_group_is_answered_by_the_main_process_alone(whole, tmp_path, number, method):
    out = tmp_path / "run"
    how = [*WORKERS, "--training.dataloader_multiprocessing_context", method]
    process = start(mot_in_a_group, *FLAGS, "--out", out, *how, log=tmp_path / "log")
    assert wait_for(lambda: (out / "metrics.jsonl").exists() and lines(out) >= 3, process)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    told = [line for line in (tmp_path / "log").read_text().splitlines() if "mot:" in line or "rror" in line]
    (checkpoint,) = [path for path in out.glob("checkpoint-*") if str(path.name.partition("-")[2]) in told[-1]]
    assert len(told) == 1
    assert f"stopped by {number.name} after step {checkpoint.name.partition('-')[2]}, which is saved" in told[0]
    assert fault(checkpoint) is None
    if number == signal.SIGTERM:
        assert finish(begin(out, "--resume", *WORKERS)) == 0
        assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_main_process_that_is_killed(tmp_path, method):
    out = tmp_path / "run"
    how = [*WORKERS, "--training.dataloader_multiprocessing_context", method]
    process = start(mot_in_a_group, *FLAGS, "--out", out, *how, log=tmp_path / "log")
    assert wait_for(lambda: (out / "metrics.jsonl").exists() and lines(out) >= 1, process)
    assert len(alive_in(process.pid)) > 2
    process.kill()
    assert finish(process) == -signal.SIGKILL
    with owned(out):  # which workers that are forked inherit
        pass
    wait_for_the_end_of_all(process.pid)


def wait_for_the_end_of_all(group: int) -> None:
    deadline = time.monotonic() + 20
    while left := alive_in(group):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive_in(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    shown = subprocess.run(["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if line.split()[0] == str(group) and "Z" not in line]


def on_a_full_disk_in_a_group(*words: object) -> None:
    os.setpgid(0, 0)
    mot_on_a_full_disk(1_000_000, *words)


@pytest.mark.slow
def test_workers_do_not_outlive_or_hold_up_a_run_that_fails(tmp_path):
    process = start(on_a_full_disk_in_a_group, *FLAGS, "--out", tmp_path / "run", *WORKERS, log=tmp_path / "log")
    assert wait_for(lambda: len(alive_in(process.pid)) > 2, process)
    assert finish(process) == 2
    wait_for_the_end_of_all(process.pid)
    assert "checkpoint-8 could not be written: " in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_row_of_metrics_that_cannot_be_written_again_is_named(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    written = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    written[1] = "{}\n"
    (out / "metrics.jsonl").write_text("".join(written))
    with pytest.raises(SystemExit, match="2"):
        mot(*FLAGS, "--out", out, "--resume")
    assert "metrics.jsonl, line 2, is damaged" in capsys.readouterr().err.splitlines()[-1]
    assert "".join(written) == (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("lost", [slice(None), slice(1, 2)])
def test_a_run_does_not_go_on_without_its_rows_of_metrics(whole, tmp_path, capsys, lost):
    """They cannot be written again, and a report would read other curves."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    left = len(rows) - len(rows[lost])
    (out / "metrics.jsonl").write_text("".join(row for row in rows if row not in rows[lost]))
    with pytest.raises(SystemExit, match="2"):
        mot(*FLAGS, "--out", out, "--resume")
    what = f"metrics.jsonl has {left} of the {len(rows)} rows up to step {STEPS}: put it back, or name another"
    assert what in capsys.readouterr().err
    (out / "metrics.jsonl").write_text("".join(rows))
    mot(*FLAGS, "--out", out, "--resume")
    assert_same(out, whole)


@pytest.mark.slow
def test_killed_thirty_times_at_any_moment_it_ends_as_if_uninterrupted(whole, tmp_path):
    """Two of three kills fall into training, at a moment after a new checkpoint; the others fall at any time before.

    A checkpoint is written after every step, so that many kills fall into one, and thirty do not undo all progress. On
    a quick machine the run may end before the last of them.
    """
    words = [1 if before == "--training.save_steps" else word for before, word in pairwise(["", *FLAGS])]
    out, choose, saved, inside = tmp_path / "run", random.Random(1), [0], 0
    for kill in range(30):
        workers = WORKERS if kill % 2 else []
        process = start(mot, *words, "--out", out, "--resume", *workers, log=tmp_path / "log")
        if kill % 3:
            begun = wait_for(lambda: out.exists() and last_step(out) > saved[-1], process)
            assert begun or process.exitcode == 0, (tmp_path / "log").read_text()
            time.sleep(choose.uniform(0, 0.1))
        else:
            process.join(choose.uniform(0, 1))
        process.kill()
        if finish(process) == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        inside += (out / "checkpoint.partial").exists()
        saved.append(last_step(out) if out.exists() else 0)
    print(f"steps that were saved at the kills: {saved[1:]}; {inside} kills while a checkpoint was written")
    assert saved == sorted(saved)
    assert len(set(saved)) > 15
    assert inside > 0
    assert (out / "run.json").exists() == (process.exitcode == 0)
    assert finish(begin(out, "--resume")) == 0, (tmp_path / "log").read_text()
    assert_same(out, whole)


def last_step(run: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*")), default=0)


def test_an_interrupt_while_the_command_line_is_imported_is_one_line():
    program = """
import sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "cyclopts":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from mixture_of_tokens.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mot: stopped\n")


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_said(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    shutil.rmtree(out / "model")
    weights = out / "checkpoint-48" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert finish(begin(out, "--resume")) == 0
    assert "checkpoint-48 is skipped: model.safetensors is not what was written" in (tmp_path / "log").read_text()
    assert_same(out, whole)


def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    shutil.rmtree(out / "model")
    for checkpoint in out.glob("checkpoint-*"):
        os.truncate(checkpoint / "model.safetensors", 1000)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        mot(*FLAGS, "--out", out, "--resume")
    assert "cannot go on: none of its checkpoints is whole; put back" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit, match="2"):
        mot("generate", out, "--prompt", "def ")
    assert "it is not finished, and none of its checkpoints is whole" in capsys.readouterr().err


def test_resuming_what_is_not_there_says_that_it_begins(small_corpus, tmp_path, capsys):
    words = ["train", "Transformer-Nano", "--steps", 1, "--batch-size", 8, "--device", "cpu", "--data", small_corpus]
    mot(*words, "--out", tmp_path / "run", "--resume")
    assert f"{tmp_path / 'run'} is not there yet: training begins at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["manifest.json", "optimizer/optimizer.json"])
def test_every_missing_file_is_noticed(whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path / "run")
    assert fault(tmp_path / "run" / "checkpoint-48") is None
    (tmp_path / "run" / "checkpoint-48" / damage).unlink()
    assert damage in str(fault(tmp_path / "run" / "checkpoint-48"))
    assert newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-40"


def test_damaged_checkpoints_ahead_do_not_push_out_the_one_that_is_written(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in (16, 24):
        shutil.copytree(whole / "checkpoint-40", out / f"checkpoint-{step}")
    for step in (40, 48):
        (out / f"checkpoint-{step}" / "optimizer" / "optimizer.json").unlink()
    keep_newest(out, 24, 2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-24"]


def test_a_kill_in_the_first_file_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml.partial").write_text("name:")
    check_free(tmp_path / "run")
    check_resumed(tmp_path / "run", {})
    (tmp_path / "run" / "config.yaml").write_text("some: thing")
    with pytest.raises(ValueError, match=r"config\.yaml has no format"):
        check_resumed(tmp_path / "run", {})


@pytest.mark.slow
def test_a_run_goes_on_with_other_intervals(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("run.json", "checkpoint-48/manifest.json"):
        (out / name).unlink()
    words = [3 if before == "--training.save_steps" else word for before, word in pairwise(["", *FLAGS])]
    words += ["--training.save_total_limit", 9, "--out", out, "--resume"]
    process = start(mot, *words, log=tmp_path / "log")
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert {"checkpoint-42", "checkpoint-45", "checkpoint-48"} <= {path.name for path in out.glob("checkpoint-*")}
    assert_same(out, whole)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    mot(*FLAGS, "--out", whole, "--resume")
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "0.003"], "was started with --learning-rate 0.01, now it is 0.003; give the same flags"),
        (["--model.router_temperature", "0.5"], "--model.router_temperature 1.0, now it is 0.5"),
        (["--training.weight_decay", "0.5"], "--training.weight_decay 0.1, now it is 0.5"),
    ],
)
def test_a_run_is_not_resumed_as_another(whole, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        mot(*FLAGS, "--out", whole, "--resume", *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_text(small_corpus, tmp_path, capsys):
    shutil.copytree(small_corpus, tmp_path / "texts")
    words = ["train", "MoT-Nano/4E", "--steps", 2, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "run"]
    words += ["--data", tmp_path / "texts"]
    mot(*words)
    (tmp_path / "run" / "run.json").unlink()  # as if it had been stopped before its end
    with (tmp_path / "texts" / "7.txt").open("a") as file:
        file.write(" and more")
    for again in ((*words, "--resume"), ("evaluate", tmp_path / "run" / "checkpoint-2", "--device", "cpu")):
        with pytest.raises(SystemExit, match="2"):
            mot(*again)
    trained, evaluated = (line for line in capsys.readouterr().err.splitlines() if "mot: error:" in line)
    assert "checkpoint-2 was trained on text and tokenizer" in trained
    assert "the text of" in evaluated
    assert "has changed: its hash is" in evaluated


@pytest.mark.slow
def test_a_refused_text_leaves_the_run_as_it_was(small_corpus, tmp_path, capsys):
    for name in ("one", "other"):
        shutil.copytree(small_corpus, tmp_path / name)
    (tmp_path / "other" / "7.txt").write_text("another text")
    words = ["train", "MoT-Nano/4E", "--steps", 2, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "run"]
    mot(*words, "--data", tmp_path / "one")
    (tmp_path / "run" / "run.json").unlink()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        mot(*words, "--data", tmp_path / "other", "--resume")
    assert "put back what it was trained on, or name another directory with --out" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_before_the_first_checkpoint_a_run_begins_anew_on_its_own_text_and_says_so(small_corpus, tmp_path, capsys):
    for name in ("one", "other"):
        shutil.copytree(small_corpus, tmp_path / name)
    words = ["train", "MoT-Nano/4E", "--steps", 2, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "run"]
    mot(*words, "--data", tmp_path / "one")
    whole = json.loads((tmp_path / "run" / "run.json").read_text())
    for path in (tmp_path / "run").iterdir():
        if path.name != "config.yaml":  # as if killed early
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        mot(*words, "--data", tmp_path / "other", "--resume")
    assert "was started with --data" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    mot(*words, "--data", tmp_path / "one", "--resume")
    assert f"{tmp_path / 'run'} has no checkpoint yet: training begins anew" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["final_loss"] == whole["final_loss"]


@pytest.mark.slow
def test_text_may_lie_elsewhere_when_a_run_goes_on(small_corpus, tmp_path, capsys):
    shutil.copytree(small_corpus, tmp_path / "texts")
    words = ["train", "MoT-Nano/4E", "--steps", 2, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "run"]
    mot(*words, "--data", tmp_path / "texts")
    (tmp_path / "texts").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match="2"):  # of a finished run nothing is compared but the names
        mot(*words, "--data", tmp_path / "moved", "--resume")
    assert "was started with --data" in capsys.readouterr().err
    before = json.loads((tmp_path / "run" / "run.json").read_text())["final_loss"]
    (tmp_path / "run" / "run.json").unlink()
    mot(*words, "--data", tmp_path / "moved", "--resume")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["final_loss"] == before
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == [str(tmp_path / "moved")]


def test_a_foreign_directory_is_not_resumed(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").write_text("dear mum")
    with pytest.raises(SystemExit) as stopped:
        mot(*FLAGS, "--out", tmp_path / "letters", "--resume")
    assert stopped.value.code == 2
    assert "is no run directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mum.txt"]


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_state(tmp_path, capsys):
    flags = [*FLAGS[:2], *FLAGS[-2:], "--steps", 40, "--batch-size", 32, "--device", "cpu", "--out", tmp_path / "run"]
    flags += ["--training.lr_scheduler_type", "constant_with_warmup", "--training.lr_scheduler_kwargs", "{}"]
    flags += ["--training.warmup_steps", 20, "--learning-rate", 1e10, "--training.max_grad_norm", 0]
    flags += ["--training.logging_steps", 5, "--training.save_steps", 1]
    with pytest.raises(SystemExit) as stopped:
        mot(*flags)
    assert stopped.value.code == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "try a lower learning rate" in err
    checkpoint = newest(tmp_path / "run")
    assert checkpoint is not None
    assert f"step {int(checkpoint.name.removeprefix('checkpoint-')) + 1}" in err
    weights = load_file(checkpoint / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_loss_that_only_the_last_evaluation_sees_is_no_result(tmp_path, capsys):
    flags = [*FLAGS[:2], *FLAGS[-2:], "--steps", 3, "--batch-size", 32, "--device", "cpu", "--out", tmp_path / "run"]
    flags += ["--training.eval_strategy", "no", "--training.save_strategy", "no", "--training.logging_steps", 9]
    with pytest.raises(SystemExit) as stopped:
        mot(*flags, "--learning-rate", 1e30)
    assert stopped.value.code == 1
    assert "the evaluation loss is nan after step 3: try a lower learning rate" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_what_a_kill_left_of_a_model_is_not_published(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    shutil.rmtree(out / "model")
    (out / "model.partial").mkdir()
    (out / "model.partial" / ".tmpA1b2C3").write_text("half a file of safetensors")
    process = start(mot, *FLAGS, "--out", out, "--resume", log=tmp_path / "log")
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert_same(out, whole)
    assert {path.name for path in (out / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}


def test_a_run_that_needs_less_memory_goes_on(whole, tmp_path):
    """Recomputation decides how a run is carried out, not what it computes."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "config.yaml", out)
    shutil.copytree(whole / "checkpoint-48", out / "checkpoint-48")
    started = RunConfig.read(out / "config.yaml")
    check_resumed(out, replace(started, training=started.training | {"gradient_checkpointing": True, "run_name": "b"}))
    with pytest.raises(ValueError, match=r"was started with --training\.weight_decay 0\.1, now it is 0\.5"):
        check_resumed(out, replace(started, training=started.training | {"weight_decay": 0.5}))


def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path):
    out = tmp_path / "run"
    words = [str(word) for word in (*FLAGS, "--out", out)]
    process = start(mot_on_a_full_disk, 1_000_000, *words, log=tmp_path / "log")
    assert finish(process) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("mot: error:")
    assert f"{out / 'checkpoint-8'} could not be written" in last
    assert not list(out.glob("checkpoint*"))


def test_a_full_disk_that_tensorboard_meets_first_is_one_line(tmp_path):
    words = [str(word) for word in (*FLAGS, "--out", tmp_path / "run")]
    assert finish(start(mot_on_a_full_disk, 6000, *words, log=tmp_path / "log")) == 2
    said = (tmp_path / "log").read_text()
    assert (
        said.splitlines()[-1] == f"mot: error: {tmp_path / 'run' / 'tensorboard'} could not be written: File too large"
    )
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_full_disk_is_told_of_metrics(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    shutil.rmtree(out / "checkpoint-48")
    kept = sum(len(json.dumps(row)) + 1 for row in rows_of(out) if row["step"] <= 40)
    words = [str(word) for word in (*FLAGS, "--out", out, "--resume")]
    assert finish(start(mot_on_a_full_disk, kept + 50, *words, log=tmp_path / "log")) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("mot: error:")
    assert "metrics.jsonl could not be written" in last
    assert finish(begin(out, "--resume")) == 0
    assert_same(out, whole)


def test_token_choice_keeps_its_micro_batch_and_others_need_not(tmp_path):
    """The balancing loss, the capacity and thresholds are of a micro-batch; groups are not."""
    for name, refused in (("TC-Nano/4E", True), ("ET-Nano/4E", True), ("MoT-Nano/4E", False)):
        out = tmp_path / name.replace("/", "-")
        out.mkdir()
        whole, parts = (
            merge(name, 0, None, Options(steps=4, batch_size=32, training={"gradient_accumulation_steps": str(count)}))
            for count in (1, 4)
        )
        (out / "config.yaml").write_text(str(whole.config))
        check_resumed(out, whole.config)
        if refused:
            with pytest.raises(ValueError, match="micro-batches of 32 rows, now they have 8"):
                check_resumed(out, parts.config)
        else:
            check_resumed(out, parts.config)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["gone", "flipped", pytest.param("unsigned", marks=pytest.mark.slow)])
def test_a_finished_run_with_a_damaged_model_is_not_finished_already(damage, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    if damage == "gone":
        shutil.rmtree(out / "model")
    else:
        flipped(out / "model" / "model.safetensors")
    if damage == "unsigned":
        (out / "model" / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        mot(*FLAGS, "--out", out, "--resume")
    said = capsys.readouterr().err
    assert "finished already" not in said
    assert "model" in said.splitlines()[-1]
    (out / "run.json").unlink()  # as the line says
    mot(*FLAGS, "--out", out, "--resume")
    assert_same(out, whole)


@pytest.mark.parametrize("content", ["{}", "{", '{"name": "an app"}', ""])
def test_a_model_whose_manifest_was_replaced_is_not_used(content, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    mot("generate", out, "--prompt", "a", "--max-new-tokens", 1)
    for folder in ("model", "checkpoint-48"):
        flipped(out / folder / "model.safetensors")
        (out / folder / "manifest.json").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            mot("generate", out if folder == "model" else out / folder, "--prompt", "a", "--max-new-tokens", 1)
        assert "is damaged" in capsys.readouterr().err


def test_an_error_of_the_disk_stops_a_resumption_and_removes_nothing(whole, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "run.json").unlink()
    file = out / "checkpoint-48" / "model.safetensors"
    open_file = Path.open

    def failing(path: Path, *words, **others):
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_file(path, *words, **others)

    before = sorted(path for path in out.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(SystemExit, match="2"):
            mot(*FLAGS, "--out", out, "--resume")
    assert str(file) in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path for path in out.rglob("*")) == before
    mot(*FLAGS, "--out", out, "--resume")
    assert_same(out, whole)
