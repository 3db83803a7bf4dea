"""Distillation: each layer of Token Choice learns what the same layer of the Mixture of Tokens gives alone.

The formulas are in `switch.py`. All weights of a layer are fitted to the inputs and outputs that `branches` records, by
Adam on the squared error, each layer to its own. No model is trained: the loss of a language model appears nowhere. A
layer starts from

    router    c_e / temperature - b_e u         u . x is about 1 for every x, so that b_e is a bias
    experts   s_e FFN_e(a_e x)                  a_e: e's mean gate where it is chosen, as x comes with it into a mixture
                                                s_e: that gate over the new one; a softmax's is smaller
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event

import torch
from torch import Tensor
from tqdm import tqdm

from mixture_of_tokens.conversion.switch import (
    Branches,
    Errors,
    alone_bias,
    branches,
    constant_direction,
    distance,
    router_bias,
    sparse_layers,
)
from mixture_of_tokens.data.groups import Blocks, training_groups
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.token_choice import TokenChoice
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.utils.progress import progress_bar

STEPS = 2000  # of Adam, for each layer
STEP_TOKENS = 2048  # of a step
PART = 256  # of them are made on one part of the text, so that the parts' inputs and outputs alone are held in memory
READ = 4  # times that a token is read, on average: that the source serves it alone costs more than a step
SERVING = 0.5  # of the time of the fits goes into that at Nano, for the bar
FEW = 4  # experts of a token then, as a multiple of the granularity: 0.3 % off all of them, and much faster
RATE, BETAS = 0.05, (0.9, 0.95)  # the rate is a share of a weight's mean size, and falls to zero
ROUTER = 0.5  # of the rate, for the router; found by experiment, as the others (experiments/LOG.md)
RATE_AGAIN = 0.005  # of layers that are distilled already; from RATE on they would lose what they have learned


def distil(
    source: MixtureOfTokensForCausalLM,
    target: MixtureOfTokensForCausalLM,
    text: Blocks,
    *,
    steps: int,
    again: bool = False,
) -> Errors:
    """Fit the sparse layers of a model that was switched to those of its source served alone. They change in place.

    Args:
        source: with calibrated companions; it is left as it was.
        target: of `to_token_choice`; or, `again`, distilled before, with another top k.
        text: that the source was trained on; where it ends, it begins again.
        steps: of Adam, for each layer.

    Returns, by layer, the distance from the source's output before and after, on the parts fitted first and last.
    The same arguments give the same weights.

    Raises ValueError where the text has no group of different texts.
    """
    layers, groups = sparse_layers(target, TokenChoice), _endless(text, source.config.group_size)
    few = None  # of a group of one, whose experts weigh a token alike
    if source.config.group_size > 1:
        few = min(source.config.num_experts, FEW * source.config.num_experts_per_tok)
    before: dict[int, float] = {}
    fits: dict[int, Fit] = {}
    seen: Branches = {}
    what = f"Distilling {len(layers)} layers, top {target.config.num_experts_per_tok}"
    total, form = (1 + SERVING) * len(layers) * steps, "{l_bar}{bar}| {elapsed}<{remaining}"
    # Time left is by all that was done, as text is served and steps are made in turns.
    bar = progress_bar(what, total=total, bar_format=form, smoothing=0, miniters=0, delay=2)
    step_of_token = SERVING * len(layers) * READ / STEP_TOKENS
    for done in range(0, steps, PART):
        part = min(PART, steps - done)
        seen.clear()
        seen |= branches(source, groups, part * STEP_TOKENS // READ, few, lambda n: bar.update(n * step_of_token))
        if not fits:
            before = {i: distance(layer, *seen[i]) for i, layer in layers}
            if not again:
                for i, mixture in sparse_layers(source, MixtureOfTokens):
                    start(mixture, dict(layers)[i], seen[i][0][:STEP_TOKENS])
            fits = {i: Fit(layer, steps, RATE_AGAIN if again else RATE) for i, layer in layers}
        _at_once([fits[i].advance(*seen[i], part) for i, _ in layers], source.device, bar)
    bar.close()
    return {str(i): (before[i], distance(layer, *seen[i])) for i, layer in layers}


def _at_once(fits: Sequence[Iterator[None]], device: torch.device, bar: tqdm) -> None:
    """Take all steps of these. On a CPU layers share its threads, as the operations of one are too small for many."""
    threads, stopped = torch.get_num_threads(), Event()
    workers = min(threads, len(fits))

    def finish(fit: Iterator[None]) -> None:
        for _ in fit:
            with bar.get_lock():
                bar.update()
            if stopped.is_set():
                break

    if device.type != "cpu" or workers == 1:  # this thread alone has the process's current device
        for fit in fits:
            finish(fit)
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        try:
            for done in as_completed([pool.submit(finish, fit) for fit in fits]):
                done.result()
        finally:  # also where ctrl-c or an error ends the wait
            stopped.set()
            torch.set_num_threads(threads)


def _endless(text: Blocks, group_size: int) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from training_groups(text, group_size, groups=None)


class Fit:
    """Minimises the squared distance of a layer's output from y, as a share of the size of y; rates fall to zero."""

    def __init__(self, layer: TokenChoice, steps: int, rate: float):
        self.layer = layer.eval().requires_grad_()
        rates = [(weight, ROUTER * rate if weight is layer.gate.weight else rate) for weight in layer.parameters()]
        groups = [{"params": [weight], "lr": share * float(weight.detach().abs().mean())} for weight, share in rates]
        self.generator = torch.Generator().manual_seed(0)
        self.adam = torch.optim.Adam(groups, betas=BETAS, fused=True)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.adam, 1.0, 0.0, total_iters=steps)

    def advance(self, x_SD: Tensor, y_SD: Tensor, steps: int) -> Iterator[None]:
        """Go `steps` of the steps on, each on tokens drawn from these, and yield after each."""
        for _ in range(steps):
            drawn = torch.randint(len(x_SD), (min(STEP_TOKENS, len(x_SD)),), generator=self.generator)
            rows = drawn.to(x_SD.device)
            y = y_SD[rows]
            error = (self.layer(x_SD[rows][None])[0] - y).square().sum() / y.square().sum()
            error.backward()
            self.adam.step()
            self.adam.zero_grad()  # here, so that no gradients are held while other layers are fitted
            self.schedule.step()
            yield


