"""A loop, a Trainer and tokens of one's own: few lines, the loss of every token, and groups of different documents."""

import gc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from mixture_of_tokens import (
    GroupedBatches,
    GroupedTrainer,
    MixtureOfTokens,
    calibrate_companions,
    count_collisions,
    prepare_tokens,
    score_tokens,
    split_tokens,
)
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.layers.experts import Router
from processes import in_processes
from routings import tiny

GROUP, VOCABULARY = 4, 97


def documents(count: int = 60, seed: int = 0) -> list[np.ndarray]:
    """The first id tells a document, in base 97; then numbers rise by one, so that they can be learned."""
    rng = np.random.default_rng(seed)
    return [np.arange(start, start + rng.integers(20, 60)) % VOCABULARY for start in range(count)]


def rows_of(steps: int = 5, batch_size: int = 8, **given) -> GroupedBatches:
    text = prepare_tokens(documents(), context=9, group_size=GROUP)
    return GroupedBatches(text, group_size=GROUP, batch_size=batch_size, steps=steps, seed=0, **given)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def how(folder, **given) -> TrainingArguments:
    return TrainingArguments(
        str(folder), report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **given
    )


class Own(nn.Module):
    """A model of one's own, which knows nothing of `shift_labels`."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.layer = MixtureOfTokens(8, 4, 4, group_size=GROUP)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.layer(self.embedding(input_ids)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def rows_seen_by(model: nn.Module) -> list[torch.Tensor]:
    """Those of every batch, from here on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    return seen


def test_rows_are_read_one_by_one_and_step_by_step():
    rows = rows_of()
    batches = list(rows)
    assert [batch["input_ids"].shape for batch in batches] == [(8, 9)] * 5
    assert batches[1].keys() == rows[0].keys() == {"input_ids", "labels", "shift_labels"}
    for name, tensor in rows[11].items():
        assert torch.equal(tensor, batches[1][name][3])
    assert torch.equal(rows[-1]["input_ids"], batches[-1]["input_ids"][-1])
    for row in (40, -41):
        with pytest.raises(IndexError, match="there are 40 rows"):
            rows[row]


def test_labels_are_as_everybodys_and_the_next_token_stands_beside_them():
    batch = next(iter(rows_of()))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert torch.equal(batch["shift_labels"][:, :-1], batch["input_ids"][:, 1:])
    batch["labels"][:, 0] = -100
    assert (batch["input_ids"] >= 0).all()  # their own memory


@pytest.mark.parametrize("model", [llama, lambda: tiny("mixture_of_tokens", group_size=GROUP)])
def test_a_model_of_transformers_predicts_every_token_of_a_row(model):
    model, batch = model().eval(), next(iter(rows_of()))
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        torch.testing.assert_close(model(**batch).loss, expected)
        of_labels = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    shorter = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(of_labels, shorter)
    assert abs(float(expected - shorter)) > 1e-6


