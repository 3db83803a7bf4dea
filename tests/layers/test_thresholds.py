"""Expert Threshold and ReMoE: what brings load and number of experts to where they are to be. Soft MoE, as a model."""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from mixture_of_tokens import MixtureOfTokensForCausalLM, train
from mixture_of_tokens.data.groups import GROUPS, training_groups
from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.layers.losses import L1Loss, LoadBalancingLoss
from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
from mixture_of_tokens.layers.token_choice import DefaultMoE, SigmoidChoice
from mixture_of_tokens.models.threshold_calibration import calibrate_thresholds
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.settings.options import Options
from processes import in_processes, mot
from routings import tiny, tokens

D, F, E, K = 6, 5, 8, 2


class Count:
    """How many of the tokens that a layer gets go to each expert."""

    def __init__(self, layer: Routed):
        self.layer = layer
        self.share_E = torch.zeros(0)

    @torch.no_grad()
    def of(self, x: Tensor) -> "Count":
        chosen_SE = self.layer.gates(self.layer.gate(x).flatten(0, 1)) > 0  # pyright: ignore
        self.share_E = chosen_SE.double().mean(0)
        return self


def uneven(seed: int, rows: int = 64) -> Tensor:
    """Tokens with a mean and other scales in each direction, so that experts' logits have other distributions."""
    return tokens(rows, 32, D, seed=seed, dtype=torch.float32) * torch.arange(1, D + 1) + 1


def thresholds(**options) -> ExpertThreshold:
    torch.manual_seed(0)
    given = {"scores": "sigmoid"} | options
    return ExpertThreshold(D, F, E, num_experts_per_tok=K, initializer_scale=1.0, **given)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_every_expert_gets_its_even_share_of_tokens_that_it_has_not_seen(scores):
    layer = thresholds(threshold_decay=0.8, scores=scores)
    fresh = uneven(99, rows=512)
    assert not ((Count(layer).of(fresh).share_E / (K / E) - 1).abs() < 0.1).all()  # the control: before any step
    for step in range(40):
        layer(uneven(step))
        ExpertThreshold.balance([layer])
    assert_close(Count(layer).of(fresh).share_E, torch.full((E,), K / E, dtype=torch.float64), rtol=0.1, atol=0)


def test_before_the_first_step_the_load_is_even_for_normal_inputs():
    layer = thresholds(temperature=0.25)
    assert_close(
        Count(layer).of(tokens(512, 32, D, dtype=torch.float32)).share_E.mean().item(), K / E, rtol=0.05, atol=0
    )
    quantile = NormalDist().inv_cdf(1 - K / E)
    assert_close(layer.threshold, 4 * layer.gate.weight.norm(dim=1) * quantile)
    assert (
        ExpertThreshold(D, F, 2, num_experts_per_tok=2, scores="sigmoid").threshold.tolist() == [-torch.inf] * 2
    )  # all take all
    layer = ExpertThreshold(D, F, E, num_experts_per_tok=K)
    share_E = Count(layer).of(tokens(512, 32, D, dtype=torch.float32)).share_E
    assert_close(share_E.mean().item(), K / E, rtol=0.1, atol=0)
    with pytest.raises(ValueError, match="scores 'tanh' is unknown; legal are softmax, sigmoid"):
        thresholds(scores="tanh")


def by_number(layer: ExpertThreshold) -> ExpertThreshold:
    """Whose logit for an expert is the first number of a token."""
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(D)[:1].expand(E, D))
        layer.threshold.zero_()
    return layer


def numbered(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None, None] * torch.eye(D)[:1]


def test_the_threshold_goes_part_of_the_way_to_the_mean_over_micro_batches():
    """Of 8 tokens an even share, K / E = 1 / 4, is two: the third largest is what they are above."""
    layer, mask = by_number(thresholds(threshold_decay=0.75)), torch.ones(8, 1, dtype=torch.bool)
    layer(numbered(1, 2, 3, 4, 5, 6, 7, 8))  # 6
    mask[6:] = False
    layer(numbered(11, 12, 13, 14, 15, 16, 99, 99), mask)  # of six real tokens a share of 1.5, as two: 14
    ExpertThreshold.balance([layer])
    assert layer.threshold.tolist() == pytest.approx([0.25 * 10] * E)
    ExpertThreshold.balance([layer])  # nothing was seen since
    assert layer.threshold.tolist() == pytest.approx([2.5] * E)


