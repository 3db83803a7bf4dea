"""Cross-entropy in chunks against the plain one, in value, gradient and memory; the load-balancing loss by hand."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from mixture_of_tokens.layers.losses import IGNORE, LoadBalancingLoss, chunked_cross_entropy
from routings import build, relative_error, some_mask, tokens

S, D, V = 11, 5, 7


def plain_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE, reduction="sum")


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels, of which the first, two in the middle and the last are ignored."""
    labels = torch.randint(V, (S,), generator=torch.Generator().manual_seed(0))
    labels[[0, 5, 6, S - 1]] = IGNORE
    return tokens(S, D, dtype=dtype).requires_grad_(), tokens(V, D, seed=2, dtype=dtype).requires_grad_(), labels


def with_gradients(cross_entropy, hidden: Tensor, head: Tensor, labels: Tensor, scale=1.0) -> tuple[Tensor, ...]:
    loss = cross_entropy(hidden, head, labels)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, head))


def test_a_frozen_head_has_no_gradient_and_none_is_kept():
    hidden, head, labels = example(torch.float64)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss = chunked_cross_entropy(hidden, head.detach(), labels)
    assert kept == [hidden.shape, (0, D)]
    (found,) = torch.autograd.grad(loss, hidden)
    assert_close(found, with_gradients(plain_cross_entropy, hidden, head, labels)[1])