def test_a_loop_of_few_lines():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = score_tokens(model, rows_of().blocks, group_size=GROUP)
    for batch in rows_of(steps=20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score_tokens(model, rows_of().blocks, group_size=GROUP) < before - 0.3


def test_a_trainer_trains_on_the_steps_of_the_rows_in_their_order(tmp_path):
    rows, model = rows_of(steps=3), llama()
    seen = rows_seen_by(model)
    trainer = GroupedTrainer(model, how(tmp_path, optim="sgd", learning_rate=0.1), train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(torch.equal(ids, batch["input_ids"]) for ids, batch in zip(seen, rows, strict=True))
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_accumulation_divides_the_batch_and_changes_no_loss(tmp_path):
    def losses(**given) -> list[float]:
        arguments = how(tmp_path, logging_steps=1, learning_rate=1e-2, **given)
        trainer = GroupedTrainer(llama(), arguments, train_dataset=rows_of(steps=3, batch_size=16))
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert losses(gradient_accumulation_steps=2) == pytest.approx(losses(), abs=2e-4)  # logged with four digits
    assert len(losses(max_steps=2)) == 2
    for given, message in {
        "gradient_accumulation_steps=8": "a batch of 16 rows is not divided into groups of 4 by 1 devices and 8 micro",
        "per_device_train_batch_size=4": "per_device_train_batch_size 4: for batches of 16 it is 16",
        "max_steps=4": "max_steps 4 is more than the 3 steps of the rows",
    }.items():
        name, value = given.split("=")
        with pytest.raises(ValueError, match=message):
            losses(**{name: int(value)})


def test_a_trainer_evaluates_rows_and_leaves_the_arguments_as_they_were(tmp_path):
    model, arguments, held_out = llama(), how(tmp_path), rows_of(steps=2, batch_size=12)
    trainer = GroupedTrainer(model, arguments, train_dataset=rows_of(), eval_dataset=held_out)
    with torch.no_grad():
        expected = np.mean([float(model(**batch).loss) for batch in held_out])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert (arguments.max_steps, arguments.per_device_eval_batch_size, arguments.remove_unused_columns) == (-1, 8, True)


KINDS = {"llama": llama, "own": Own} | {
    kind: partial(tiny, kind, group_size=GROUP) for kind in ("mixture_of_tokens", "token_choice", "sigmoid_choice")
}


def train(kind: str, folder: Path) -> None:
    """For three steps, and evaluate; saves what this process saw and made."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    seen = rows_seen_by(model)
    arguments = how(folder, optim="sgd", learning_rate=0.1, logging_steps=1)
    arguments.gradient_accumulation_steps = 4 // arguments.world_size
    rows, held_out = rows_of(steps=3, batch_size=16), rows_of(steps=3, batch_size=8)
    trainer = GroupedTrainer(model, arguments, train_dataset=rows, eval_dataset=held_out)
    trainer.train()
    made = {"rows": list(seen), "weights": model.state_dict(), "held out": trainer.evaluate()["eval_loss"]}
    made["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    torch.save(made, folder / f"{kind}-{arguments.process_index}-of-{arguments.world_size}.pt")


def train_all(folder: Path) -> None:
    """In every process."""
    for kind in KINDS:
        train(kind, folder)
    if torch.distributed.is_initialized():
        gc.collect()  # a DDP that is still there would wait for ever, now and then
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_groups_of_a_step_and_train_as_one_does(tmp_path):
    for count in (1, 2):
        in_processes(train_all, (tmp_path,), count, tmp_path / "log")
    for kind in KINDS:
        one, *two = (torch.load(tmp_path / f"{kind}-{who}.pt") for who in ("0-of-1", "0-of-2", "1-of-2"))
        together = [ids for both in zip(two[0]["rows"], two[1]["rows"], strict=True) for ids in both]
        torch.testing.assert_close(together, one["rows"])
        torch.testing.assert_close(torch.cat(together), torch.cat([b["input_ids"] for b in rows_of(3, 16)]))
        for each in two:
            torch.testing.assert_close(each["weights"], one["weights"])
            assert each["losses"] == pytest.approx(one["losses"], abs=2e-4)  # logged with four digits
            assert each["held out"] == pytest.approx(one["held out"], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "buffer"),
    [
        ("sigmoid_choice", "selection_bias"),
        ("default_moe", "default_output"),
        ("expert_threshold", "threshold"),
        ("remoe", "l1_weight"),
    ],
)
def test_a_trainer_balances_a_model_of_this_library(kind, buffer, tmp_path):
    model = tiny(kind, group_size=GROUP)
    before = getattr(model.model.layers[1].mlp, buffer).clone()
    GroupedTrainer(model, how(tmp_path), train_dataset=rows_of(steps=2)).train()
    assert not getattr(model.model.layers[1].mlp, buffer).equal(before)


def test_a_trainer_forgets_companions_of_other_weights_and_decays_no_temperature(tmp_path):
    model = tiny("mixture_of_tokens", group_size=GROUP, learnable_temperature=True)
    calibrate_companions(model, rows_of(steps=1))
    mixture = model.model.layers[1].mlp
    assert mixture.companion.any()
    trainer = GroupedTrainer(model, how(tmp_path, weight_decay=0.1), train_dataset=rows_of(steps=1))
    trainer.train()
    assert not mixture.companion.any()
    decayed = trainer.get_decay_parameter_names(model)
    assert decayed
    assert not [name for name in decayed if "temperature" in name]


def test_a_model_gets_what_its_forward_takes(tmp_path):
    torch.manual_seed(0)
    model = Own()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    GroupedTrainer(model, how(tmp_path), train_dataset=rows_of(steps=2), eval_dataset=rows_of(steps=1)).train()
    assert any(not torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))


def test_a_trainer_refuses_other_data(tmp_path):
    with pytest.raises(ValueError, match="train_dataset takes a GroupedBatches, not a list"):
        GroupedTrainer(llama(), how(tmp_path), train_dataset=[{"input_ids": [1]}])  # pyright: ignore
    with pytest.raises(ValueError, match="args takes a TrainingArguments, not a str"):
        GroupedTrainer(llama(), "my-run", train_dataset=rows_of())  # pyright: ignore
    with pytest.raises(ValueError, match="data_collator: rows of GroupedBatches come as whole batches"):
        GroupedTrainer(llama(), how(tmp_path), dict, rows_of())


def test_rows_that_are_shuffled_are_refused_by_the_name_of_what_does_not():
    with pytest.raises(ValueError, match=r"do not shuffle them, .* as GroupedTrainer does"):
        rows_of().__getitems__([3, 2, 1, 0])


@pytest.mark.parametrize(
    "kind", [list, iter, lambda given: [torch.tensor(each) for each in given], lambda given: given]
)
def test_split_documents_are_whole_and_on_one_side(kind):
    given = [*documents(), documents()[7], documents()[7]]
    trained, held_out = split_tokens(kind(given), share=0.2, context=9, group_size=2)
    whole = {tuple(document) for document in documents()}
    found = [_documents(part, len(given)) for part in (trained, held_out)]
    assert len(found[0]) + len(found[1]) == len(given)
    assert not set(found[0]) & set(found[1])
    assert set(found[0]) | set(found[1]) == whole
    share = len(held_out.tokens) / (len(held_out.tokens) + len(trained.tokens))
    assert 0.2 <= share < 0.3
    again = split_tokens(np.concatenate(given), np.cumsum([len(d) for d in given]), share=0.2, context=9, group_size=2)
    assert all(list(a.tokens) == list(b.tokens) for a, b in zip(again, (trained, held_out), strict=True))


def _documents(part, most: int) -> list[tuple[int, ...]]:
    """Numbers rise by one in a document, and two are never neighbours that do so too."""
    assert len(part.ends) <= most
    return [tuple(each.tolist()) for each in np.split(part.tokens, part.ends[:-1])]


def test_what_cannot_be_split_is_refused():
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            split_tokens(documents(), share=share)
    with pytest.raises(ValueError, match="no two different documents"):
        split_tokens([[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="ends is missing"):
        split_tokens(np.arange(100))
    with pytest.raises(ValueError, match="tokens has the id 96; ids are 0 to 89"):
        split_tokens(documents(), vocab_size=90, group_size=2)
    for sizes in ({"context": 2**80}, {"context": 10**400}, {"group_size": 2**80}):
        with pytest.raises(ValueError, match=f"^{next(iter(sizes))} "):
            prepare_tokens(documents(), **sizes)


@pytest.mark.parametrize("own", [True, False])
def test_tokens_are_scored_in_groups_and_alone(own):
    torch.manual_seed(0)
    model = Own() if own else tiny("mixture_of_tokens", group_size=GROUP)
    text = prepare_tokens(documents(), context=9, group_size=GROUP)
    calibrate_companions(model, [batch["input_ids"] for batch in rows_of()])
    layer = model.layer if own else model
    with torch.no_grad():
        for router in (each for each in model.modules() if isinstance(each, Router)):
            nn.init.normal_(router.weight, std=3.0)

    def by_hand(order, mixed: int) -> float:
        losses = []
        for group in np.asarray(order).reshape(-1, mixed):
            batch = text.batch(group)
            with torch.no_grad():
                result = model.eval()(batch["input_ids"])
            logits = result if own else result.logits
            losses.append(float(F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())))
        return float(np.mean(losses))

    order = grouped_order(text, GROUP)
    model.train()
    together = score_tokens(model, text, group_size=GROUP)
    assert model.training
    assert together == pytest.approx(by_hand(order, GROUP), abs=1e-6)
    assert score_tokens(model, text, group_size=GROUP, groups=3) == pytest.approx(by_hand(order[:3], GROUP), abs=1e-6)
    layer.serve_alone()
    alone = score_tokens(model, text, group_size=GROUP)
    assert alone == pytest.approx(by_hand(order, 1), abs=1e-6)
    assert abs(alone - together) > 1e-4
    for given in ({"groups": 0}, {"group_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            score_tokens(model, text, **{"group_size": GROUP} | given)


def test_a_model_of_another_library_is_scored_too():
    text, model = prepare_tokens(documents(), context=9, group_size=GROUP), llama()
    with torch.no_grad():
        every = [float(model(**batch).loss) for batch in GroupedBatches(
            text, group_size=GROUP, batch_size=GROUP, steps=len(text) // GROUP, seed=0
        )]  # fmt: skip
    assert score_tokens(model, text, group_size=GROUP) == pytest.approx(np.mean(every), abs=1e-5)


def test_collisions_of_own_batches_are_counted():
    text = prepare_tokens([[d] * 36 for d in range(40)], context=9, group_size=GROUP)  # four blocks each
    assert count_collisions(text, group_size=GROUP) == 0
    in_a_row = torch.arange(len(text))
    assert count_collisions(text, group_size=GROUP, rows=in_a_row) > 0.7 * len(text)
    assert count_collisions(text, group_size=GROUP, rows=range(0, len(text), 8)) == 0
    assert count_collisions(text, group_size=GROUP, rows=[0, 1, 2]) == 0  # less than a group
    with pytest.raises(ValueError, match="rows has 0 to 1000; blocks are 0 to"):
        count_collisions(text, group_size=GROUP, rows=[0, 1000])


def test_segments_of_a_document_are_counted_as_the_one_that_they_are(capsys):
    lengths = [400, 30, 30, 30]
    text = prepare_tokens([np.full(n, d) for d, n in enumerate(lengths)], context=9, group_size=GROUP)
    assert text.segments > 10
    told = capsys.readouterr().err
    assert f"{text.segments} segments" in told
    groups = next(iter(GroupedBatches(text, group_size=GROUP, batch_size=len(text) // GROUP * GROUP, steps=1, seed=0)))
    of_the_long_one = (groups["input_ids"] == 0).any(1).view(-1, GROUP).sum(1)
    assert count_collisions(text, group_size=GROUP) >= int((of_the_long_one - 1).clamp(min=0).sum()) > 20