def test_logits_in_bf16_lose_nothing_in_the_sum_over_batches():
    layer = thresholds(threshold_decay=0)
    logits_SE = torch.full((8, E), 3.140625, dtype=torch.bfloat16)
    for _ in range(300):
        layer.note(logits_SE)
    ExpertThreshold.balance([layer])
    assert layer.threshold.tolist() == pytest.approx([3.140625] * E)


@pytest.mark.parametrize("kind", [ExpertThreshold, ReMoE])
def test_nothing_is_noted_but_training_on_real_tokens(kind):
    layer, x = kind(D, F, E, num_experts_per_tok=K), uneven(0)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    kind.balance([layer])
    assert all(value.equal(before[name]) for name, value in layer.named_buffers())
    layer(x[:1, :1], torch.zeros(1, 1, dtype=torch.bool))
    kind.balance([layer])
    assert all(value.equal(before[name]) for name, value in layer.named_buffers())
    layer(x)
    kind.balance([layer])
    assert not all(value.equal(before[name]) for name, value in layer.named_buffers())  # the control


def remoe(**options) -> ReMoE:
    torch.manual_seed(0)
    return ReMoE(D, F, E, num_experts_per_tok=K, initializer_scale=1.0, **options)


def test_the_penalty_weighs_more_while_the_layers_together_have_too_many_experts():
    many, few = remoe(l1_start=1e-4, l1_factor=1.5), remoe(l1_start=1e-4, l1_factor=1.5)
    x = tokens(4, 3, D, dtype=torch.float32).abs()
    with torch.no_grad():
        many.gate.weight.fill_(1)  # all experts for every token
        few.gate.weight.fill_(-1)  # none
    many(x), few(x)
    ReMoE.balance([many, few])  # 8 and 0: 4 on average, and 2 are asked
    assert [float(layer.l1_weight) for layer in (many, few)] == pytest.approx([1.5e-4] * 2)
    many(x[:1]), few(x)  # 8 for a quarter as many: 1.6 on average
    ReMoE.balance([many, few])
    assert [float(layer.l1_weight) for layer in (many, few)] == pytest.approx([1e-4] * 2)


def test_the_penalty_is_moved_by_all_micro_batches_of_a_step():
    layer, x = remoe(l1_start=1e-4, l1_factor=1.5), tokens(4, 3, D, dtype=torch.float32).abs()
    with torch.no_grad():
        layer.gate.weight.fill_(1)  # all experts for x, none for -x
    layer(x), layer(-x)
    ReMoE.balance([layer])  # 4 on average, and 2 are asked; of the last batch alone none
    assert float(layer.l1_weight) == pytest.approx(1.5e-4)
    layer(-x), layer(x[:1])
    ReMoE.balance([layer])  # 1.6 on average, without the step before; of the last batch alone 8
    assert float(layer.l1_weight) == pytest.approx(1e-4)


def test_the_penalty_comes_back_from_next_to_nothing():
    layer, x = remoe(l1_factor=1.5), tokens(4, 3, D, dtype=torch.float32).abs()
    for sign, count in ((-1, 400), (1, 3)):
        with torch.no_grad():
            layer.gate.weight.fill_(sign)
        for _ in range(count):
            layer(x)
            ReMoE.balance([layer])
    tiny = torch.finfo(torch.float32).tiny
    assert float(layer.l1_weight) == pytest.approx(1.5**3 * tiny, rel=1e-5)


