"""A model over several processes, as `placement.py` says: all that we use of transformers' own distribution (FSDP2,
HSDP and expert parallelism on one mesh), whose API is young.

With expert parallelism no expert's weights travel; what it reads does. Every process sends every expert the mixtures of
its own groups, (E, M, D) however tokens are routed. So no counts are exchanged, nothing waits for the fullest process,
and nothing is dropped.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard
from transformers.distributed.utils import gather_full_state_dict

from mixture_of_tokens.layers.experts import Experts
from mixture_of_tokens.layers.grouping import expert_linear
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.utils.process import have_met

IN_ONE_FILE = "1000TB"  # of weights; transformers would begin another after 50 GB
MIXTURES = "mixtures"  # the name of our way to exchange what experts read


def shard_model(model: MixtureOfTokensForCausalLM, placement: Placement) -> MixtureOfTokensForCausalLM:
    """The model, whose weights become shards in place. Every process calls it, with the same weights.

    For the whole process it registers an exchange with transformers, and turns off a warning of torch's.
    """
    if not placement.sharded:
        return model
    EPImplementationInterface.register(MIXTURES, _exchange_of_mixtures)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    plan = {}
    for name, module in experts.items():
        vars(module)["num_experts"] = len(module.down_proj)  # which transformers sets to those of this process
        plan[wildcard(name)] = "ep_dispatch_experts"
        plan |= {f"{wildcard(name)}.{weight}": "grouped_gemm" for weight, _ in module.named_parameters()}
    asked = DistributedConfig(
        fsdp_size=placement.shard,
        dp_replicate_size=placement.replicate,
        ep_size=placement.expert_parallel,
        ep_plan=plan or None,
        ep_implementation=MIXTURES,
    )
    config, _, meshes = model.prepare_distribute_model(asked)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it warns of each collective that it splits
    model.maybe_distribute_model(model, config, meshes)
    if placement.expert_parallel > 1:
        for module in experts.values():
            module.forward = _as_we_call_experts(module.forward)
    return model


def _exchange_of_mixtures(experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> Callable[..., Tensor]:
    """In place of an expert-parallel implementation of transformers', which sends tokens by their choices.

    Called as `Experts.forward`, with the rows (E, M, D) of this process for all experts. Its own experts compute the
    rows of all processes.
    """
    forward, group, P = experts.forward, ep_mesh.get_group(), ep_mesh.size()

    def exchanged(x: Tensor) -> Tensor:
        return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))

    def compute(x_EMD: Tensor, _, linear: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        E, M, D = x_EMD.shape
        x_PLMD = exchanged(x_EMD).view(P, E // P, M, D)  # of the L = E / P experts here, from P processes
        y_LRD = forward(x_PLMD.transpose(0, 1).flatten(1, 2), linear)  # R = P * M
        return exchanged(y_LRD.unflatten(1, (P, M)).transpose(0, 1).flatten(0, 1))

    return compute


def _as_we_call_experts(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """transformers calls experts with a token's choices and their gates, which there are none of here."""

    def call(x_EMD: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = expert_linear) -> Tensor:
        return forward(x_EMD, None, linear)

    return call


def limit_waits(model: MixtureOfTokensForCausalLM, seconds: float) -> None:
    """End a process that waits longer than this for another. Every process calls it, before anything is exchanged."""
    if not torch.distributed.is_initialized():
        return
    groups = [torch.distributed.group.WORLD]
    if (meshes := getattr(model, "_mesh_manager", None)) is not None:  # transformers makes them with torch's own limit
        names = ("dp_replicate", "fsdp", "efsdp", "ep")
        groups += [meshes.get_mesh(name).get_group() for name in names]
    for group in groups:
        # torch 2.15 names it so; before, it was not public.
        limit = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
        limit(timedelta(seconds=seconds), group)


def is_sharded(model: Any) -> bool:
    return getattr(model, "is_distributed_loading_by_transformers", False)


def whole_state(model: MixtureOfTokensForCausalLM) -> dict[str, Tensor]:
    """A sharded model's weights in one piece on the first process's CPU; empty elsewhere. Every process calls it."""
    return gather_full_state_dict(model)


def load_whole(model: MixtureOfTokensForCausalLM, state: dict[str, Tensor]) -> None:
    """Give a sharded model these weights, which every process has in one piece."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


@contextmanager
def whole(model: MixtureOfTokensForCausalLM) -> Iterator[MixtureOfTokensForCausalLM]:
    """A model in one piece, to set its weights: itself, or a copy, whose weights a sharded one gets at the end."""
    if not is_sharded(model):
        yield model
        return
    with torch.random.fork_rng(devices=[]):  # what it draws does not count
        plain: Any = unsharded(model)
    yield plain.to(model.device)
    state = plain.state_dict()
    for value in state.values():  # what was fitted in each process may differ in rounding
        torch.distributed.broadcast(value, src=0)
    load_whole(model, state)


def unsharded(model: MixtureOfTokensForCausalLM, state: dict[str, Tensor] | None = None) -> MixtureOfTokensForCausalLM:
    """A model of one process, with the configuration of a sharded one and these weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)
    plain = MixtureOfTokensForCausalLM(config)
    for name, weight in plain.named_parameters():  # buffers have their own
        weight.data = weight.data.to(model.get_parameter(name).dtype)
    if state is not None:
        plain.load_state_dict(state)
    return plain


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def broadcast(value: Any) -> Any:
    """In all processes, the first one's value; in one that has met no other, its own."""
    values = [value]
    if have_met():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
