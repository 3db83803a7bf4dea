"""How a model lies over the processes that train it together.

shard            processes that hold one copy of the model together, each a part of every weight (FSDP2)
replicate        such sets of processes, each with a copy (HSDP)
expert_parallel  processes of a set that divide the experts: each owns E / P of them and computes these for all
"""

import math
from dataclasses import dataclass

import torch

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.settings.choices import Device
from mixture_of_tokens.settings.routings import BY_CONSTRUCTION
from mixture_of_tokens.utils.checks import at_least_one, divisors
from mixture_of_tokens.utils.formatting import listing


def check_device(device: Device | None) -> None:
    """Raises ValueError where --device asks for what is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave the flag out, or give cpu")


@dataclass(frozen=True)
class Placement:
    """How a model lies over processes. The default, one shard, is a whole model in every process (DDP)."""

    shard: int = 1
    replicate: int = 1
    expert_parallel: int = 1

    @classmethod
    def of(
        cls,
        shard: int | None,
        replicate: int | None,
        expert_parallel: int | None,
        count: int,
        what: str = "processes (torchrun --nproc-per-node)",
    ) -> "Placement":
        """What the flags ask of so many processes; what is not given follows.

        Raises ValueError, naming legal numbers, for what does not fit.
        """
        at_least_one(shard=shard, replicate=replicate, expert_parallel=expert_parallel)
        times = "" if replicate is None else f" times --replicate {replicate}"
        if shard is None and replicate is not None and count % replicate:
            legal = listing(divisors(count)[:-1])
            raise ValueError(f"--replicate {replicate} does not divide the {count} {what}; legal are {legal}")
        if shard is None:
            shard = 1 if replicate is expert_parallel is None else max(1, count // (replicate or 1))
        if replicate is None:
            replicate = 1 if shard == 1 else max(1, count // shard)  # DDP has its own copies
        if shard == 1 and replicate > 1:
            raise ValueError(f"--replicate {replicate} is for --shard above 1; without shards every process has a copy")
        expert_parallel = expert_parallel or 1
        for flag, number in {"--shard": shard, "--expert-parallel": expert_parallel}.items():
            if number > count == 1:
                raise ValueError(f"{flag} {number} is for {number} {what}, or a multiple, and there is one")
        if shard > 1 and shard * replicate != count:
            legal = listing(divisors(count)[1:])
            raise ValueError(f"--shard {shard}{times} does not make up the {count} {what}; --shard can be {legal}")
        if shard % expert_parallel:
            legal = listing(divisors(shard))
            raise ValueError(f"--expert-parallel {expert_parallel} does not divide --shard {shard}; legal are {legal}")
        return cls(shard, replicate, expert_parallel)

    @property
    def sharded(self) -> bool:
        return self.shard > 1

    def check(self, config: MixtureOfTokensConfig, *, on_cpu: bool = False) -> None:
        """Raises ValueError for a model that cannot lie so."""
        if not self.sharded:
            return
        flag = f"--shard {self.shard}"
        if config.tie_word_embeddings:
            raise ValueError(f"{flag}: embeddings that are the head too cannot be sharded; leave tie_word_embeddings")
        if config.learnable_temperature:
            raise ValueError(f"{flag}: a learnable temperature is one number, which cannot be sharded")
        if on_cpu and torch.accelerator.is_available():
            where = torch.accelerator.current_accelerator()
            raise ValueError(f"{flag} lies over the machine's {where}, and not on the CPU: leave out --device cpu")
        if self.expert_parallel == 1:
            return
        flag = f"--expert-parallel {self.expert_parallel}"
        if not config.sparse_routings:
            raise ValueError(f"{flag}: a model without sparse blocks has no experts to divide")
        for routing in config.sparse_routings:
            if routing.balance != BY_CONSTRUCTION:
                raise ValueError(
                    f"{flag}: {routing.title} sends experts as many tokens as they are chosen by, which would differ "
                    "from process to process; --shard works"
                )
        count = config.num_experts
        if count % self.expert_parallel:
            legal = listing(divisors(math.gcd(self.shard, count)))
            raise ValueError(f"{flag} does not divide the {count} experts; legal are {legal}")

    def __str__(self) -> str:
        if not self.sharded:
            return "copies"
        words = [f"{self.shard} shards"] + [f"{self.replicate} times"] * (self.replicate > 1)
        return ", ".join(words + [f"experts over {self.expert_parallel}"] * (self.expert_parallel > 1))


COPIES = Placement()
