"""Tokens of one's own are grouped as prepared ones are, whatever holds them, or refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.data.own_tokens import prepare_tokens
from texts import blocks_of, in_segments


def test_tokens_of_ones_own_are_grouped_as_prepared_ones_are(tmp_path):
    lengths = [50, 4000, 31, 77, 900]
    own = blocks_of(lengths, context=8)
    own.tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=own.tokens.dtype, mode="r")
    text = prepare_tokens(mapped, np.cumsum(lengths).tolist(), context=8, group_size=4)
    assert text.ends.tolist() == in_segments(lengths, 8, 4).ends.tolist() != own.ends.tolist()
    with pytest.raises(ValueError, match="a document has more than 1 / 8 of the"):
        GroupedBatches(own, group_size=4, batch_size=8, steps=3, seed=0)
    rows = GroupedBatches(text, group_size=4, batch_size=8, steps=3, seed=0)
    for batch in DataLoader(rows, batch_size=8, collate_fn=dict):
        assert set(batch["input_ids"].ravel().tolist()) <= set(own.tokens.tolist())
        assert (batch["input_ids"][:, 1:] == batch["shift_labels"][:, :-1]).all()


FLAT, LENGTHS = [*range(1, 30), *range(40, 90), 0], [9, 30, 41]
DOCUMENTS = [FLAT[:9], FLAT[9:39], FLAT[39:]]
GIVEN = {
    "lists": DOCUMENTS,
    "a tuple of arrays": tuple(np.array(each, dtype=np.uint16) for each in DOCUMENTS),
    "tensors": [torch.tensor(each, requires_grad=False) for each in DOCUMENTS],
    "arrays of signed and unsigned numbers": [
        np.array(each, dtype=d) for each, d in zip(DOCUMENTS, "iQb", strict=True)
    ],
    "an iterator": iter(DOCUMENTS),
    "an array of objects": np.array(DOCUMENTS, dtype=object),
    "with an empty one": [[], *DOCUMENTS[:1], np.zeros(0), *DOCUMENTS[1:]],
}


@pytest.mark.parametrize("kind", [*GIVEN, "a tensor and ends", "a list and ends", "parts and ends"])
def test_documents_are_tokens_in_whatever_holds_them(kind):
    ends = np.cumsum(LENGTHS)
    if kind in GIVEN:
        text = prepare_tokens(GIVEN[kind], context=2, group_size=2, vocab_size=90)
    elif kind == "a tensor and ends":
        text = prepare_tokens(torch.tensor(FLAT), torch.from_numpy(ends), context=2, group_size=2)
    else:  # arrays that hold all tokens are no documents where it is said where these end
        parts = FLAT if kind == "a list and ends" else [FLAT[:20], FLAT[20:]]
        text = prepare_tokens(parts, ends.tolist(), context=2, group_size=2)
    expected = in_segments(LENGTHS, 2, 2)
    assert np.asarray(text.tokens).tolist() == FLAT
    assert np.issubdtype(np.asarray(text.tokens).dtype, np.integer)
    assert text.ends.tolist() == expected.ends.tolist()


@pytest.mark.parametrize(("documents", "told"), [(33, True), (100, False)])
def test_a_document_that_counts_as_several_is_told_as_with_text(documents, told, capsys):
    given = np.tile(np.arange(200), documents)
    ends = np.arange(1, documents + 1) * 200
    text = prepare_tokens(given, ends, context=8)
    said = capsys.readouterr().err
    assert ("groups of 32" in said and f"{len(text.ends)} segments" in said) == told
    assert (said == "") != told


@pytest.mark.parametrize(
    ("tokens", "ends", "options", "message"),
    [
        ([1, 2, 3], None, {}, "ends is missing"),
        (torch.arange(6), None, {}, "ends is missing"),
        ([1, 2.5], [2], {}, "tokens must be a one-dimensional array of integers"),
        ([1, [2]], [2], {}, "tokens must be a one-dimensional array of integers"),
        (torch.zeros(6, dtype=torch.bfloat16), [6], {}, "tokens must be a one-dimensional array of integers"),
        ([[1, 2], [[3]]], None, {}, "tokens: document 1 must be a one-dimensional array of integers"),
        ([[1, 2], "ab"], None, {}, "tokens: document 1 must be a one-dimensional array of integers"),
        ([[1, 2], 3], None, {}, "tokens: document 1 must be a one-dimensional array of integers"),
        ([[], []], None, {}, "tokens holds no document"),
        ("ab", None, {}, "tokens takes documents of token ids, or one array of them, not str"),
        ({"input_ids": [1]}, None, {}, "tokens takes documents .* not dict"),
        (5, [1], {}, "tokens takes documents .* not int"),
        ([[1, 2], [-1]], None, {}, "tokens has the id -1; ids are 0 to"),
        (np.array([1, -7]), [2], {}, "tokens has the id -7; ids are 0 to"),
        (np.array([1, 2**40]), [2], {}, "tokens has the id 1099511627776; ids are 0 to"),
        (np.array([1, 8], dtype=np.uint16), [2], {"vocab_size": 8}, "tokens has the id 8; ids are 0 to 7"),
        ([1, 2], [2], {"vocab_size": 0}, "vocab_size must be at least 1"),
        ([1, 2], [2], {"vocab_size": "8"}, "vocab_size takes a whole number"),
        (np.zeros((3, 2), dtype=int), [6], {}, "tokens must be a one-dimensional array of integers"),
        (np.zeros(6), [6], {}, "tokens must be a one-dimensional array of integers"),
        (np.zeros(6, dtype=int), [2.0, 6.0], {}, "ends must be a one-dimensional array of integers"),
        (
            np.zeros(6, dtype=int),
            [4, 2],
            {},
            "where each document ends. These look like lengths: give np.cumsum of them",
        ),
        (np.zeros(6, dtype=int), [2, 5], {}, "ends must rise to the number of tokens, 6"),
        (np.zeros(6, dtype=int), [4, 4, 6], {}, "ends must rise to the number of tokens, 6"),
        (np.zeros(6, dtype=int), [4, 2, 6], {}, "ends must rise to the number of tokens, 6"),
        (np.zeros(0, dtype=int), np.zeros(0, dtype=int), {}, "ends must rise to the number of tokens, 0"),
        (np.zeros(6, dtype=int), [6], {"context": 0}, "context must be at least 1"),
        (np.zeros(6, dtype=int), [6], {"group_size": "4"}, "group_size takes a whole number"),
    ],
)
def test_tokens_that_cannot_be_grouped_are_refused(tokens, ends, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_tokens(tokens, ends, **options)
