"""`mot plan --devices`: what a device holds and sends."""

import json
import os
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.parallel.placement import COPIES, Placement
from mixture_of_tokens.planning.communication import Spread, _largest_block, spread_of
from mixture_of_tokens.planning.cost import memory, parameters
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.training.trainer import RunTrainer
from processes import LAYOUTS, in_processes, mot

ALL = Placement(8, 1, 8)
NAME = "MoT-Nano/4E/2"


def spread(
    name: str, placement: Placement = ALL, *, devices: int = 8, micro: int | None = 32, batch: int = 256
) -> Spread:
    config = config_from_name(name, gated=False)
    return spread_of(config, batch=batch, devices=devices, placement=placement, micro_batch=micro)


@pytest.mark.parametrize(
    ("name", "divided", "capacity", "copies", "shards"),
    [
        ("MoT-Medium/32E", 117, 147, 1880, 2820),
        ("MoT-Medium/32E/16", 1880, 2350, 1880, 2820),
        ("MoT-Base/32E", 264, 330, 6340, 9510),
        ("MoT-Base/32E/16", 4230, 5290, 6340, 9510),
    ],
)
def test_what_experts_send_at_8192_tokens_a_device(name, divided, capacity, copies, shards):
    """By arithmetic of our own, apart from the code: megabytes, with plain feed-forwards."""
    found = spread(name).experts_sent
    assert found["divided"] / 1e6 == pytest.approx(divided, rel=5e-3)
    assert found["divided, Token Choice, capacity 1.25"] / 1e6 == pytest.approx(capacity, rel=5e-3)
    assert found["copies"] / 1e6 == pytest.approx(copies, rel=5e-3)
    assert found["shards"] / 1e6 == pytest.approx(shards, rel=5e-3)
    assert found["as here"] == found["divided"]
    assert found["divided, Token Choice, dropless"] > found["divided"]


def test_the_parts_of_what_is_sent():
    counts = parameters(config_from_name("MoT-Medium/32E", gated=False))
    others, once = counts["total"] - counts["experts"], counts["head"] + 512  # which is gathered for both passes
    assert spread("MoT-Medium/32E", COPIES).sent["total"] == 2 * 7 / 8 * 4 * counts["total"]
    divided = spread("MoT-Medium/32E").sent
    assert divided["weights gathered"] == 7 / 8 * 4 * (2 * others - once)
    assert divided["gradients reduced"] == 7 / 8 * 4 * others
    assert divided["total"] == pytest.approx(sum(divided.values()) / 2)
    # Two micro-steps gather twice as often and reduce once.
    twice = spread("MoT-Medium/32E", batch=512).sent
    assert twice["weights gathered"] == 2 * divided["weights gathered"]
    assert twice["gradients reduced"] == divided["gradients reduced"]
    assert twice["exchanged by experts"] == 2 * divided["exchanged by experts"]
    # Two copies of four: shards are reduced in every micro-step, and reduced over the copies once.
    copies = spread("MoT-Medium/32E", Placement(4, 2, 4), batch=512).sent
    assert copies["gradients reduced"] == 2 * 3 / 4 * 4 * others
    assert copies["gradients of copies"] == pytest.approx(2 * 1 / 2 * 4 * (others / 4 + counts["experts"] / 4))
    assert copies["exchanged by experts"] == pytest.approx(2 * divided["exchanged by experts"] * (3 / 4) / (7 / 8))
    # Experts over two of four shards: halves, each a shard of two devices.
    halves = spread("MoT-Medium/32E", Placement(4, 2, 2)).sent
    gathered = 4 * (3 / 4 * (2 * others - once) + 1 / 2 * counts["experts"])
    assert halves["weights gathered"] == pytest.approx(gathered)