def test_the_penalty_brings_the_number_of_experts_to_the_target():
    layer, found = remoe(l1_factor=1.2), []
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    penalties: list[Tensor] = []
    layer.auxiliary_loss.register_forward_hook(lambda module, args, penalty: penalties.append(penalty))
    target = nn.Linear(D, D, bias=False).requires_grad_(False)
    for step in range(400):
        x = tokens(16, 16, D, seed=step, dtype=torch.float32) + 1  # around zero, half of all logits are positive
        loss = (layer(x) - target(x)).square().mean() + layer.l1_weight * penalties.pop()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ReMoE.balance([layer])
        found.append(Count(layer).of(x).share_E.sum().item())
    assert found[0] > 1.2 * K
    assert sum(found[-200:]) / 200 == pytest.approx(K, rel=0.05)  # it swings about the target


def test_the_penalty_is_the_l1_norm_with_busy_experts_counted_more():
    # Gates of two tokens for three experts: (2, 0, 4) and (0, 0, 1). Shares of tokens: 1/2, 0, 1; over k = 2 and times
    # E = 3: 3/4, 0, 3/2. Mean gates: 1, 0, 5/2.
    gates, penalty = torch.tensor([[2.0, 0, 4], [0, 0, 1]]), L1Loss(2)
    assert penalty(gates, None).item() == pytest.approx(3 / 4 * 1 + 3 / 2 * 5 / 2)
    masked = torch.cat([gates, torch.full((1, 3), 9.0)])
    assert penalty(masked, torch.tensor([True, True, False])).item() == pytest.approx(4.5)
    assert penalty(masked, None).item() != pytest.approx(4.5)  # the control
    shares, experts = gates.softmax(-1), gates.topk(2).indices
    assert LoadBalancingLoss()(shares, experts, None).item() != pytest.approx(4.5)


def options(data, **training: str) -> Options:
    training = {"logging_steps": "1", "save_steps": "4", "eval_steps": "4", "save_total_limit": "5"} | training
    return Options(steps=8, batch_size=16, device="cpu", data=[str(data)], training=training)


def trained(system: str, small_corpus: Path, folder: Path) -> Run:
    run = train(f"{system}-Nano/4E", out=folder / "whole", options=options(small_corpus))
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def threshold_run(small_corpus, tmp_path_factory) -> Run:
    return trained("ET", small_corpus, tmp_path_factory.mktemp("ET"))


@pytest.mark.parametrize("system", ["ET", *(pytest.param(each, marks=pytest.mark.slow) for each in ("STC", "ReMoE"))])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(system, small_corpus, threshold_run, tmp_path):
    """What balances the load is part of a checkpoint."""
    whole = threshold_run if system == "ET" else trained(system, small_corpus, tmp_path)
    again = tmp_path / "again"
    shutil.copytree(whole.directory, again)
    for made_later in ("run.json", "model", "checkpoint-8"):
        path = again / made_later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(f"{system}-Nano/4E", out=again, options=options(small_corpus), resume=True)
    assert resumed is not None
    assert resumed.facts.final_loss == whole.facts.final_loss
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole.directory, again)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    state = [value for name, value in weights[0].items() if name.rpartition(".")[2] in STATE]
    assert len(state) == 2  # of two sparse layers
    assert not torch.equal(load_file(again / "checkpoint-4" / "model.safetensors")[name_of_state(weights[0])], state[0])


def thresholds_of(model: MixtureOfTokensForCausalLM) -> Tensor:
    return torch.stack([module.threshold for module in model.modules() if isinstance(module, ExpertThreshold)])


