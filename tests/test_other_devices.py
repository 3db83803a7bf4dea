"""On another device than the CPU nothing is left behind, numbers are the same, and no training step waits."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import processes
from mixture_of_tokens import calibrate_companions, calibrate_thresholds
from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import to_token_choice, token_choice_config
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.telemetry import measure
from mixture_of_tokens.settings.routings import ROUTINGS, TABLE
from routings import tiny


def text() -> Blocks:
    """80 rows, so that the last group of 3 is not full."""
    drawn = np.random.default_rng(0).integers(1, 97, 960).astype(np.uint16)
    return Blocks(drawn, np.arange(120, 961, 120), 12, 2 * len(drawn))


def check(kind: str) -> None:
    from played_device import DEVICE, Playing, moved, waits

    def numbers(model, device: torch.device | str) -> dict:
        """All that a model is used for, on a device."""
        ids = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(0)).to(device)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        found, waits[:] = {}, []
        model.train()
        found["loss"] = model(ids, attention_mask=mask, labels=ids * mask - 100 * (1 - mask), use_cache=False).loss
        found["loss"].backward()
        model.balance()
        waited = list(waits)
        found["gradients"] = {name: weight.grad for name, weight in model.named_parameters()}
        found["measures"] = measure(model.eval(), {"input_ids": ids, "attention_mask": mask})
        calibrate_thresholds(model, [{"input_ids": ids}])
        calibrate_companions(model, [{"input_ids": ids}])
        found["evaluation"] = evaluate_blocks(model, text(), group_size=3, batch_size=6)["loss"]
        if ROUTINGS[kind].causal:
            written = {"attention_mask": mask[:, -9:], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            found["written"] = model.generate(ids[:, -9:], **written)
        if ROUTINGS[kind].serves_alone:
            model.serve_alone()
            found["alone"] = model(ids).logits
        if kind == "mixture_of_tokens":
            model.serve_alone(num_experts_alone=2)
            found["alone, few experts"] = model(ids).logits
            model.serve_alone(False)
            target = MixtureOfTokensForCausalLM(token_choice_config(model.config, top_k=2)).eval().double()
            target = target if device == "cpu" else moved(target)
            to_token_choice(model, target)
            found["errors"] = distil(model, target, text(), steps=2)
        return {name: back(value) for name, value in found.items()} | {"waits": waited}

    def back(value):
        if isinstance(value, dict):
            return {name: back(each) for name, each in value.items()}
        return value.cpu().detach() if isinstance(value, torch.Tensor) else value

    model = tiny(kind).double()
    other = moved(copy.deepcopy(model))
    expected = numbers(model, "cpu")
    with Playing():
        found = numbers(other, DEVICE)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"waits"}:
        assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}")
    assert bool(found["waits"]) == ROUTINGS[kind].varies, found["waits"]


def check_that_it_can_fail() -> None:
    from played_device import DEVICE, Playing

    with Playing():
        x = torch.ones(2, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"takes a tensor .* of the CPU"):
            x + torch.ones(2)


WAITS = ["float(x[0])", "x.nonzero()", "x[x > 0]", "x[(x > 0).byte()]", "x[x > 0] = -x", "x.masked_select(x > 0)"]
WAITS += ["x[None][:, x > 0]", "x.unique()", "x.unique(dim=0)", "x.unique_consecutive()", "x.equal(x)"]
GOES_ON = ["x[i]", "x[i] = -x", "x[x > 0] = 0", "x.masked_fill(x > 0, 0)", "x.where(x > 0, 0)", "x[1:] > 0"]


def check_that_waiting_is_noticed() -> None:
    from played_device import DEVICE, Playing, waits

    for lines, expected in ((WAITS, ["/mixture_of_tokens/line:1"]), (GOES_ON, [])):
        for line in lines:
            waits[:] = []
            with Playing():
                given = {"x": torch.ones(2, device=DEVICE), "i": torch.arange(2, device=DEVICE)}
                exec(compile(line, "/mixture_of_tokens/line", "exec"), given)  # as if it were a line of the library
            assert waits == expected, line


FAST = ("mixture_of_tokens", "token_choice")


@pytest.mark.parametrize(
    "kind", [pytest.param(row.kind, marks=[pytest.mark.slow] * (row.kind not in FAST)) for row in TABLE]
)
def test_a_model_does_all_on_another_device_and_no_step_waits_for_it(kind, tmp_path):
    processes.in_processes(check, (kind,), 1, tmp_path / "log")


def test_a_tensor_that_is_left_behind_is_noticed(tmp_path):
    processes.in_processes(check_that_it_can_fail, (), 1, tmp_path / "log")


def test_waiting_is_noticed(tmp_path):
    processes.in_processes(check_that_waiting_is_noticed, (), 1, tmp_path / "log")