@pytest.mark.parametrize("steps", [1, 4])
def test_exchanging_and_gathering_are_even_at_the_number_that_is_named(steps):
    found = spread("MoT-Base/32E/16", batch=steps * 256)
    tokens = 32 * 256
    assert (found.micro_steps, found.even_at is None) == (steps, False)
    assert found.experts_sent["divided"] * found.even_at / tokens == pytest.approx(
        found.experts_sent["shards"], rel=1e-3
    )


def test_where_experts_are_not_divided_nothing_is_even():
    assert spread("TC-Medium/32E", COPIES).even_at is None
    assert "divided" not in spread("TC-Medium/32E", COPIES).experts_sent
    assert spread("Transformer-Medium", COPIES).experts_sent == {}
    assert spread("MoT-Medium/32E", COPIES, devices=1, micro=None).experts_sent == {}


def test_what_a_device_holds():
    config = config_from_name("MoT-Medium/32E", gated=False)
    whole, counts = memory(config, 32), parameters(config)
    assert spread("MoT-Medium/32E", COPIES).memory == whole | {"total": sum(whole.values())}
    held = spread("MoT-Medium/32E", Placement(8)).memory
    for part in ("weights", "gradients", "optimizer"):
        assert held[part] == whole[part] / 8
    assert held["activations"] == whole["activations"]
    block = (counts["attention"] + counts["norms"]) // 8 + (counts["experts"] + counts["router"]) // 4
    assert held["gathered"] == 4 * block
    assert spread("MoT-Medium/32E").memory["gathered"] == 4 * counts["embedding"]
    # Until the last micro-step the gradients of one sharded copy are whole, those of several are not.
    assert spread("MoT-Medium/32E", Placement(8), batch=512).memory["gradients"] == whole["gradients"]
    assert spread("MoT-Medium/32E", Placement(4, 2), batch=512).memory["gradients"] == whole["gradients"] / 4


def test_the_largest_block_has_its_shared_experts():
    config = config_from_name("MoT-Nano/32E/8", shared_experts=6, vocab_size=16)
    with torch.device("meta"):
        blocks = MixtureOfTokensForCausalLM(config).model.layers
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    assert _largest_block(config, Placement(8)) == pytest.approx(largest, rel=1e-3)


def test_only_legal_placements_are_named():
    assert spread("MoT-Medium/4E", COPIES, devices=4).legal_placements == [
        COPIES,
        Placement(2, 2, 1),
        Placement(2, 2, 2),
        Placement(4, 1, 1),
        Placement(4, 1, 2),
        Placement(4, 1, 4),
    ]
    assert spread("TC-Medium/32E", COPIES, devices=4).legal_placements == [COPIES, Placement(2, 2), Placement(4)]
    assert "Legal beside copies: --shard 2 (--expert-parallel 1, 2); --shard 4 (--expert-parallel 1, 2, 4)." in str(
        spread("MoT-Medium/4E", COPIES, devices=4)
    )


