"""Runs over several processes: what they write, where they go on, and how they end when something fails."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.training import trainer as training
from mixture_of_tokens.training.trainer import RunTrainer
from processes import LAYOUTS, free_port, in_processes, mot, rows_of, start

pytestmark = pytest.mark.slow  # several processes for each test

NAME, STEPS, PARTS = "MoT-Nano/4E/2", 4, 4
OF_FOUR = [layout for layout, (count, _) in LAYOUTS.items() if count == 4]
OTHERS = [layout for layout in LAYOUTS if layout not in OF_FOUR]


def words(layout: str, data: object, out: Path, *more: object) -> list[str]:
    count, flags = LAYOUTS[layout]
    given = ["train", NAME, "--steps", STEPS, "--batch-size", 32, "--device", "cpu", "--data", data, "--out", out]
    given += ["--training.gradient_accumulation_steps", PARTS // count, "--training.save_steps", 2]
    given += ["--training.logging_steps", 1, "--training.eval_steps", 2, "--training.report_to", "none"]
    return [str(word) for word in [*given, *flags, *more]]


def train_all(commands: list[list[str]]) -> None:
    """In every process: one training after the other."""
    for command in commands:
        mot(*command)


def losses(run: Path) -> dict[int, list[float]]:
    return {
        row.step: [loss for loss in (row.train_loss, row.eval_loss) if loss is not None] for row in read_run(run).rows
    }


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory) -> Path:
    """An uninterrupted run of every layout of one process or two, and one of shards in bf16."""
    directory = tmp_path_factory.mktemp("runs")
    alone, *others = [words(layout, small_corpus, directory / layout) for layout in OTHERS]
    others.append(words("shards", small_corpus, directory / "bf16", "--model.dtype", "bfloat16"))
    for count, commands in ((1, [alone]), (2, others)):
        in_processes(train_all, (commands,), count, directory / "log")
    return directory


@pytest.fixture(scope="module")
def all_runs(runs, small_corpus) -> Path:
    """Of four processes too."""
    in_processes(train_all, ([words(layout, small_corpus, runs / layout) for layout in OF_FOUR],), 4, runs / "log")
    return runs


def go_on(runs: Path, pairs: Sequence[tuple[str, str]], data: Path, directory: Path) -> None:
    """From a checkpoint of the first layout of a pair, in the second one; each has to end as one process does."""
    for count in (1, 2, 4):
        commands = []
        for source, layout in pairs:
            if LAYOUTS[layout][0] == count:
                out = directory / f"{source}-to-{layout}"
                out.mkdir()
                shutil.copytree(runs / source / "checkpoint-2", out / "checkpoint-2")
                for file in ("config.yaml", "metrics.jsonl"):
                    shutil.copy(runs / source / file, out)
                commands.append(words(layout, data, out, "--resume"))
        if commands:
            in_processes(train_all, (commands,), count, directory / "log")
    expected = losses(runs / "one")
    assert list(expected) == [1, 2, 3, 4]
    for source, layout in pairs:
        out = directory / f"{source}-to-{layout}"
        found = losses(out)
        assert found.keys() == expected.keys()
        for step, loss in found.items():  # which no layout could give by chance: the moments of Adam went along
            assert loss == pytest.approx(expected[step], rel=1e-5), (source, layout, step)
        assert read_run(out).facts.final_loss == pytest.approx(read_run(runs / "one").facts.final_loss, rel=1e-5)
        log = (directory / "log").read_text()
        assert log.count(f"Going on from {out / 'checkpoint-2'}") == 1
        assert "do not match the ones" not in log  # transformers' of a checkpoint's micro-batch, which may be another


def check_same(run: Path, other: Path) -> None:
    """To the last bit."""
    assert losses(run) == losses(other)
    weights, others = ((each / "model" / "model.safetensors").read_bytes() for each in (run, other))
    assert weights == others


def test_a_run_goes_on_in_another_layout(runs, small_corpus, tmp_path):
    go_on(runs, list(pairwise(("one", "experts", "copies", "shards", "one"))), small_corpus, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_in_any_layout_from_a_checkpoint_of_any(all_runs, small_corpus, tmp_path):
    for layout in LAYOUTS:
        go_on(all_runs, [(source, layout) for source in LAYOUTS], small_corpus, tmp_path)
        check_same(tmp_path / f"{layout}-to-{layout}", all_runs / layout)


def check_model(runs: Path, layout: str) -> None:
    """One file, like that of one process."""
    run, alone = read_run(runs / layout), read_run(runs / "one")
    files = sorted(path.name for path in (runs / layout / "model").iterdir())
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    written = json.loads((runs / layout / "model" / "config.json").read_text())
    assert written == json.loads((runs / "one" / "model" / "config.json").read_text())
    assert "distributed_config" not in json.loads((runs / layout / "checkpoint-4" / "config.json").read_text())
    weights, others = (load_file(runs / each / "model" / "model.safetensors") for each in (layout, "one"))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)
    companions = [value for name, value in weights.items() if name.endswith("companion")]
    assert len(companions) == 2
    assert all(value.abs().sum() > 0 for value in companions)
    model = AutoModelForCausalLM.from_pretrained(runs / layout / "model")
    assert run.facts.parameters == alone.facts.parameters == model.num_parameters()
    assert run.facts.sample == alone.facts.sample
    assert sorted(path.name for path in (runs / layout).iterdir()) == sorted(
        path.name for path in (runs / "one").iterdir()
    )


@pytest.mark.parametrize("layout", OTHERS)
def test_a_run_ends_with_one_model_like_that_of_one_process(runs, layout):
    check_model(runs, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", OF_FOUR)
def test_a_run_of_four_processes_ends_with_one_model_too(all_runs, layout):
    check_model(all_runs, layout)


@pytest.mark.parametrize("layout", ["copies", "experts"])
def test_every_process_draws_its_own_random_numbers(runs, layout):
    """Of dropout: the rows of another process are dropped elsewhere."""
    states = [torch.load(runs / layout / "checkpoint-2" / f"rng_state_{i}.pth", weights_only=False) for i in (0, 1)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_shards_of_bf16_weights_end_as_a_model_in_bf16(runs):
    for folder in ("model", "checkpoint-4"):
        assert json.loads((runs / "bf16" / folder / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(runs / "bf16" / "model" / "model.safetensors")
    assert {weights[name].dtype for name in weights if "companion" not in name} == {torch.bfloat16}


def killed_while_saving(command: list[str]) -> None:
    """The second process is killed while all write the second checkpoint."""
    save, calls = training.save_optimizer, []

    def save_and_die(*arguments) -> None:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments)

    training.save_optimizer = save_and_die
    mot(*command)


def one_line(log: Path, *, of: int) -> str:
    """What the processes said as they ended: one line each, and the same."""
    text = log.read_text()
    said = re.findall("mot: .*", text)  # perhaps behind a progress bar
    assert len(said) == of, text
    assert "Traceback" not in text, text
    assert len(set(said)) == 1, said
    return said[0]


@pytest.mark.parametrize("layout", ["copies", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_process_that_is_lost_ends_the_others_and_leaves_the_last_checkpoint(runs, small_corpus, tmp_path, layout):
    command, log = words(layout, small_corpus, tmp_path / "run"), tmp_path / "log"
    in_processes(killed_while_saving, (command,), 2, log, exits=(2, -signal.SIGKILL))
    assert "another process has ended, or has not answered in time" in one_line(log, of=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-[0-9]*")] == ["checkpoint-2"]
    in_processes(mot, [*command, "--resume"], 2, log)
    check_same(tmp_path / "run", runs / layout)


def without_the_first(command: list[str], lost: str) -> None:
    """The first process is killed in its third step; the other one says so in a line of its own."""
    in_its_third_step(lambda: os.kill(os.getpid(), signal.SIGKILL), lost)
    mot(*command)


def test_a_line_does_not_stick_to_the_bar_of_a_process_that_is_lost(small_corpus, tmp_path):
    command, log = words("copies", small_corpus, tmp_path / "run"), tmp_path / "log"
    in_processes(without_the_first, (command, "0"), 2, log, exits=(-signal.SIGKILL, 2))
    assert "another process has ended, or has not answered in time" in one_line(log, of=1)
    assert [line for line in log.read_text().splitlines() if line.startswith("mot: error: another process")]


def test_one_process_tells_that_a_directory_is_taken(runs, small_corpus, tmp_path):
    shutil.copytree(runs / "copies", tmp_path / "run")
    log = tmp_path / "log"
    in_processes(mot, words("copies", small_corpus, tmp_path / "run"), 2, log, exits=2)
    assert "exists already and is a finished run" in one_line(log, of=1)


def losing_sense(command: list[str]) -> None:
    """The second process has a loss that is no number at the third step."""
    compute, calls = RunTrainer.compute_loss, []

    def compute_loss(self, *arguments, **others):
        calls.append(1)
        loss = compute(self, *arguments, **others)
        if len(calls) == 2 * self.args.gradient_accumulation_steps + 1 and os.environ["RANK"] == "1":
            cross_entropy, aux = self._reported[-1]
            self._reported[-1] = cross_entropy * torch.nan, aux
        return loss

    RunTrainer.compute_loss = compute_loss
    mot(*command)


@pytest.mark.parametrize("layout", ["copies", "experts"])
def test_a_loss_that_is_not_finite_in_one_process_ends_all(small_corpus, tmp_path, layout):
    command, log = words(layout, small_corpus, tmp_path / "run"), tmp_path / "log"
    in_processes(losing_sense, (command,), 2, log, exits=1)
    assert "the loss is nan at step 3: try a lower learning rate" in one_line(log, of=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def without_room(command: list[str], rank: str) -> None:
    """One process cannot write its part of the second checkpoint."""
    import resource
    import warnings

    warnings.simplefilter("ignore")  # they would take the room of the log
    save, calls = training.save_optimizer, []

    def save_optimizer(*arguments) -> None:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save(*arguments)

    training.save_optimizer = save_optimizer
    mot(*command)


@pytest.mark.parametrize(("layout", "rank"), [("copies", "0"), ("shards", "1")])
def test_a_process_without_room_on_its_disk_ends_all(small_corpus, tmp_path, layout, rank):
    command, log = words(layout, small_corpus, tmp_path / "run"), tmp_path / "log"
    in_processes(without_room, (command, rank), 2, log, exits=2)
    said = one_line(log, of=1)
    assert "checkpoint-4 could not be written" in said
    assert "File too large" in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-2"]


def in_its_third_step(happens: Callable[[], object], rank: str = "1") -> None:
    """Something happens to one process alone, by default the second one."""
    step, calls = RunTrainer.training_step, []

    def training_step(self, *arguments, **others):
        calls.append(1)
        if len(calls) == 2 * self.args.gradient_accumulation_steps + 1 and os.environ["RANK"] == rank:
            happens()
        return step(self, *arguments, **others)

    RunTrainer.training_step = training_step


def signalled(command: list[str]) -> None:
    """The second process, alone, gets SIGTERM in its third step."""
    in_its_third_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
    mot(*command)


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(runs, small_corpus, tmp_path):
    command, log = words("copies", small_corpus, tmp_path / "run"), tmp_path / "log"
    in_processes(signalled, (command,), 2, log, exits=128 + signal.SIGTERM)
    assert "stopped by SIGTERM after step 3, which is saved; --resume goes on" in one_line(log, of=1)
    in_processes(mot, [*command, "--resume"], 2, log)
    assert losses(tmp_path / "run") == losses(runs / "copies")


def as_torchrun(command: list[str], port: int, directory: Path) -> None:
    """In its place: starts two processes, which note their exit status, and waits until it is killed."""
    for rank in (0, 1):
        if os.fork() == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            place |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none"}
            os.environ.update({name: str(value) for name, value in place.items()})
            try:
                mot(*command)
            except SystemExit as ended:
                (directory / f"status-{rank}").write_text(str(ended.code))
            os._exit(0)
    time.sleep(300)


def test_processes_whose_torchrun_is_killed_end_with_a_checkpoint(small_corpus, tmp_path):
    command, log = words("copies", small_corpus, tmp_path / "run"), tmp_path / "log"
    command[command.index("--steps") + 1] = "5000"
    command[command.index("--training.save_steps") + 1] = "5000"
    torchrun = start(as_torchrun, command, free_port(), tmp_path, log=log)
    metrics, since = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() - since < 100, log.read_text()
        time.sleep(0.2)
    torchrun.kill()
    since = time.monotonic()
    while not all((tmp_path / f"status-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() - since < 60, log.read_text()
        time.sleep(0.2)
    assert [(tmp_path / f"status-{rank}").read_text() for rank in (0, 1)] == [str(128 + signal.SIGTERM)] * 2
    gone, saved = re.findall("mot: .*", log.read_text())[-2:]
    assert "torchrun is gone" in gone
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-[0-9]*")
    step = checkpoint.name.partition("-")[2]
    assert f"stopped by SIGTERM after step {step}, which is saved; --resume goes on" in saved
    assert checkpoints.newest(tmp_path / "run") == checkpoint


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def stuck(command: list[str], directory: Path) -> None:
    """The second process does not come to its third step while the first one is there, and notes that it is gone."""
    first = directory / "first"
    if os.environ["RANK"] == "0":
        first.write_text(str(os.getpid()))

    def wait() -> None:
        number, since = int(first.read_text()), time.monotonic()
        while is_alive(number):
            if time.monotonic() - since > 60:
                return
            time.sleep(0.1)
        (directory / "gone").touch()

    in_its_third_step(wait)
    mot(*command)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["copies", "experts"])
def test_no_process_waits_longer_than_it_is_told(small_corpus, tmp_path, layout):
    command, log = words(layout, small_corpus, tmp_path / "run", "--training.ddp_timeout", 5), tmp_path / "log"
    in_processes(stuck, (command, tmp_path), 2, log, exits=2)
    assert (tmp_path / "gone").exists()  # the first one has ended by itself; else both would go on
    said = [line for line in log.read_text().splitlines() if line.startswith("mot: error:")]
    assert "another process has ended, or has not answered in time" in said[0]
    assert "Traceback" not in log.read_text()


def test_a_damaged_shard_is_passed_over(runs, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(runs / "shards", out)
    assert checkpoints.newest(out) == out / "checkpoint-4"
    shards = sorted((out / "checkpoint-4" / "optimizer").glob("*.safetensors"))
    assert len(shards) == 2
    data = bytearray(shards[1].read_bytes())
    data[len(data) // 2] ^= 1
    shards[1].write_bytes(data)
    assert checkpoints.newest(out) == out / "checkpoint-2"
    assert f"checkpoint-4 is skipped: optimizer/{shards[1].name} is not what was written" in capsys.readouterr().err


def test_a_part_of_the_optimizer_that_is_on_another_machine_is_missed(runs, tmp_path):
    shutil.copytree(runs / "shards" / "checkpoint-4", tmp_path / "checkpoint")
    training.check_optimizer(tmp_path / "checkpoint")
    next((tmp_path / "checkpoint" / "optimizer").glob("shard-00002-*")).unlink()
    with pytest.raises(OSError, match=r"lacks parts of \S+, which another process has written: all processes need the"):
        training.check_optimizer(tmp_path / "checkpoint")


def on_a_disk_of_its_own(command: list[str], out: str) -> None:
    """The second process has no run directory, as on another machine."""
    if os.environ["RANK"] == "1":
        command = [out if word == command[command.index("--out") + 1] else word for word in command]
        is_dir = Path.is_dir
        Path.is_dir = lambda self: not self.name.startswith("checkpoint-") and is_dir(self)  # pyright: ignore
    mot(*command)


def test_a_process_without_the_run_directory_says_so(runs, small_corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(runs / "shards", out)
    (out / "run.json").unlink()
    command = words("shards", small_corpus, out, "--resume")
    in_processes(on_a_disk_of_its_own, (command, str(tmp_path / "elsewhere")), 2, log, exits=2)
    assert "checkpoint-4 is not there for process 1: all processes need the run directory on a file" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("flags", "processes", "found"),
    [
        ((None, None, None), 8, Placement()),
        ((1, None, None), 8, Placement()),
        ((8, None, None), 8, Placement(8, 1, 1)),
        ((4, None, None), 8, Placement(4, 2, 1)),
        ((None, 2, None), 8, Placement(4, 2, 1)),
        ((None, None, 4), 8, Placement(8, 1, 4)),
        ((None, 2, 2), 8, Placement(4, 2, 2)),
        ((4, 2, 4), 8, Placement(4, 2, 4)),
    ],
)
def test_what_is_not_given_of_a_layout_follows(flags, processes, found):
    assert Placement.of(*flags, processes) == found


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        ((3, None, None), 8, "--shard 3 does not make up the 8 processes .*can be 2, 4, 8"),
        ((2, None, None), 1, "--shard 2 is for 2 processes .*, or a multiple, and there is one"),
        ((8, 2, None), 8, "--shard 8 times --replicate 2 does not make up the 8 processes"),
        ((4, None, 3), 8, "--expert-parallel 3 does not divide --shard 4; legal are 1, 2, 4"),
        ((1, 2, None), 8, "--replicate 2 is for --shard above 1"),
        ((None, 3, None), 4, "--replicate 3 does not divide the 4 processes .*; legal are 1, 2"),
        ((0, None, None), 8, "--shard must be at least 1, not 0"),
        ((None, None, -1), 8, "--expert-parallel must be at least 1, not -1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_legal_numbers(flags, processes, message):
    with pytest.raises(ValueError, match=message):
        Placement.of(*flags, processes)


@pytest.mark.parametrize(
    ("name", "fields", "layout", "message"),
    [
        (NAME, {"tie_word_embeddings": True}, Placement(2), "--shard 2: embeddings that are the head too"),
        (NAME, {"learnable_temperature": True}, Placement(2), "--shard 2: a learnable temperature is one number"),
        ("TC-Nano/4E", {}, Placement(2, 1, 2), "--expert-parallel 2: Token Choice sends experts as many tokens as"),
        ("ReMoE-Nano/4E", {}, Placement(2, 1, 2), "--expert-parallel 2: ReMoE sends"),
        ("MoT-Nano/3E", {}, Placement(2, 1, 2), "--expert-parallel 2 does not divide the 3 experts; legal are 1"),
        ("MoT-Nano/6E", {}, Placement(4, 1, 4), "--expert-parallel 4 does not divide the 6 experts; legal are 1, 2"),
        (
            "Transformer-Nano",
            {},
            Placement(2, 1, 2),
            "--expert-parallel 2: a model without sparse blocks has no experts to divide",
        ),
    ],
)
def test_a_model_that_cannot_lie_so_is_refused(name, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        layout.check(config_from_name(name, **fields))
    Placement().check(config_from_name(name, **fields))


def test_beside_an_accelerator_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(
        ValueError, match="--shard 2 lies over the machine's cuda, and not on the CPU: leave out --device cpu"
    ):
        Placement(2).check(config_from_name(NAME), on_cpu=True)
    Placement(2).check(config_from_name(NAME))


def test_a_sharded_model_is_evaluated_and_writes_as_in_one_process(runs, tmp_path):
    run, prompts = str(runs / "one"), tmp_path / "prompts.txt"
    prompts.write_text("".join(f"def f{i}(\n" for i in range(6)))
    evaluate = ["evaluate", run, "--regroupings", "1", "--json"]
    write = ["generate", run, "--prompt", "import", "--max-new-tokens", "8", "--temperature", "0"]
    several = ["generate", run, "--prompts-file", str(prompts), "--max-new-tokens", "8", "--batch-size", "4", "--alone"]
    found = []
    for count, layouts in ((1, ["one"]), (2, ["shards", "experts"])):
        commands, log = [], tmp_path / f"log-{count}"
        for layout in layouts:
            more, out = LAYOUTS[layout][1], str(tmp_path / f"{layout}.jsonl")
            commands += [[*evaluate, *more], [*write, *more], [*several, "--out", out, *more]]
        in_processes(train_all, (commands,), count, log)
        begin, end = '{\n  "run"', "\n}\n"
        _, *all_said = log.read_text().split(begin)
        for layout, said in zip(layouts, all_said, strict=True):
            evaluation, _, rest = said.partition(end)
            text = rest.partition(" tokens in ")[0].rpartition("\n")[0]
            lines = json.loads(begin + evaluation + end)["lines"]
            lines = [line for line in lines if not line["label"].endswith("experts")]  # not of shards
            found.append(([line["loss"] for line in lines], text, (tmp_path / f"{layout}.jsonl").read_text()))
            assert said.count("import") == text.count("import") > 0
    alone, *others = found
    assert len(alone[0]) > 3
    assert alone[2].count("\n") == 6
    for evaluated, text, written in others:
        assert evaluated == pytest.approx(alone[0], rel=1e-5)
        assert text == alone[1]
        assert written == alone[2]


def test_processes_that_would_all_do_the_same_are_refused(runs, tmp_path):
    for words in (["evaluate", str(runs / "one")], ["generate", str(runs / "one"), "--prompt", "a"]):
        log = tmp_path / words[0]
        in_processes(mot, words, 2, log, exits=2)
        assert "2 processes would each do all of the work; give --shard, or leave out torchrun" in one_line(log, of=2)


def measured_of(run: Path) -> list[dict]:
    """What was measured, without times."""
    measures = ("step", "train_loss", "grad_norm", "eval_loss")
    return [{key: row[key] for key in measures if key in row or key != "eval_loss"} for row in rows_of(run)]


@pytest.mark.slow
def test_commands_that_train_several_runs_train_each_with_all_processes(small_corpus, tmp_path):
    given = ["--steps", 2, "--batch-size", 16, "--device", "cpu", "--data", small_corpus]
    given += ["--training.logging_steps", 1, "--training.eval_steps", 1, "--training.report_to", "none"]
    given += ["--training.save_strategy", "no"]
    swept = ["sweep", "MoT-Nano/4E", "--learning-rate", "1e-2,1e9"]
    compared = ["compare", "TC-Nano/4E", "MoT-Nano/4E", "--seeds", "0"]
    parts = "--training.gradient_accumulation_steps"
    for count, more in ((1, [parts, 2]), (2, ["--shard", 2])):
        commands = [[*words, *given, *more, "--out", tmp_path / f"{words[0]}-{count}"] for words in (swept, compared)]
        commands = [[str(word) for word in command] for command in commands]
        in_processes(train_all, (commands,), count, tmp_path / f"log-{count}")
    log = (tmp_path / "log-2").read_text()
    for said in ("run 1 of 2:", "Run 2 of 2:", "learning-rate 0.01", "Everything is in"):
        assert log.count(said) == (tmp_path / "log-1").read_text().count(said), said
    cells = [json.loads((tmp_path / f"sweep-{count}" / "sweep.json").read_text())["cells"] for count in (1, 2)]
    assert [cell["settings"] for cell in cells[1]] == [cell["settings"] for cell in cells[0]]
    assert cells[1][0]["loss"] == pytest.approx(cells[0][0]["loss"], rel=1e-5)
    assert cells[1][1]["loss"] is None  # diverged
    for name in ("TC-Nano-4E-seed0", "MoT-Nano-4E-seed0"):
        pairs = zip(*(measured_of(tmp_path / f"compare-{count}" / name) for count in (1, 2)), strict=True)
        assert all(row == pytest.approx(other, rel=1e-5) for row, other in pairs)
    assert (tmp_path / "compare-2" / "report.html").is_file()


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("calibrate", [("none",), ("distil", "--distil-steps", 3)])
def test_a_switch_of_shards_is_the_one_in_one_process(tiny_runs, tmp_path, calibrate):
    given = ["transition", tiny_runs[NAME], "--steps", 2, "--device", "cpu", "--calibrate", *calibrate]
    for count, more in ((1, []), (2, ["--shard", 2])):
        command = [str(word) for word in (*given, *more, "--out", tmp_path / f"in-{count}")]
        in_processes(mot, command, count, tmp_path / "log")
    alone, sharded = (measured_of(tmp_path / f"in-{count}") for count in (1, 2))
    assert len(alone) == len(sharded)
    assert all(row == pytest.approx(other, rel=1e-4) for row, other in zip(sharded, alone, strict=True))
    switches = [json.loads((tmp_path / f"in-{count}" / "switch.json").read_text()) for count in (1, 2)]
    for loss in ("source_in_groups", "source_alone", "plain_switch", "at_the_switch"):
        assert switches[1][loss] == pytest.approx(switches[0][loss], rel=1e-6)
    fits = switches[0]["at_the_switch"] != pytest.approx(switches[0]["plain_switch"], rel=1e-4)
    assert fits == ("distil" in calibrate)  # the control