def test_calibrated_thresholds_are_the_means_over_batches_of_real_tokens():
    model, wanted = tiny("expert_threshold").train(), []
    layer = next(module for module in model.modules() if isinstance(module, ExpertThreshold))
    batches = [{"input_ids": torch.randint(37, (6, 7), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2:, 4:] = False
    batches[1]["token_mask"] = mask
    logits: list[Tensor] = []
    hook = layer.gate.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    for batch, real in zip(batches, (torch.ones_like(mask), mask), strict=True):
        with torch.no_grad():
            model.eval()(**batch)
        scores = sorted(logits.pop().log_softmax(-1).flatten(0, 1)[real.T.flatten()].unbind(), key=lambda row: -row[0])
        share = round(len(scores) * layer.num_experts_per_tok / layer.num_experts)
        wanted.append(torch.stack(scores).sort(dim=0, descending=True).values[share])
    hook.remove()
    model.train()
    before = thresholds_of(model)
    calibrate_thresholds(model, batches)
    assert model.training
    assert_close(layer.threshold, torch.stack(wanted).mean(0))
    assert not torch.allclose(thresholds_of(model), before)
    once = thresholds_of(model)
    ExpertThreshold.balance([layer])  # nothing is left over
    assert torch.equal(thresholds_of(model), once)
    calibrate_thresholds(model, [{"input_ids": batches[0]["input_ids"][:1, :1]}])  # too few tokens for a share
    assert torch.equal(thresholds_of(model), once)
    with pytest.raises(ValueError, match="there is no batch to measure thresholds on"):
        calibrate_thresholds(model, iter(()))
    calibrate_thresholds(tiny("token_choice"), batches)  # which has none


def test_calibrated_thresholds_have_nothing_of_training_or_of_a_batch_that_failed():
    x, model = torch.randint(37, (16, 12), generator=torch.Generator().manual_seed(0)), tiny("expert_threshold")
    noted = copy.deepcopy(model)
    noted.train()(torch.randint(37, (16, 12), generator=torch.Generator().manual_seed(1)))  # and no `balance`
    noted.eval()
    for each in (model, noted):
        calibrate_thresholds(each, [{"input_ids": x}])
    assert torch.equal(thresholds_of(noted), thresholds_of(model))
    with pytest.raises(ValueError, match="batches takes"):
        calibrate_thresholds(noted, [{"input_ids": x.flip(0)}, [1]])
    with pytest.raises(ValueError, match=r"batches takes several; of one, give \[batch\]"):
        calibrate_thresholds(noted, {"input_ids": x.flip(0)})  # pyright: ignore[reportArgumentType]
    noted.balance()
    assert torch.equal(thresholds_of(noted), thresholds_of(model))


def test_thresholds_are_measured_by_each_process_alone(monkeypatch):
    """One that saves the model may call it, and waits for no other."""

    def waits(noted):
        raise AssertionError("another process was asked")

    monkeypatch.setattr("mixture_of_tokens.layers.thresholds.summed_over_processes", waits)
    model = tiny("expert_threshold")
    before = thresholds_of(model)
    calibrate_thresholds(model, [{"input_ids": torch.randint(model.config.vocab_size, (16, 12))}])
    assert not torch.equal(thresholds_of(model), before)


def test_a_run_ends_with_thresholds_of_its_last_weights(threshold_run):
    directory = threshold_run.directory
    model = load_model(str(directory))
    ended = thresholds_of(model)
    last = load_file(directory / "checkpoint-8" / "model.safetensors")
    moved = (last[name_of_state(last)] - ended[0]).abs().max()
    calibrate_thresholds(model, training_groups(text_of(str(directory)).train, 4, 2 * GROUPS))
    assert moved > 0  # and a second time they stay, but for what the layers before them now give
    assert (thresholds_of(model) - ended).abs().max() < moved / 10


STATE = ("selection_bias", "default_output", "threshold", "l1_weight")


def name_of_state(weights: dict[str, Tensor]) -> str:
    return next(name for name in weights if name.rpartition(".")[2] in STATE)


def test_soft_moe_can_be_trained_and_audited_and_does_not_write(small_corpus, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--steps", 2, "--batch-size", 16, "--device", "cpu", "--data", small_corpus, "--out", run)
    mot("train", "SoftMoE-Nano/4E", *flags)
    assert "It is not causal" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["sample"] is None
    with pytest.raises(SystemExit, match="1"):
        mot("audit", run, "--expect", "causal")
    assert "causal: NO; private: no" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        mot("generate", run, "--prompt", "abc")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert "it cannot write. To write, train a causal routing, such as MoT-" in shown[0]
    mot("report", run)
    shown = capsys.readouterr().out
    assert re.search(r"SoftMoE-Nano/4E +no +no +by construction +yes", shown)
    assert "SoftMoE-Nano/4E is not causal" in shown


def by_sign() -> tuple[SigmoidChoice, DefaultMoE]:
    """A number's sign chooses the expert."""
    torch.manual_seed(0)
    choice, averages = SigmoidChoice(D, F, 2, balance_rate=0.5), DefaultMoE(D, F, 2, default_decay=0.0)
    with torch.no_grad():
        for layer in (choice, averages):
            layer.gate.weight.copy_(torch.eye(D)[:1] * torch.tensor([[1.0], [-1.0]]))
    return choice, averages


SIGNS = [(1, 1), (1, -1)], [(-1, -1, -1, -1), (1, -1)]  # of the first process, and of the second


def balanced(directory: Path) -> None:
    """In two processes: what layers have after `balance` that have seen other tokens in each."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    choice, averages = by_sign()
    threshold, penalty = by_number(thresholds(threshold_decay=0.75)), remoe(l1_start=1.0, l1_factor=2.0)
    with torch.no_grad():
        penalty.gate.weight.copy_(threshold.gate.weight)
    batches: Any = {  # of the first process, and of the second
        choice: SIGNS,
        averages: SIGNS,
        threshold: ([range(-8, 0)], [range(4, 12), range(1, 9)]),
        penalty: ([(1, 1), (1,)], [[-1] * 10]),
    }
    for layer, of_ranks in batches.items():
        for numbers in of_ranks[rank]:
            layer(numbered(*numbers))
        layer.balance([layer])
    moved = (choice.selection_bias, threshold.threshold, penalty.l1_weight, averages.default_output)
    torch.save(moved, directory / f"process{rank}.pt")
    torch.distributed.destroy_process_group()


def balanced_apart(directory: Path) -> None:
    """In two processes: biases by a group of one process each, and by both where one has seen nothing."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group([each]) for each in (0, 1)]
    own, shared = (SigmoidChoice(D, F, 2, balance_rate=0.5) for _ in range(2))
    others: list[Any] = [by_number(thresholds()), remoe(l1_start=1.0, l1_factor=2.0)]
    with torch.no_grad():
        for layer in (own, shared):
            layer.gate.weight.copy_(torch.eye(D)[:1] * torch.tensor([[1.0], [-1.0]]))
    own(numbered(1) if rank == 0 else numbered(-1))
    own.balance([own], groups[rank])
    for layer in (shared, *others):
        if rank == 0:
            layer(numbered(1, 2, 3, 4, 5, 6, 7, 8))
        layer.balance([layer])
    torch.save((own.selection_bias, shared.selection_bias), directory / f"apart{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_with_other_layers_balance_apart_and_one_without_a_batch_holds_up_none(tmp_path):
    in_processes(balanced_apart, (tmp_path,), 2, tmp_path / "log")
    (own, shared), (other, also) = (torch.load(tmp_path / f"apart{rank}.pt") for rank in (0, 1))
    assert own.tolist() == [-0.5, 0.5]
    assert other.tolist() == [0.5, -0.5]
    assert shared.tolist() == also.tolist() == [-0.5, 0.5]


def test_the_tokens_of_all_processes_decide_where_to(tmp_path):
    """By those of the first process alone each would go the other way.

    Of 4 choices there the first expert has 3, of all 10 it has 4: its bias goes up. The third largest of 8 numbers is
    -3 there, 9 and 6 in the second process, and the mean is 4: thresholds go a quarter of the way. Three tokens go to
    all 8 experts there, and 10 to none in the second process: 24 choices, where 2 for each of 13 are asked. Averages
    are those of one process that sees all tokens.
    """
    in_processes(balanced, (tmp_path,), 2, tmp_path / "log")
    _, alone = by_sign()
    for numbers in itertools.chain(*SIGNS):
        alone(numbered(*numbers))
    alone.balance([alone])
    for rank in (0, 1):
        bias_E, threshold_E, weight, averages_ED = torch.load(tmp_path / f"process{rank}.pt")
        assert bias_E.tolist() == [0.5, -0.5]
        assert threshold_E.tolist() == [1.0] * E
        assert weight.item() == 0.5
        assert_close(averages_ED, alone.default_output)
