"""One step is one step, however its rows are dealt out: processes, accumulation, loader workers, before and after a
resume."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainingArguments

from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import build
from mixture_of_tokens.training.trainer import RunTrainer
from processes import in_processes, mot, rows_of

MOT, TC, BALANCED = "MoT-Nano/4E/2", "TC-Nano/4E", ("STC-Nano/4E", "ET-Nano/4E")
LAYOUTS = ((1, 4), (2, 2), (4, 1))  # processes x accumulation
BATCH, STEPS = 32, 3


class Training(NamedTuple):
    """Of what model, on how many processes, with how many micro-batches and loader workers in each."""

    name: str
    processes: int = 1
    accumulation: int = 4
    workers: int = 0

    @property
    def label(self) -> str:
        return f"{self.name.replace('/', '-')}-{self.processes}x{self.accumulation}-{self.workers}"


TRAININGS = (
    Training(MOT, workers=3),
    *(Training(name, *layout) for name in (MOT, TC) for layout in LAYOUTS),
    *(Training(name, *layout) for name in BALANCED for layout in LAYOUTS[:2]),
)


class Watched(RunTrainer):
    """Keeps the rows of every micro-batch, and the gradients of every step before they are clipped."""

    seen: list
    steps: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.world_size > 1:
            assert model.gradient_as_bucket_view  # no gradient is held twice
        self.seen.append(inputs["input_ids"].clone())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        self.steps.append({n: p.grad.clone() for n, p in self.causal_lm.named_parameters() if p.grad is not None})
        return super()._clip_grad_norm(model)


def train_all(trainings: list[Training], data: str, directory: Path) -> None:
    """In every process: one training after the other; saves what the process saw."""
    for training in trainings:
        fields = {"gradient_accumulation_steps": str(training.accumulation)}
        fields |= {"dataloader_num_workers": str(training.workers)}
        fields |= {"logging_steps": "1", "eval_strategy": "no", "report_to": "none", "save_strategy": "no"}
        options = Options(steps=STEPS, batch_size=BATCH, device="cpu", training=fields, data=[data])
        config, arguments, *_ = merge(training.name, 0, 1e-2, options)
        out = directory / training.label
        out.mkdir(exist_ok=True)
        taken = TrainingArguments(output_dir=str(out), **arguments)
        trainer, _ = build(config, taken)
        trainer.causal_lm.double()  # rounding, which differs between layouts, must not make a token choose otherwise
        trainer.__class__ = Watched
        assert isinstance(trainer, Watched)
        trainer.seen, trainer.steps = [], []
        trainer.train()
        saved = {"rows": trainer.seen, "gradients": trainer.steps}
        torch.save(saved, out / f"process{taken.process_index}.pt")
    if trainings[0].processes > 1:
        torch.distributed.destroy_process_group()


class Seen(NamedTuple):
    rows: list[torch.Tensor]  # of every micro-batch, in the order of the step
    gradients: list[dict[str, torch.Tensor]]  # of every step
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl


class AllSeen(dict[Training, Seen]):
    """Of all trainings; those of so many processes are made when the first of them is asked for."""

    def __init__(self, data: str, directory: Path):
        super().__init__()
        self.data, self.directory = data, directory

    def __missing__(self, asked: Training) -> Seen:
        own = [training for training in TRAININGS if training.processes == asked.processes]
        in_processes(train_all, (own, self.data, self.directory), asked.processes, self.directory / "log")
        for training in own:
            out, ranks = self.directory / training.label, range(training.processes)
            saved = [torch.load(out / f"process{rank}.pt") for rank in ranks]
            rows = [saved[rank]["rows"][part] for part in range(STEPS * training.accumulation) for rank in ranks]
            self[training] = Seen(rows, saved[0]["gradients"], rows_of(out))
        return self[asked]


@pytest.fixture(scope="module")
def seen(small_corpus, tmp_path_factory) -> AllSeen:
    return AllSeen(str(small_corpus), tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [MOT, TC])
def test_layouts_see_the_same_groups_and_give_the_same_gradients(name, count, seen):
    (rows, gradients, metrics), *others = [seen[Training(name, *layout)] for layout in LAYOUTS[:count]]
    assert len(rows) == 4 * STEPS
    assert all(len(part) == BATCH // 4 for part in rows)
    assert len({tuple(row.tolist()) for part in rows for row in part}) == BATCH * STEPS
    assert len(gradients) == STEPS
    for other_rows, other_gradients, other_metrics in others:
        assert all(torch.equal(part, other) for part, other in zip(rows, other_rows, strict=True))
        norm = torch.stack([g.norm() for g in gradients[0].values()]).norm()
        gap = torch.stack([(g - other_gradients[0][n]).norm() for n, g in gradients[0].items()]).norm()
        assert gap <= 1e-14 * norm  # of the first step, whose weights are the same
        for kind in ("train_loss", "aux_loss") if name == TC else ("train_loss",):
            assert [row[kind] for row in other_metrics] == pytest.approx([row[kind] for row in metrics], rel=1e-12)


def evaluated_run(data: str, out: Path, accumulation: int) -> None:
    """Saves what a process finds of an untrained model, and how many batches it evaluates."""
    training = {"gradient_accumulation_steps": str(accumulation)}
    options = Options(steps=STEPS, batch_size=BATCH, device="cpu", training=training, data=[data])
    config, arguments, *_ = merge(MOT, 0, 1e-2, options)
    trainer, _ = build(config, TrainingArguments(output_dir=str(out), **arguments))
    forward, batches = trainer.causal_lm.forward, []
    trainer.causal_lm.forward = lambda *words, **inputs: batches.append(1) or forward(*words, **inputs)
    found = {"part": trainer.loss_of(trainer.causal_lm), "all": trainer.evaluate_all(1)}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"process{trainer.args.process_index}.json").write_text(json.dumps([found, len(batches)]))
    if trainer.args.world_size > 1:
        torch.distributed.destroy_process_group()


def test_processes_share_an_evaluation_and_find_what_one_does_bit_for_bit(small_corpus, tmp_path):
    for count, accumulation in ((1, 2), (2, 1)):
        out = tmp_path / f"in-{count}"
        in_processes(evaluated_run, (str(small_corpus), out, accumulation), count, tmp_path / "log")
    (alone, batches), *shared = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("in-*/*.json"))]
    assert [found for found, _ in shared] == [alone, alone]
    assert sum(each for _, each in shared) == batches
    assert max(each for _, each in shared) <= batches // 2 + 1  # of two evaluations


@pytest.mark.parametrize("name", BALANCED)
def test_what_balances_the_load_counts_all_parts_of_a_step(name, seen):
    (_, gradients, metrics), (_, others, other_metrics) = [seen[Training(name, *layout)] for layout in LAYOUTS[:2]]
    assert [row["train_loss"] for row in other_metrics] == pytest.approx(
        [row["train_loss"] for row in metrics], rel=1e-5
    )
    third, other = gradients[-1], others[-1]  # whose choices two moves of the bias have changed
    for weight, gradient in third.items():
        assert (gradient - other[weight]).norm() <= 1e-3 * gradient.norm(), weight


def test_auxiliary_gradients_are_scaled_once(seen, small_corpus, tmp_path):
    """The coefficient times the auxiliary loss is in the gradient: four parts give what one batch's sum over four."""
    rows, gradients, metrics = seen[Training(TC)]
    options = Options(steps=STEPS, batch_size=BATCH, device="cpu", data=[str(small_corpus)])
    config, arguments, *_ = merge(TC, 0, 1e-2, options)
    trainer, _ = build(config, TrainingArguments(output_dir=str(tmp_path), **arguments))
    model, coefficient = trainer.causal_lm.double(), config.model_config.router_aux_loss_coef
    labels = [trainer.rows.blocks.batch(trainer.rows.block_numbers(list(range(8 * i, 8 * i + 8)))) for i in range(4)]
    outputs = [model(**batch, use_cache=False) for batch in labels]
    assert all(torch.equal(batch["input_ids"], part) for batch, part in zip(labels, rows[:4], strict=True))
    assert coefficient > 0
    torch.stack([output.loss for output in outputs]).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[0][name], parameter.grad, rtol=1e-10, atol=1e-13)
    auxiliary = sum(output.aux_loss.item() for output in outputs) / 4
    assert metrics[0]["aux_loss"] == pytest.approx(auxiliary, rel=1e-12)
    mean_loss = sum(output.loss.item() for output in outputs) / 4
    assert metrics[0]["train_loss"] == pytest.approx(mean_loss - coefficient * auxiliary, rel=1e-12)