@torch.no_grad()
def start(source: MixtureOfTokens, layer: TokenChoice, x_SD: Tensor) -> None:
    """Fold biases into the router, and gates into the experts."""
    gate_SE = (source.logits(x_SD[None])[0] - alone_bias(source)).sigmoid()
    chosen_SE = torch.zeros_like(gate_SE).scatter(1, gate_SE.topk(layer.num_experts_per_tok).indices, 1)
    answered_SE = chosen_SE * gate_SE.square()  # how much of e's output comes from a token, about
    mean_E = (answered_SE * gate_SE).sum(0) / answered_SE.sum(0).clamp(min=1e-9)
    layer.gate.weight.sub_(router_bias(source, layer)[:, None] * constant_direction(x_SD))
    first = layer.experts.gate_up_proj if layer.experts.gated else layer.experts.up_proj
    first.mul_(mean_E.clamp(0.05, 1)[:, None, None])  # an expert that nothing has chosen keeps a little
    scores_SE = layer.scores(layer.gate(x_SD))
    new_SK, expert_SK = layer.gates(scores_SE)
    new_SE = torch.zeros_like(scores_SE).scatter(1, expert_SK, new_SK)
    scale_E = (new_SE * gate_SE).sum(0) / new_SE.square().sum(0)  # the best by least squares; none of 0 / 0
    layer.experts.down_proj.mul_(scale_E.nan_to_num(1).clamp(0.05, 20)[:, None, None])