def test_the_command(capsys):
    flags = ("--devices", 64, "--batch-size", 2048, "--shard", 8, "--expert-parallel", 8)
    mot("plan", "MoT-Medium/32E", *flags)
    shown = capsys.readouterr().out
    assert "64 devices, 8 shards, 8 times, experts over 8: 32 sequences at once, 1 times a step" in shown
    mot("plan", "MoT-Medium/32E", *flags, "--json")
    found = json.loads(capsys.readouterr().out)["spread"]
    assert found["placement"] == {"shard": 8, "replicate": 8, "expert_parallel": 8}
    assert found["sent"]["total"] > found["sent"]["gradients of copies"] > 0
    mot("plan", "MoT-Medium/32E", "--json")
    assert json.loads(capsys.readouterr().out)["spread"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--devices", 64),
            "does not divide over 64 devices into groups of 32: at most 8 devices, or --batch-size 2048; it divides",
        ),
        (("--devices", 8, "--shard", 3), "--shard 3 does not make up the 8 devices; --shard can be 2, 4, 8"),
        (("--devices", 8, "--micro-batch", 64), "micro-batch 64 is not legal for 256 sequences on 8 devices: 32"),
        (("--devices", 0), "--devices must be at least 1, not 0"),
        (("--shard", 2), "--shard, --replicate and --expert-parallel are for --devices N"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("plan", "MoT-Medium/32E", *flags)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


class Collectives(TorchDispatchMode):
    """Counts the bytes that this process sends, as in rings, by the collective."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, float] = {}

    def count(self, name: str, value: torch.Tensor, processes: int) -> None:
        share = (1 + (name == "allreduce_")) * (processes - 1) / processes
        self.sent[name] = self.sent.get(name, 0.0) + share * value.numel() * value.element_size()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        if name in OF_VALUE:
            processes = next(ProcessGroup.unbox(each).size() for each in args if isinstance(each, torch.ScriptObject))
            self.count(name, OF_VALUE[name](args), processes)
        elif name == "all_to_all_single":
            self.count(name, args[0], _resolve_process_group(args[-1]).size())
        return func(*args, **(kwargs or {}))


# Of torch's collectives, the tensor that is whole.
OF_VALUE = {
    "_allgather_base_": lambda args: args[0],
    "_reduce_scatter_base_": lambda args: args[1],
    "allreduce_": lambda args: args[0][0],
}


def counted(commands: list[list[str]]) -> None:
    """Trains, and writes what the first step has sent, and what was planned of it."""
    step, collectives = RunTrainer.training_step, Collectives()

    def of_copies(_, bucket):
        collectives.count("allreduce_", bucket.buffer(), torch.distributed.get_world_size())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    def training_step(self, model, *arguments, **others):
        copies = isinstance(model, DistributedDataParallel)
        if copies and not self.micro_steps:
            model.register_comm_hook(None, of_copies)
        self.micro_steps += 1
        with nullcontext() if copies else collectives:  # the hook would wait for the mode
            return step(self, model, *arguments, **others)

    RunTrainer.training_step, RunTrainer.micro_steps = training_step, 0  # pyright: ignore
    for command in commands:
        collectives.sent.clear()
        mot(*command)
        out = command[command.index("--out") + 1]
        Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(collectives.sent))


KINDS = {
    "weights gathered": "_allgather_base_",
    "gradients reduced": "_reduce_scatter_base_",
    "gradients of copies": "allreduce_",
    "exchanged by experts": "all_to_all_single",
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_what_is_planned_is_what_collectives_send(count, small_corpus, tmp_path):
    layouts = [layout for layout, (processes, _) in LAYOUTS.items() if processes == count]
    cases = [(layout, parts) for layout in layouts for parts in (1, 2)]
    commands = []
    for layout, parts in cases:
        command = ["train", NAME, "--steps", 1, "--batch-size", 32, "--device", "cpu", "--data", small_corpus]
        command += ["--out", tmp_path / f"{layout}-{parts}", "--training.gradient_accumulation_steps", parts]
        command += ["--training.bf16", "true", "--training.save_strategy", "no", "--training.report_to", "none"]
        commands.append([str(word) for word in [*command, *LAYOUTS[layout][1]]])
    in_processes(counted, (commands,), count, tmp_path / "log")
    for layout, parts in cases:
        given = dict(pairwise(LAYOUTS[layout][1]))
        flags = (
            int(given[flag]) if flag in given else None for flag in ("--shard", "--replicate", "--expert-parallel")
        )
        config = read_run(tmp_path / f"{layout}-{parts}").model_config
        placement = Placement.of(*flags, count)
        size = 32 // parts // count
        planned = spread_of(config, batch=32, devices=count, placement=placement, micro_batch=size).sent
        for rank in range(count):
            sent = json.loads((tmp_path / f"{layout}-{parts}-{rank}.json").read_text())
            assert {KINDS[kind]: size for kind, size in planned.items() if kind != "total"} == pytest.approx(sent)
