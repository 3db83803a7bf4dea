"""Weights in shards, experts each in one process: every layout trains what one process does.

All on gloo, with 2 and 4 processes on the CPU.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.models.companions import calibrate_companions
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.parallel import sharding
from mixture_of_tokens.parallel.optimizer_state import check_optimizer, save_optimizer
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.planning.communication import spread_of
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import build
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.process import is_main
from processes import in_processes, rows_of

pytestmark = pytest.mark.slow  # the whole matrix of placements

BATCH, STEPS, PARTS = 48, 2, 4  # rows and micro-batches of a step, in every layout
MIXED = "MoT-Nano/4E/2"  # E = 8, G = 4, D = 32, M = 3 * 64
BF16 = {"bf16": "true"}
SHARDED, EXPERTS = {"shard": 2}, {"shard": 2, "expert_parallel": 2}


class Case(NamedTuple):
    """A training: of what model, on how many processes, with which flags."""

    name: str
    processes: int = 1
    layout: dict[str, Any] = {}
    training: dict[str, str] = {}
    patch: str = ""

    @property
    def label(self) -> str:
        words = [*self.layout.items(), *self.training.items()]
        said = [
            self.name.replace("/", "-"),
            str(self.processes),
            *(f"{key}{value}" for key, value in words),
            self.patch,
        ]
        return "-".join(word for word in said if word)


CASES = (
    Case(MIXED, 2, SHARDED),
    Case(MIXED, 2, EXPERTS),
    Case(MIXED, 4, {"shard": 2, "replicate": 2}),
    Case(MIXED, 4, {"shard": 4, "expert_parallel": 2}),
    Case(MIXED, 4, {"shard": 2, "replicate": 2, "expert_parallel": 2}),
    Case("MoT-Nano/3E", 2, SHARDED),  # shards of two experts and of one
    Case("Uniform-Nano/4E", 2, EXPERTS),
    Case("EC-Nano/4E", 4, {"shard": 4, "expert_parallel": 4}),  # of one expert each
    Case("TC-Nano/4E", 2, SHARDED),
    Case("STC-Nano/4E", 2, SHARDED),
    Case("DMoE-Nano/4E", 2, SHARDED),
    Case("ET-Nano/4E", 2, SHARDED),
    Case("ReMoE-Nano/4E", 2, SHARDED),
    Case("Transformer-Nano", 4, {"shard": 4}),
    Case(MIXED, 2, EXPERTS, {"gradient_checkpointing": "true"}),
)


class Watched(RunTrainer):
    """Keeps the whole gradients and the norm of every step, and the model that is called."""

    steps: list[dict[str, torch.Tensor]]
    norms: list[float]
    sharded: dict[str, bool]
    local: dict[str, torch.Size]
    called: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.called = model
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        grads = {n: p.grad for n, p in self.causal_lm.named_parameters() if p.grad is not None}
        self.steps.append({n: whole(g).clone() for n, g in grads.items()})
        norm: Any = super()._clip_grad_norm(model)
        self.norms.append(float(whole(norm)))
        self.sharded = {n: isinstance(p, DTensor) for n, p in self.causal_lm.named_parameters()}
        self.local = {n: sharding.local(p).shape for n, p in self.causal_lm.named_parameters()}
        return norm


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else torch.as_tensor(tensor)


@contextmanager
def patched(what: str, seen: list) -> Iterator[None]:
    """Notes the shapes that are exchanged; `divide`: averages experts' gradients over their own group alone."""
    exchange, divide = sharding.all_to_all_single_autograd, FSDPModule.set_gradient_divide_factor
    exchanging: Callable = lambda x, *words: seen.append(tuple(x.shape)) or exchange(x, *words)  # noqa: E731
    sharding.all_to_all_single_autograd = exchanging
    if what == "divide":
        FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    try:
        yield
    finally:
        sharding.all_to_all_single_autograd, FSDPModule.set_gradient_divide_factor = exchange, divide


def masked_gradients(trainer: RunTrainer, processes: int, rank: int) -> dict[str, torch.Tensor]:
    """Of a batch in which rows are missing, all of a group's in one place, in as many parts as a step has."""
    numbers = np.arange(BATCH)
    numbers[::5] = -1
    numbers[4:8] = -1
    model, own = trainer.causal_lm.train(), np.split(numbers, PARTS)[rank::processes]
    for part in own:
        loss = model(**trainer.rows.blocks.batch(part, padded=True), use_cache=False).loss
        (loss / len(own)).backward()
    found = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole_state(trainer: RunTrainer, out: Path) -> dict[str, torch.Tensor]:
    """As a checkpoint has it, in the first process. A sharded optimizer is written too, and all its parts are there."""
    model, optimizer = trainer.causal_lm, cast(Any, trainer.optimizer)
    calibrate_companions(model, training_groups(trainer.rows.blocks, trainer.rows.group_size, groups=4))
    if not sharding.is_sharded(model):
        return model.state_dict()
    state = sharding.whole_state(model)
    save_optimizer(model, optimizer.optimizer, out)
    if is_main():
        check_optimizer(out)
    return state