@pytest.fixture(params=[1, 2, 4, S - 1, S, 100], ids=lambda tokens: f"{tokens} at once")
def chunked(request):
    """Of so many tokens at once, and logits of half a token to spare."""
    return partial(chunked_cross_entropy, logits_at_once=request.param * V + V // 2)


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_sum_to_the_whole(chunked, dtype, scale):
    found = with_gradients(chunked, *example(dtype), scale=scale)
    assert_close(found, with_gradients(plain_cross_entropy, *example(dtype), scale=scale))


def test_chunks_sum_to_the_whole_in_bfloat16(chunked):
    hidden, head, labels = example(torch.bfloat16)
    found = with_gradients(chunked, hidden, head, labels)
    expected = with_gradients(plain_cross_entropy, hidden.double(), head.double(), labels)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for actual, exact in zip(found, expected, strict=True):
        assert relative_error(actual, exact) < 1.6e-2


def test_autocast_takes_the_products_in_bfloat16():
    hidden, head, labels = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        chunked = with_gradients(chunked_cross_entropy, hidden, head, labels)
    assert [t.dtype for t in chunked] == [torch.float32] * 3
    for actual, exact in zip(chunked, with_gradients(plain_cross_entropy, hidden, head, labels), strict=True):
        assert 0 < relative_error(actual, exact) < 1.6e-2


def test_autocast_leaves_float64_as_it_is():
    expected = with_gradients(chunked_cross_entropy, *example(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(chunked_cross_entropy, *example(torch.float64))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_predicted_may_be_anything(chunked, value):
    hidden, head, labels = example(torch.float64)
    expected = with_gradients(chunked, hidden, head, labels)
    found = with_gradients(chunked, hidden.masked_fill((labels == IGNORE)[:, None], value), head, labels)
    assert (labels == IGNORE).any()
    assert all(map(torch.equal, found, expected))


def test_a_sum_over_many_chunks_is_not_rounded_away():
    # 1,024 tokens one by one. Added up in bf16, the gradient of the head would stop growing at 256 of them.
    hidden, head = torch.ones(1024, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    loss = chunked_cross_entropy(hidden, head, torch.zeros(1024, dtype=torch.long), logits_at_once=2)
    assert_close(loss.item(), 1024 * torch.tensor(2.0).log().item(), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss, head)  # p - 1 for the label, p for the other, with p = 1/2
    assert gradient.flatten().tolist() == [-512, 512]


@pytest.mark.parametrize("autocast", [False, True])
def test_in_float16_a_mean_may_be_of_a_sum_beyond_its_range(autocast):
    count, dtype = 2**16, torch.float32 if autocast else torch.float16
    hidden, head = torch.full((count, 1), 30.0, dtype=dtype), torch.zeros(2, 1, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = chunked_cross_entropy(hidden, head, torch.zeros(count, dtype=torch.long)) / count
    (gradient,) = torch.autograd.grad(loss, head)  # its sum is 983,040, and fp16 ends at 65,504
    assert gradient.dtype == dtype
    assert gradient.flatten().tolist() == [-15, 15]


def test_nothing_to_predict_is_no_loss():
    hidden, head, labels = example(torch.float64)
    loss, *gradients = with_gradients(chunked_cross_entropy, hidden, head, torch.full_like(labels, IGNORE))
    assert not loss
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_one_side_may_be_frozen(frozen):
    hidden, head, labels = example(torch.float64)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    leaf = head if frozen == "hidden" else hidden
    found = torch.autograd.grad(chunked_cross_entropy(hidden, head, labels), leaf)
    assert_close(found, torch.autograd.grad(plain_cross_entropy(hidden, head, labels), leaf))


@pytest.mark.parametrize("label", [-5, -1, 11])
def test_a_label_that_is_no_class_is_an_error(label):
    hidden, head = torch.randn(3, 4), torch.randn(11, 4)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        chunked_cross_entropy(hidden, head, torch.tensor([2, label, IGNORE]))


def test_second_derivatives_are_refused():
    hidden, head, labels = example(torch.float64)
    loss = chunked_cross_entropy(hidden, head, labels)
    with pytest.raises(
        RuntimeError, match=r"chunked_cross_entropy has no second derivatives: give the model no labels"
    ):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_evaluation_gives_the_same_loss():
    hidden, head, labels = example(torch.float64)
    expected = chunked_cross_entropy(hidden, head, labels).detach()
    with torch.no_grad():
        assert_close(chunked_cross_entropy(hidden, head, labels), expected)


# The peak of this process alone: getrusage's maximum would count what its parent had when it started it.
PEAK = """
import sys, torch
from torch.nn import functional
from mixture_of_tokens.layers.losses import chunked_cross_entropy

hidden, head = torch.randn(16384, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
labels = torch.randint(50257, (16384,))
if sys.argv[1] == "chunked":
    chunked_cross_entropy(hidden, head, labels).backward()
else:
    functional.cross_entropy(hidden @ head.T, labels, reduction="sum").backward()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def peak_memory(kind: str) -> int:
    """Bytes at the peak of a process that computes the loss and its gradients: 16,384 tokens, 50,257 words."""
    run = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
    return 1024 * int(run.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak in /proc")


@needs_proc
@pytest.mark.slow
def test_peak_memory_is_below_a_quarter_of_the_logits():
    logits = 16384 * 50257 * 4  # of which a plain loss holds three at once: measured 9.9 GB against 0.6 GB
    assert peak_memory("chunked") < logits / 4
    assert peak_memory("plain") > logits  # what is measured would show them


# The load-balancing loss.


def balance(logits: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    probabilities = logits.softmax(-1)
    return LoadBalancingLoss()(probabilities, probabilities.topk(top_k).indices, mask)


def literal_balance(logits: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """E * sum_e f_e P_e, token by token."""
    num_experts = logits.shape[-1]
    rows = logits.reshape(-1, num_experts)
    real = [True] * len(rows) if mask is None else mask.flatten().tolist()
    probabilities = [row.exp() / row.exp().sum() for row, is_real in zip(rows, real, strict=True) if is_real]
    asked = [0] * num_experts
    for probability in probabilities:
        for e in sorted(range(num_experts), key=lambda e, p=probability: -p[e].item())[:top_k]:
            asked[e] += 1
    n = len(probabilities)
    shares = [count / (n * top_k) for count in asked]
    means = torch.stack(probabilities).mean(0)
    return num_experts * torch.stack([f * p for f, p in zip(shares, means, strict=True)]).sum()


@pytest.mark.parametrize("mask", [None, some_mask(4, 6)], ids=["unmasked", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_loss_is_the_papers_sum(top_k, mask):
    logits = tokens(4, 6, 5).requires_grad_()
    loss, expected = balance(logits, top_k, mask), literal_balance(logits, top_k, mask)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_loss_is_one_when_balanced_and_more_when_not(top_k):
    # Token s likes expert s most, then s + 1 and so on: each expert is asked as often and as strongly as the others.
    balanced = torch.stack([torch.arange(5.0).flip(0).roll(s) for s in range(5)])
    assert_close(balance(balanced, top_k, None), torch.tensor(1.0))
    # All tokens on the same: f is 1/k for k of them, P is all but 1/k: E * k * 1/k * 1/k.
    crowded = (100.0 * (torch.arange(5) < top_k)).expand(4, 5)
    assert_close(balance(crowded, top_k, None), torch.tensor(5 / top_k))


def test_load_balancing_loss_pushes_the_router_towards_balance():
    layer, x, losses = build("tc_top1"), tokens(), []
    for _ in range(20):
        loss = balance(layer.gate(x), 1, None)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, layer.gate.weight)
        assert gradient.norm() > 1e-3
        with torch.no_grad():
            layer.gate.weight.sub_(0.1 * gradient)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("padding", [(0, 3, 0, 0), (2, 0, 0, 0), (0, 0, 0, 5)], ids=["right", "left", "rows"])
def test_load_balancing_loss_does_not_see_padding(padding):
    logits, mask = tokens(4, 6, 5), some_mask(4, 6)
    padded = functional.pad(logits, (0, 0, *padding), value=9.0)
    padded[..., 0] += 9 * (padded[..., 0] == 9.0)  # all of the padding wants expert 0
    padded_mask = functional.pad(mask, padding, value=False)
    expected = balance(logits, 2, mask)
    assert_close(balance(padded, 2, padded_mask), expected)
    assert not torch.isclose(balance(padded, 2, None), expected)  # the control


def test_load_balancing_loss_of_nothing_is_zero():
    assert not balance(tokens(4, 6, 5), 1, torch.zeros(4, 6, dtype=torch.bool))
