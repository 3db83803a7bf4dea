"""A dense model's weights as those of a sparse one that computes the same.

Virtual groups (He et al., arXiv 2410.07524). With group size G and granularity k a sparse layer has G copies of the
dense feed-forward, each cut into k slices of its hidden units, an expert a slice:

    FFN(x) = sum over slices s of FFN_s(x)

The k router rows of a copy are equal, so a token goes to all slices of one copy. Its gates, which are normalised, are
1 / k each, and experts give k times their slice. So the layer is the dense feed-forward, whichever copy is chosen.
Copies come to differ by the tokens that they get, and slices by what they compute.

Two things about the routers decide how well training goes on (docs/guide/dense.md). Their rows are the centres of
clusters of what the layer reads, so that a copy begins with tokens that are alike; drawn rows give half the gain.
And they are large: rows of a copy drift apart by Adam's steps, which do not grow with them, and copies that fall apart
before they have learned anything cost more than the experts bring.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.models.forward_hooks import watch
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM

SPREAD = 4.0  # of a token's logits over the copies, their standard deviation; of drawn rows it is 0.2
ROUNDS = 15  # of k-means


@torch.no_grad()
def upcycled_weights(dense: dict[str, Tensor], model: MixtureOfTokensForCausalLM) -> dict[str, Tensor]:
    """Weights for a new model that computes what the dense model with these weights does; routers are the new ones'."""
    weights = model.state_dict() | {name: value for name, value in dense.items() if name in model.state_dict()}
    for i, block in enumerate(model.model.layers):
        if model.config.routings[i].sparse:
            weights |= _copies(f"model.layers.{i}.mlp", dense, block.mlp)
    return weights


def _copies(place: str, dense: dict[str, Tensor], layer: Any) -> dict[str, Tensor]:
    """Expert c * k + s is slice s of copy c."""
    k = layer.num_experts_per_tok
    copies = layer.num_experts // k

    def sliced(name: str) -> Tensor:  # (k, width / k, D)
        return dense[f"{place}.{name}_proj.weight"].unflatten(0, (k, -1))

    first = [sliced("gate"), sliced("up")] if layer.experts.gated else [sliced("up")]
    last = k * dense[f"{place}.down_proj.weight"].T.unflatten(0, (k, -1)).mT  # (k, D, width / k)
    return {
        f"{place}.experts.{'gate_up' if layer.experts.gated else 'up'}_proj": torch.cat(first, 1).repeat(copies, 1, 1),
        f"{place}.experts.down_proj": last.repeat(copies, 1, 1),
        f"{place}.gate.weight": layer.gate.weight[::k].repeat_interleave(k, 0),
    }


@torch.no_grad()
def route_by_clusters(model: MixtureOfTokensForCausalLM, texts: Iterable[Tensor]) -> float:
    """Set the router rows of all copies to centres of clusters of what their layers read of texts (B, T).

    Returns the share of the tokens that the busiest copy gets, over an even one, in the worst layer.

    Raises ValueError for text with fewer tokens than there are copies.
    """
    blocks: Any = zip(model.model.layers, model.config.routings, strict=True)
    read: dict[Any, list[Tensor]] = {block.mlp: [] for block, routing in blocks if routing.sparse}
    watch(model, dict.fromkeys(read, lambda layer, x_BTD, *_, **__: read[layer].append(x_BTD)), texts)
    loads = [0.0]
    for layer, inputs in read.items():
        x_SD, k = torch.cat([given.flatten(0, 1) for given in inputs]), layer.num_experts_per_tok
        copies = layer.num_experts // k
        if len(x_SD) < copies:
            raise ValueError(f"the text has {len(x_SD)} tokens, and {copies} copies need more: name more with --data")
        mean_D = F.normalize(x_SD.mean(0), dim=0)
        rows_CD = centres(x_SD, copies)
        rows_CD -= (rows_CD @ mean_D)[:, None] * mean_D  # what all tokens share would favour some copies
        logits_SC = x_SD @ rows_CD.T
        rows_CD *= SPREAD / (logits_SC - logits_SC.mean(1, keepdim=True)).std().clamp(min=1e-6)
        layer.gate.weight.copy_(rows_CD.repeat_interleave(k, 0))
        loads.append(float(logits_SC.argmax(1).bincount(minlength=copies).max()) * copies / len(x_SD))
    return max(loads)


def centres(x_SD: Tensor, count: int) -> Tensor:
    """The directions (count, D) in which clusters of rows lie from the mean of all: spherical k-means."""
    z_SD = F.normalize(x_SD - x_SD.mean(0), dim=1)
    found_CD = z_SD[torch.randperm(len(z_SD))[:count]]
    for _ in range(ROUNDS):
        sums_CD = torch.zeros_like(found_CD).index_add(0, (z_SD @ found_CD.T).argmax(1), z_SD)
        empty_C1 = (sums_CD == 0).all(1, keepdim=True)  # stays where it is
        found_CD = torch.where(empty_C1, found_CD, F.normalize(sums_CD, dim=1))
    return found_CD