def train_cases(cases: list[Case], data: str, directory: Path) -> None:
    """In every process: train each case and save what was seen."""
    for case in cases:
        fields = {"gradient_accumulation_steps": str(PARTS // case.processes), "logging_steps": "1"}
        fields |= {"eval_steps": str(STEPS), "report_to": "none", "save_strategy": "no"} | case.training
        options = Options(steps=STEPS, batch_size=BATCH, device="cpu", training=fields, data=[data], **case.layout)
        config, arguments, placement, _ = merge(case.name, 0, 1e-2, options)
        out, shapes = directory / case.label, []
        out.mkdir(parents=True, exist_ok=True)
        taken = TrainingArguments(output_dir=str(out), **arguments)
        with patched(case.patch, shapes):
            trainer, _ = build(config, taken, placement)
            trainer.__class__ = Watched
            assert isinstance(trainer, Watched)
            trainer.steps, trainer.norms = [], []
            masked = masked_gradients(trainer, case.processes, taken.process_index)
            shapes.clear()
            trainer.train()
            found = {
                "masked": masked,
                "gradients": trainer.steps,
                "norms": trainer.norms,
                "final": trainer.evaluate_all(1),
                "exchanged": shapes,
                "wrapped": isinstance(trainer.called, DistributedDataParallel),
                "sharded": trainer.sharded,
                "local": trainer.local,
                "state": whole_state(trainer, out),
            }
        torch.save(found, out / f"process{taken.process_index}.pt")
    if cases[0].processes > 1:
        torch.distributed.destroy_process_group()


class Seen(NamedTuple):
    found: list[dict[str, Any]]  # of each process
    rows: list[dict[str, Any]]  # of metrics.jsonl


@pytest.fixture(scope="module")
def seen(small_corpus, tmp_path_factory) -> dict[str, Seen]:
    directory = tmp_path_factory.mktemp("sharding")
    broken = Case(MIXED, 2, EXPERTS, patch="divide")
    alone = [Case(name) for name in dict.fromkeys(case.name for case in CASES)]
    bf16 = [Case(MIXED, 1, {}, BF16), Case(MIXED, 2, EXPERTS, BF16)]
    cases = [*CASES, *alone, *bf16, broken]
    for count in (1, 2, 4):
        own = [case for case in cases if case.processes == count]
        in_processes(train_cases, (own, str(small_corpus), directory), count, directory / "log")
    made = {}
    for case in cases:
        files = sorted((directory / case.label).glob("process*.pt"))
        rows = rows_of(directory / case.label)
        made[case.label] = Seen([torch.load(file, weights_only=False) for file in files], rows)
    return made


def distance(gradients: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Of the gradients from the others, as a share of the others' norm; the largest over the weights."""
    assert gradients.keys() == others.keys()
    norm = torch.stack([g.norm() for g in others.values()]).norm()
    return max(float((g - others[n]).norm() / norm) for n, g in gradients.items())


MEASURES = ("train_loss", "grad_norm", "aux_loss", "eval_loss")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_layout_trains_what_accumulation_in_one_process_does(case, seen):
    found, rows = seen[case.label]
    (alone, *_), alone_rows = seen[Case(case.name).label]
    assert distance(found[0]["gradients"][0], alone["gradients"][0]) < 1e-6
    assert distance(found[0]["masked"], alone["masked"]) < 1e-6
    assert found[0]["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-6)
    for process in found:
        assert process["norms"] == found[0]["norms"]
        assert process["final"] == found[0]["final"]
    assert found[0]["final"]["loss"] == pytest.approx(alone["final"]["loss"], rel=1e-5)
    assert found[0]["final"]["tokens"] == alone["final"]["tokens"]
    assert len(rows) == STEPS
    for row, other in zip(rows, alone_rows, strict=True):
        measured, others = ({key: each[key] for key in MEASURES if key in each} for each in (row, other))
        absent = {"aux_loss": not case.name.startswith(("TC", "DMoE", "ReMoE")), "eval_loss": row["step"] < STEPS}
        assert list(measured) == [key for key in MEASURES if not absent.get(key)]
        assert measured == pytest.approx(others, rel=1e-5)
        assert row["layers"].keys() == other["layers"].keys()
        for layer, measures in row["layers"].items():  # telemetry has five digits
            assert measures == pytest.approx(other["layers"][layer], rel=2e-3, abs=1e-6), layer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_first_process_has_the_whole_model_in_the_end(case, seen):
    state, *others = (process["state"] for process in seen[case.label].found)
    assert others == [{}] * (case.processes - 1)
    alone = seen[Case(case.name).label].found[0]["state"]
    assert state.keys() == alone.keys()
    for name, value in state.items():  # 5e-6: where gradients are next to nothing, Adam's steps are of rounding
        assert (value - alone[name]).norm() <= 1e-4 * alone[name].norm(), name
    companions = [value for name, value in state.items() if name.endswith("companion")]
    assert len(companions) == (2 if case.name.startswith(("MoT", "Uniform")) else 0)
    assert all(value.abs().sum() > 0 for value in companions)


def test_with_bf16_too(seen):
    sharded, alone = seen[Case(MIXED, 2, EXPERTS, BF16).label], seen[Case(MIXED, 1, {}, BF16).label]
    assert distance(sharded.found[0]["gradients"][0], alone.found[0]["gradients"][0]) < 2e-3
    assert [row["train_loss"] for row in sharded.rows] == pytest.approx(
        [row["train_loss"] for row in alone.rows], rel=1e-3
    )
    exact = seen[Case(MIXED).label].found[0]["gradients"][0]
    assert distance(alone.found[0]["gradients"][0], exact) > 1e-4  # the control: bf16 it was


def test_another_divisor_of_experts_gradients_would_be_noticed(seen):
    wrong = seen[Case(MIXED, 2, EXPERTS, patch="divide").label].found[0]
    assert distance(wrong["gradients"][0], seen[Case(MIXED).label].found[0]["gradients"][0]) > 1e-2


EVEN = [case for case in CASES if case.name != "MoT-Nano/3E"]


@pytest.mark.parametrize("case", EVEN, ids=lambda case: case.label)
def test_every_process_holds_its_part_of_every_weight(case, seen):
    found, whole_sizes = seen[case.label].found, seen[Case(case.name).label].found[0]["local"]
    for process in found:
        assert not process["wrapped"]
        assert all(process["sharded"].values())
        for name, shape in process["local"].items():
            assert shape[0] == whole_sizes[name][0] // case.layout["shard"], name
            assert shape[1:] == whole_sizes[name][1:]


OF_EXPERTS = [case for case in CASES if "expert_parallel" in case.layout]


@pytest.mark.parametrize("case", OF_EXPERTS, ids=lambda case: case.label)
def test_what_is_exchanged_has_one_shape_however_tokens_are_routed(case, seen):
    config = config_from_name(case.name)
    groups = BATCH // PARTS // config.group_size * config.max_position_embeddings
    for process in seen[case.label].found:
        shapes = set(process["exchanged"])
        # Forward passes of training have one shape, those of evaluation another number of groups.
        assert {(shape[0], shape[2]) for shape in shapes} == {(config.num_experts, config.hidden_size)}
        training = [shape for shape in process["exchanged"] if shape[1] == groups * rows_of_expert(config)]
        forwards = 2 if "gradient_checkpointing" in case.training else 1
        layers, parts = len(config.sparse_routings), PARTS // case.processes
        assert len(training) >= 2 * layers * parts * STEPS * forwards
        a_step = training[
            : 2 * layers * parts
        ]  # of its forward passes; backward sends as much, and in the plan is bf16
        placement = Placement(case.layout["shard"], case.layout.get("replicate", 1), case.layout["expert_parallel"])
        share, micro = (placement.expert_parallel - 1) / placement.expert_parallel, BATCH // PARTS
        planned = spread_of(config, batch=BATCH, devices=case.processes, placement=placement, micro_batch=micro)
        assert planned.sent["exchanged by experts"] == 2 * 2 * share * sum(math.prod(shape) for shape in a_step)
        assert process["exchanged"] == seen[case.label].found[0]["exchanged"]


def rows_of_expert(config) -> int:
    """Of an expert for a group: one mixture, or the tokens that it chooses."""
    if config.sparse_routings[0].reads_mixtures:
        return 1
    return config.group_size * config.num_experts_per_tok // config.num_experts
