"""Documents of a row that do not see each other: positions that begin anew, and attention that stays within them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import routings
from mixture_of_tokens import GroupedBatches, Options, audit, evaluate, prepare_text, prepare_tokens, train, transition
from mixture_of_tokens.conversion.to_hf import to_plain
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.evaluation.leaks import between_documents
from mixture_of_tokens.evaluation.losses import cross_entropy, evaluate_blocks
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.settings.routings import TABLE
from mixture_of_tokens.training.merging import merge
from processes import mot

ENDS = np.array([3, 10, 11, 25])
TEXT = Blocks(np.arange(25) % 7 + 1, ENDS, 6, separate=True)


def by_hand(row: int) -> list[int]:
    """Positions of a row, token by token; tokens beyond the end are one more document."""
    found, place = [], 0
    for token in range(6 * row, 6 * row + 6):
        place = 0 if token in (*ENDS, 6 * row) else place + 1
        found.append(place)
    return found


def test_positions_begin_anew_at_each_document_and_each_row():
    batch = TEXT.batch(np.arange(4))
    assert batch["position_ids"].tolist() == [by_hand(row) for row in range(4)]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.keys() - {"position_ids"} == replace(TEXT, separate=False).batch(np.arange(4)).keys()


def test_padding_is_a_document_of_its_own():
    blocks = replace(TEXT, context=9)
    batch = blocks.batch(np.array([2, -1]), padded=True)
    assert batch["token_mask"].tolist() == [[True] * 7 + [False] * 2, [False] * 9]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1], list(range(9))]
    assert "attention_mask" not in batch
    plain = replace(blocks, separate=False).batch(np.array([2, -1]), padded=True)
    assert torch.equal(batch["shift_labels"], plain["shift_labels"])


def test_rows_have_positions_only_where_they_are_asked_for():
    documents = [np.arange(40) % 50 for _ in range(8)]
    for asked in (False, True):
        text = prepare_tokens(documents, context=12, group_size=2, separate_documents=asked)
        rows = GroupedBatches(text, group_size=2, batch_size=4, steps=1, seed=0).__getitems__([0, 1, 2, 3])
        assert ("position_ids" in rows) == asked


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("row", [row for row in TABLE if row.causal], ids=lambda row: row.kind)
def test_a_document_gives_what_it_gives_at_the_beginning_of_a_row(row, attention):
    """All rows of a group in step, so that each token meets the same ones."""
    model = routings.tiny(row.kind).eval()
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    rows = torch.randint(97, (2 * model.config.group_size, 12))
    places = torch.cat([torch.arange(5), torch.arange(7)]).expand_as(rows)
    with torch.no_grad():
        packed = model(rows, position_ids=places, use_cache=False).logits[:, 5:]
        alone = model(rows[:, 5:], use_cache=False).logits
        together = model(rows, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(packed, alone)
    assert (together - alone).abs().max() > 100 * (packed - alone).abs().max()


def test_positions_alone_would_leak():
    """Beside an attention mask transformers does not read documents off positions."""
    model = routings.tiny("mixture_of_tokens").eval()
    rows = torch.randint(97, (2, 2 * model.config.group_size, 12))
    places = torch.cat([torch.arange(6), torch.arange(6)]).expand_as(rows[0])
    changed = torch.cat([rows[1][:, :6], rows[0][:, 6:]], dim=1)

    def moved(**how) -> float:
        with torch.no_grad():
            first, second = (model(ids, position_ids=places, **how).logits[:, 6:] for ids in (rows[0], changed))
        return float((first - second).abs().max())

    assert moved(use_cache=False) == 0
    assert moved(use_cache=False, attention_mask=torch.ones_like(rows[0])) > 0
    assert between_documents(model, [(rows[0], rows[1])])[0] == 0
    assert between_documents(model, [(rows[0], rows[1])])[1] > 0


@pytest.fixture(scope="module")
def options(small_corpus) -> Options:
    how = {"steps": 6, "batch_size": 32, "data": [str(small_corpus)], "device": "cpu"}
    return Options(**how, separate_documents=True, model={"max_position_embeddings": 160})


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    return train("MoT-Nano/4E/2", out=tmp_path_factory.mktemp("runs") / "apart", options=options)


def test_a_run_trains_evaluates_and_is_audited_with_its_documents_apart(run, options):
    text = run.config.prepare()
    assert text.train.separate
    assert text.validation.separate
    rows = text.train.batch(np.arange(len(text.train)))
    assert ((rows["position_ids"][:, 1:] == 0).sum() > 10) & (rows["position_ids"][:, 0] == 0).all()
    with_them = evaluate(run.directory, regroupings=1).lines[0].loss
    assert with_them == pytest.approx(run.facts.final_loss, rel=1e-5)
    assert evaluate(run.directory, regroupings=1, separate_documents=False).lines[0].loss != with_them
    together = train("MoT-Nano/4E/2", options=replace(options, separate_documents=False), dry_run=True)
    assert [key for key in together.identity() if together.identity()[key] != run.config.identity()[key]] == [
        "separate_documents"
    ]
    found = audit(run.directory, batches=1, length=20)
    assert found.separate
    assert found.causal
    assert not found.private
    assert "the document before, in all rows" in str(found)
    assert str(found).endswith("causal: yes; private: no; separate: yes")


def test_an_audit_asks_other_models_where_that_is_expected(tiny_runs, tiny_cache, capsys):
    place = tiny_runs["Transformer-Nano"]
    plain = audit(place, batches=1, length=12)
    assert plain.documents is None
    assert not plain.separate
    mot("audit", place, "--expect", "separate", "--batches", 1, "--length", 12, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["separate"] is True
    assert found["documents"] <= found["allowed"] < found["documents_together"]


def test_an_audit_finds_attention_that_ignores_documents(tiny_runs, tiny_cache, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    found = audit(tiny_runs["Transformer-Nano"], batches=1, length=12, expect="separate")
    assert not found.separate
    assert found.failure == f"{tiny_runs['Transformer-Nano']} is not separate"


def test_plain_models_score_documents_apart_where_asked(run, options):
    """As the same weights in this library."""
    text = replace(run.config.prepare().validation, separate=True)
    dense = routings.tiny("dense", vocab_size=run.facts.vocab_size).eval()
    plain = to_plain(dense).eval()
    how = {"group_size": 4, "batch_size": 8}
    ours, theirs = evaluate_blocks(dense, text, **how), evaluate_blocks(plain, text, **how)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert evaluate_blocks(plain, replace(text, separate=False), **how)["loss"] != theirs["loss"]
    nats, count = cross_entropy(plain, text.batch(np.array([0, -1]), padded=True))
    assert count == text.context
    assert nats > 0


def test_a_transition_goes_on_with_documents_apart(run, tmp_path):
    planned = transition(run.directory, out=tmp_path / "after", dry_run=True)
    assert isinstance(planned, RunConfig)
    assert planned.separate_documents


def test_attention_that_does_not_tell_documents_apart_is_refused(options):
    asked = replace(options, model={"attn_implementation": "flash_attention_2"})
    with pytest.raises(
        ValueError, match=r"^--model.attn_implementation flash_attention_2 takes the documents of a row"
    ):
        merge("MoT-Nano/4E", 0, None, asked)


def test_a_run_without_the_field_has_its_documents_together(run, tmp_path, capsys):
    written = (run.directory / "config.yaml").read_text()
    assert "separate_documents: true" in written
    (tmp_path / "config.yaml").write_text(written.replace("separate_documents: true\n", ""))
    assert not RunConfig.read(tmp_path / "config.yaml").separate_documents
    for words in (("train",), ("train", "Transformer-Nano")):
        mot(*words, "--config", run.directory / "config.yaml", "--dry-run", "--json")
        assert json.loads(capsys.readouterr().out)["separate_documents"] is True


def test_prepare_text_gives_documents_apart(small_corpus):
    assert prepare_text([str(small_corpus)], separate_documents=True).tuning.separate
    assert not prepare_text([str(small_corpus)]).tuning.separate
