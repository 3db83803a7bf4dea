"""The models in transformers' own Trainer, as other models are used: losses, metrics, balancing, adapters."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mixture_of_tokens import MixtureOfTokens, calibrate_companions
from mixture_of_tokens.layers.experts import Experts, Routed
from mixture_of_tokens.layers.grouping import warn_once
from mixture_of_tokens.models import modeling
from mixture_of_tokens.models.balance_callback import BalanceCallback
from mixture_of_tokens.settings.routings import ROUTINGS, TABLE
from routings import tiny

ROWS_A_STEP, LENGTH, VOCABULARY = 6, 9, 97


class Texts(Dataset):
    def __init__(self, rows: int):
        self.ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def trainer(model, folder, label_smoothing_factor: float = 0, **given) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=ROWS_A_STEP,
        per_device_eval_batch_size=ROWS_A_STEP,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        label_smoothing_factor=label_smoothing_factor,
    )
    return Trainer(model, arguments, train_dataset=Texts(24), eval_dataset=Texts(12), **given)


@pytest.mark.parametrize("kind", [row.kind for row in TABLE])
def test_it_trains_and_evaluates_with_a_loss_and_metrics_of_logits(kind, tmp_path):
    def accuracy(predicted) -> dict[str, float]:
        assert predicted.predictions.shape == (12, LENGTH, VOCABULARY)
        hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
        return {"accuracy": float(np.mean(hits))}

    made = trainer(tiny(kind), tmp_path, compute_metrics=accuracy)
    before = made.evaluate()
    assert made.train().training_loss > 0
    after = made.evaluate()
    model, own = made.model.eval(), Texts(12).ids.split(ROWS_A_STEP)
    with torch.no_grad():
        expected = np.mean([float(model(ids, labels=ids).cross_entropy) for ids in own])
    assert after["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert after["eval_loss"] < before["eval_loss"]  # the texts are among those of training
    assert 0 <= after["eval_accuracy"] <= 1


def test_a_prediction_leaves_out_the_cache(tmp_path):
    made = trainer(tiny("mixture_of_tokens"), tmp_path)
    made.args.use_cache = made.model.config.use_cache = True
    assert made.predict(Texts(12)).predictions.shape == (12, LENGTH, VOCABULARY)


# By kind, what `balance` moves.
MOVED = {"sigmoid_choice": "selection_bias", "default_moe": "default_output"}
MOVED |= {"expert_threshold": "threshold", "remoe": "l1_weight"}


@pytest.mark.parametrize(("kind", "buffer"), MOVED.items())
def test_a_callback_balances_what_has_no_loss_for_it(kind, buffer, tmp_path):
    def moved(callbacks) -> bool:
        model = tiny(kind)
        before = getattr(model.model.layers[1].mlp, buffer).clone()
        trainer(model, tmp_path, callbacks=callbacks(model)).train()
        return not getattr(model.model.layers[1].mlp, buffer).equal(before)

    assert moved(lambda model: [BalanceCallback(model)])
    assert not moved(lambda model: [])


@pytest.mark.parametrize("kind", [row.kind for row in TABLE])
def test_a_training_in_which_nothing_balances_the_experts_is_warned_of(kind, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(modeling.logger, "warning_once", warnings.append)
    monkeypatch.setattr(modeling, "MANY_BATCHES", 3)

    def warned(steps: int, balanced: bool, frozen: bool = False) -> bool:
        warnings.clear()
        model, ids = tiny(kind).train(), Texts(ROWS_A_STEP).ids
        for block in model.model.layers if frozen else []:
            block.mlp.requires_grad_(False)
        for _ in range(steps):
            model(ids, labels=ids).loss.backward()
            if balanced:
                model.balance()
        return any("without a call of balance()" in warning for warning in warnings)

    assert warned(3, balanced=False) == (kind in MOVED)
    assert not warned(2, balanced=False)
    assert not warned(5, balanced=True)
    assert not warned(5, balanced=False, frozen=True)


@pytest.mark.parametrize("kind", ["dense", "mixture_of_tokens", "token_choice"])
def test_with_label_smoothing_labels_are_still_those_of_the_next_token(kind, tmp_path):
    made, texts = trainer(tiny(kind), tmp_path, label_smoothing_factor=0.1), Texts(6).ids
    with torch.no_grad():
        found = made.compute_loss(made.model, {"input_ids": texts, "labels": texts})
        logits = made.model(texts).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


class Own(nn.Module):
    """A model of one's own, of one layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.layer = MixtureOfTokens(8, 4, 4, group_size=4)

    def forward(self, input_ids, labels):
        logits = self.head(self.layer(self.embedding(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


@pytest.mark.parametrize("own", [True, False])
def test_an_evaluation_of_batches_that_are_no_whole_groups_is_warned_of(own, tmp_path, caplog):
    model = Own() if own else tiny("mixture_of_tokens", group_size=4)

    def warned(rows: int) -> bool:
        warn_once.cache_clear()
        caplog.clear()
        made = trainer(model, tmp_path)
        made.args.per_device_eval_batch_size = rows
        made.evaluate()
        return f"a batch of {rows} rows is no multiple of the group size, 4" in caplog.text

    assert not warned(4)
    assert not warned(12)
    assert warned(6)
    assert warned(3)  # less than a group
    calibrate_companions(model.layer if own else model, [Own().embedding(Texts(9).ids) if own else Texts(9).ids])
    assert not caplog.text.count("9 rows")  # incomplete groups are left out of the means
    assert not warned(5)


def test_balancing_is_refused_where_copies_of_a_model_count_for_nothing():
    """As in torch.nn.DataParallel, which a Trainer takes for several GPUs of one process."""
    callback = BalanceCallback(tiny("sigmoid_choice"))
    with pytest.raises(ValueError, match="one process with 2 GPUs cannot balance experts: start it with torchrun"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), None, None)
    callback.on_train_begin(SimpleNamespace(n_gpu=1), None, None)


@pytest.mark.parametrize("kind", MOVED)
def test_what_is_frozen_is_not_balanced_as_an_adapter_could_not_save_it(kind, tmp_path):
    model = tiny(kind)
    first, second = (model.model.layers[i].mlp for i in (1, 2))
    first.requires_grad_(False)
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in (first, second)]
    trainer(model, tmp_path, callbacks=[BalanceCallback(model)]).train()
    same = [
        all(torch.equal(buffer, was[name]) for name, buffer in layer.named_buffers())
        for layer, was in zip((first, second), before, strict=True)
    ]
    assert same == [True, False]


class Beside(nn.Module):
    """Experts with something beside them, as peft has for parameters that are no linear layer's."""

    def __init__(self, base: Experts):
        super().__init__()
        self.base = base

    def forward(self, *given, **options):
        return self.base(*given, **options)


def test_adapted_experts_serve_a_text_alone_by_few():
    model, x = tiny("mixture_of_tokens"), Texts(6).ids
    model.serve_alone(num_experts_alone=2)
    with torch.no_grad():
        expected = model(x).logits
        for i in (1, 2):
            layer = model.model.layers[i].mlp
            layer.experts = Beside(layer.experts)
        model.serve_alone(num_experts_alone=2)
        assert torch.equal(model(x).logits, expected)


class Quantized(torch.Tensor):
    """A weight of which only products are known, as torchao has."""

    __tensor_flatten__ = __tensor_unflatten__ = None  # by which torch knows one that wraps others

    @classmethod
    def __torch_function__(cls, function, types, given=(), options=None):
        if function is torch.zeros_like:
            raise NotImplementedError
        return super().__torch_function__(function, types, given, options or {})


def test_a_head_that_is_quantized_has_a_loss():
    model, x = tiny("mixture_of_tokens"), Texts(6).ids
    expected = model(x, labels=x).loss
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantized), requires_grad=False)
    assert isinstance(model.lm_head.weight, Quantized)
    torch.testing.assert_close(model(x, labels=x).loss.as_subclass(torch.Tensor), expected)