def test_workers_change_nothing(seen):
    (rows, gradients, _), (other_rows, other_gradients, _) = seen[Training(MOT)], seen[Training(MOT, workers=3)]
    assert all(torch.equal(part, other) for part, other in zip(rows, other_rows, strict=True))
    assert all(torch.equal(g, other_gradients[-1][name]) for name, g in gradients[-1].items())


def test_a_run_is_resumed_in_another_layout(small_corpus, tmp_path):
    """Four steps in one process, the last two of them again in two processes; a row is of steps before and after."""
    flags = ["train", MOT, "--steps", "4", "--batch-size", str(BATCH), "--device", "cpu"]
    flags += ["--data", str(small_corpus)]
    flags += ["--training.save_steps", "2", "--training.logging_steps", "3", "--training.eval_steps", "4"]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    words = [*flags, "--training.gradient_accumulation_steps", "4"]
    in_processes(mot, [*words, "--out", str(one)], 1, log)
    two.mkdir()
    for name in ("checkpoint-2", "config.yaml", "metrics.jsonl"):
        (one / name).rename(two / name) if name == "checkpoint-2" else (two / name).write_text((one / name).read_text())
    words = [*flags, "--training.gradient_accumulation_steps", "2"]
    in_processes(mot, [*words, "--out", str(two), "--resume"], 2, log)
    losses = [rows_of(run) for run in (one, two)]
    assert [row["step"] for row in losses[1]] == [3, 4]
    assert losses[1][0]["train_loss"] == pytest.approx(losses[0][0]["train_loss"], rel=1e-5)
    assert losses[1][1]["eval_loss"] == pytest.approx(losses[0][1]["eval_loss"], rel=1e-5)
    facts = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert facts[1]["final_loss"] == pytest.approx(facts[0]["final_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_a_switch_in_two_processes_is_the_one_in_one(tiny_runs, tmp_path):
    flags = ["transition", str(tiny_runs[MOT]), "--steps", "2", "--calibrate", "none", "--device", "cpu"]
    facts = []
    for count in (1, 2):
        out = tmp_path / f"in-{count}"
        in_processes(mot, [*flags, "--out", str(out)], count, tmp_path / f"log-{count}")
        rows = rows_of(out)
        assert [row["step"] for row in rows][-2:] == [31, 32]
        facts.append(json.loads((out / "run.json").read_text()))
        assert (tmp_path / f"log-{count}").read_text().count("draws the curve") == 1
    assert facts[1]["final_loss"] == pytest.approx(facts[0]["final_loss"], rel=1e-5)
