"""A model's name is its configuration: 'MoT-Medium/32E/8' <-> `MixtureOfTokensConfig` (`models/names.py`).

    Transformer-SIZE         the dense model
    MoT-SIZE/<G>E[/<k>]      Mixture of Tokens
    Uniform-SIZE/<G>E[/<k>]  Mixture of Tokens without a router
    TC-SIZE/<G>E[/<k>]       Token Choice
    STC-SIZE/<G>E[/<k>]      Sigmoid Token Choice
    DMoE-SIZE/<G>E[/<k>]     Default MoE
    EC-SIZE/<G>E[/<k>]       Expert Choice
    ET-SIZE/<G>E[/<k>]       Expert Threshold
    ReMoE-SIZE/<G>E[/<k>]    ReMoE
    SoftMoE-SIZE/<G>E[/<k>]  Soft MoE, which is not causal

A name without -SIZE, such as TC/32E/8, leaves the sizes of the dense model to fields of the configuration.

G is the group size and k the granularity, 1 where it is left out. The sparse blocks have E = G * k experts of width
d_ff / k: G times the parameters of the dense feed-forward at its FLOPs (Antoniak et al., arXiv 2310.15961). The later
half of the blocks is sparse, in Mini all of them. Systems with equal G and k cost the same: in MoT every expert reads
one mixture per group; in Token Choice, and on average in the others, a token goes to k experts.

With `shared_experts` = n below k, n of the k experts are the same for every token: there are G * (k - n) others, of
which a token goes to k - n. The cost is the same again.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mixture_of_tokens.settings.routings import BY_PREFIX, DENSE, MIXTURE, Routing
from mixture_of_tokens.utils.checks import LARGEST, check
from mixture_of_tokens.utils.wording import nearest


@dataclass(frozen=True)
class Size:
    """A dense model and its training batch. The widths of gated and plain feed-forwards give about equal FLOPs."""

    hidden_size: int
    blocks: int
    heads: int
    gated_width: int
    plain_width: int
    context: int = 256
    vocab_size: int = 50257
    batch: int = 256  # sequences a step
    sparse_everywhere: bool = False
    mixture_temperature: float = 1.0  # of a Mixture of Tokens' router


# Medium and Base are the paper's, Mini its authors' blog post's. Nano trains in minutes on a CPU, and there a sharper
# router learned faster (experiments/LOG.md); Micro, which takes an hour, has the same.
SIZES = {
    "Nano": Size(
        32,
        blocks=4,
        heads=1,
        gated_width=96,
        plain_width=128,
        context=64,
        vocab_size=512,
        batch=128,
        mixture_temperature=0.25,
    ),
    "Micro": Size(
        128,
        blocks=4,
        heads=4,
        gated_width=384,  # whose eighth and sixteenth are multiples of eight
        plain_width=576,
        context=128,
        vocab_size=1024,
        batch=64,
        mixture_temperature=0.25,
    ),
    "Mini": Size(256, blocks=4, heads=4, gated_width=672, plain_width=1024, sparse_everywhere=True),
    "Medium": Size(512, blocks=8, heads=8, gated_width=1376, plain_width=2048),
    "Base": Size(768, blocks=12, heads=12, gated_width=2048, plain_width=3072),
}


@dataclass(frozen=True)
class Name:
    """A parsed name; `str` returns it as text. `system` is a routing's prefix; a dense model has G = k = 1.

    size: a key of `SIZES`; "" where the configuration's fields say it.
    """

    system: str
    size: str
    group_size: int = 1
    granularity: int = 1

    @property
    def routing(self) -> Routing:
        return BY_PREFIX[self.system]

    @property
    def dimensions(self) -> Size:
        """Of the size; of a name without one they stand for what the configuration must say."""
        return SIZES[self.size or "Medium"]

    def __str__(self) -> str:
        head = f"{self.system}-{self.size}" if self.size else self.system
        if not self.routing.sparse:
            return head
        granularity = f"/{self.granularity}" if self.granularity > 1 else ""
        return f"{head}/{self.group_size}E{granularity}"

    def matched(self) -> list[str]:
        """The names of all systems of this size, G and k: equal FLOPs per token but for their routing."""
        systems = BY_PREFIX if self.routing.sparse else [self.system]
        return [str(Name(system, self.size, self.group_size, self.granularity)) for system in systems]


def _as_a_path(name: str) -> str:
    """Where a run or a text belongs that is given in place of a name; '' for what is neither."""
    path = Path(name)
    if (path / "config.yaml").is_file():
        return f"; {name} is a run, whose settings are taken with --config {path / 'config.yaml'}"
    return f"; {name} is no model: text is given with --data" if path.exists() or path.suffix else ""


def _as_a_size(word: str) -> str:
    """What stands before a size that is given alone; '' for what is none."""
    size = next((size for size in SIZES if size.lower() == word.lower()), None)
    return f"; the system stands before the size, as in {MIXTURE.prefix}-{size}/32E/8" if size else ""


def parse_name(name: str) -> Name:
    """The parts of a name. Raises ValueError, with the legal values, if it does not follow the grammar."""
    check("name", name, str)
    if "," in name or name.isdecimal():
        hint = "several names have a space between them" if "," in name else "several seeds are given as 0,1,2"
        raise ValueError(f"{name!r} is no name of a model: {hint}")
    head, *parts = name.split("/")
    system, dash, size = head.partition("-")
    has_none = not dash and (parts or system == DENSE.prefix)
    for what, word, legal in (("system", system, BY_PREFIX), ("size", size, {"": None} if has_none else SIZES)):
        if word not in legal:
            hint = _as_a_size(word) or nearest(word, legal) or _as_a_path(name)
            raise ValueError(f"{name!r} has no legal {what}: {word!r} is none of {', '.join(legal)}{hint}")
    if not BY_PREFIX[system].sparse:
        if parts:
            raise ValueError(f"{name!r}: a {system} has no experts, its name is {head!r}")
        return Name(system, size)
    grouping = re.fullmatch(r"([1-9]\d*)E(?:/([1-9]\d*))?", "/".join(parts))
    if grouping is None:
        raise ValueError(
            f"{name!r}: after the size comes /<group size>E and, if not 1, /<granularity>, "
            f"as in '{head}/32E' or '{head}/32E/8'"
        )
    group_size, granularity = int(grouping[1]), int(grouping[2] or 1)
    if max(group_size, granularity) > LARGEST:
        raise ValueError(f"{name!r}: group size and granularity are at most {LARGEST}")
    return Name(system, size, group_size, granularity)