class Adapted(nn.Module):
    """A head with an adapter beside it, as peft has."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_of_the_head_is_in_the_loss():
    model, x = tiny("mixture_of_tokens").train(), Texts(6).ids
    model.lm_head = Adapted(model.lm_head)
    result = model(x, labels=x, return_logits=True)
    plain = nn.functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(result.loss, plain)
    result.loss.backward()
    assert model.lm_head.up.weight.grad.abs().max() > 0


OF_MIXTURES = {"companion", "companion_logit"}
MEASURED = {"mixture_of_tokens": OF_MIXTURES, "uniform": OF_MIXTURES} | {kind: {name} for kind, name in MOVED.items()}


@pytest.mark.parametrize("kind", [row.kind for row in TABLE])
def test_what_is_measured_stays_in_fp32_in_a_model_that_is_made_in_bf16(kind):
    made = AutoModelForCausalLM.from_config(tiny(kind, router_temperature=0.1).config, dtype=torch.bfloat16)
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16}
    kept = dict(made.model.layers[1].mlp.named_buffers())
    assert kept.keys() >= MEASURED.get(kind, set())
    if ROUTINGS[kind].routed:
        assert made.model.layers[1].mlp.gate.temperature == 0.1
    assert {buffer.dtype for buffer in kept.values()} <= {torch.float32}
    x = Texts(6).ids
    made.train()(x, labels=x).loss.backward()
    made.balance()


@pytest.mark.parametrize("kind", ["sigmoid_choice", "default_moe"])
def test_what_a_micro_batch_counted_outlives_a_graph_that_writes_the_next_over_it(kind):
    model = tiny(kind).train()
    model(Texts(ROWS_A_STEP).ids)
    layers = [module for module in model.modules() if isinstance(module, Routed)]
    given = [layer.noted for layer in layers]
    kept = [noted.clone() for noted in given]
    BalanceCallback(model).on_substep_end(None, None, None)
    for noted in given:
        noted.zero_()
    assert layers
    assert all(torch.equal(layer.noted, noted) for layer, noted in zip(layers, kept, strict=True))
    assert all(noted.any() for noted in kept)
