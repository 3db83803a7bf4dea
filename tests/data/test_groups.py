"""Blocks and groups: nothing lost, nothing doubled, no document beside itself."""

import pickle
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixture_of_tokens.data.groups import (
    Blocks,
    GroupedBatches,
    collisions,
    deal,
    grouped_order,
    in_blocks_of,
    prepare_tokens,
)
from mixture_of_tokens.data.tokens import TokenFiles
from texts import groups_with_a_document_twice


def blocks_of(lengths: list[int], context: int) -> Blocks:
    """Token 1000 * d + i is number i of document d, so that a block tells where it comes from."""
    tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)]).astype(np.uint32)
    return Blocks(tokens, np.cumsum(lengths), context, bytes=len(tokens))


def in_segments(lengths: list[int], context: int, group_size: int) -> Blocks:
    tokens = np.zeros(sum(lengths), dtype=np.uint16)
    return Blocks.of(tokens, np.cumsum(lengths), context, group_size, bytes=sum(lengths))


# Tokens


def test_tokens_in_several_files_are_read_as_one_array(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 250).astype(np.uint16)
    paths = [tmp_path / f"{i}.tokens" for i in range(3)]
    for path, part in zip(paths, np.split(tokens, [100, 200]), strict=True):
        part.tofile(path)
    files = pickle.loads(pickle.dumps(TokenFiles(paths, "uint16", 250, shard_tokens=100)))  # as for a spawned worker
    assert len(files) == 250
    index = np.array([[99, 100, 101], [249, 0, 199], [200, 201, 5]])
    assert files[index].dtype == np.uint16
    assert (files[index] == tokens[index]).all()
    ends = np.array([120, 250])
    rows = [Blocks(t, ends, context=7, bytes=250).batch(np.arange(35), padded=True) for t in (files, tokens)]
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[1])


# Blocks


def test_every_token_but_the_first_is_predicted_exactly_once():
    blocks = blocks_of([50, 31, 77, 12], context=8)
    rows = blocks.batch(np.arange(blocks.total), padded=True)
    predicted = rows["shift_labels"][rows["shift_labels"] != -100]
    assert predicted.tolist() == blocks.tokens[np.arange(1, 170)].tolist()
    assert rows["attention_mask"].sum() == len(blocks.tokens)
    empty = blocks.batch(np.array([-1]), padded=True)
    assert empty["attention_mask"].sum() == 0
    assert (empty["shift_labels"] == -100).all()


def test_blocks_know_their_documents():
    blocks = blocks_of([10, 3, 20, 40], context=8)
    first, last = blocks.documents(np.arange(len(blocks)))
    for index in range(len(blocks)):
        row = blocks.batch(np.array([index]))
        touched = torch.cat([row["input_ids"], row["shift_labels"][:, -1:]], dim=1) // 1000
        assert (first[index], last[index]) == (touched.min(), touched.max())


def test_a_split_without_tokens_has_no_blocks_and_no_order():
    empty = Blocks(np.zeros(0, dtype=np.uint16), np.zeros(0, dtype=np.int64), context=8, bytes=0)
    assert (len(empty), empty.total) == (0, 0)
    for everything in (False, True):
        with pytest.raises(ValueError, match="0 blocks of 8 tokens do not fill two groups of 4"):
            grouped_order(empty, 4, everything=everything)


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
        ([1, 2], [2], {"vocab_size": 0}, "vocab-size must be at least 1"),
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


# Groups


@pytest.mark.parametrize("lengths", [[97] * 70, [500] * 16, [3] * 2000, [900, *[100] * 90, 900]])
def test_no_document_meets_itself_in_a_group_and_every_block_stands_once(lengths):
    blocks = blocks_of(lengths, context=8)
    for epoch in range(5):
        order = grouped_order(blocks, 5, seed=3, epoch=epoch)
        assert len(np.unique(order)) == order.size == len(blocks) // 5 * 5
        touched = blocks.batch(order.ravel())["input_ids"].reshape(-1, 5, 8) // 1000
        for group in touched:
            sets = [set(row.tolist()) for row in group]
            assert sum(map(len, sets)) == len(set().union(*sets))
    everything = grouped_order(blocks, 5, everything=True)
    assert sorted(everything[everything >= 0]) == list(range(blocks.total))


def test_collisions_are_seen():
    blocks = blocks_of([40, 40, 40], context=8)
    groups = np.array([[0, 6, 12], [0, 1, 12], [0, -1, -1], [4, 5, 13]])
    group, place = collisions(blocks, groups)
    assert group.tolist() == [1, 3]  # two blocks of document 0; one that reaches into document 1, and one of it
    assert place.tolist() == [0, 0]
    many = np.tile(groups[[0, 2]], (2**18, 1))  # more than are looked at at once
    many[[7, -5]] = groups[1]
    assert collisions(blocks, many)[0].tolist() == [7, len(many) - 5]


def test_a_document_with_more_than_its_share_is_refused():
    with pytest.raises(ValueError, match="could be in a group twice"):
        grouped_order(blocks_of([400, 50, 50], context=8), 4)
    with pytest.raises(ValueError, match="do not fill two groups of 64"):
        grouped_order(blocks_of([97] * 5, context=8), 64)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9])
def test_fewer_blocks_than_a_group_are_evaluated_in_two_groups_of_which_neighbours_are_no_mates(blocks):
    short = in_segments([8 * blocks + 1], context=8, group_size=8)
    order = grouped_order(short, 8, everything=True)
    assert order.shape == (2, 8)
    assert sorted(order[order >= 0]) == list(range(blocks))
    for group in order:
        assert (np.diff(np.sort(group[group >= 0])) > 1).all()


@pytest.mark.parametrize(("group_size", "context"), [(2, 3), (5, 8), (7, 1), (32, 16)])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [3, 1, 1, 1, 4], [0.02] * 10 + [1] + [0.02] * 10])
@pytest.mark.parametrize("groups", [2, 3, 5, 24, 75])
def test_mates_from_one_document_are_far_apart(lengths, groups, group_size, context):
    tokens = groups * group_size * context + 1
    lengths = np.maximum(1, np.array(lengths) * tokens / sum(lengths)).astype(int)
    lengths[0] += max(0, tokens - lengths.sum())
    whole = blocks_of(lengths.tolist(), context)
    blocks = in_segments(lengths.tolist(), context, group_size)
    assert set(whole.ends) <= set(blocks.ends)
    nearest, between = np.inf, np.inf
    for options in ({"epoch": 0}, {"epoch": 1}, {"epoch": 2}, {"everything": True}):
        order = grouped_order(blocks, group_size, seed=1, **options)  # raises at a collision
        number = np.sort(np.where(order < 0, np.arange(-group_size, 0) * 10**6, order), axis=1)
        nearest = min(nearest, np.diff(number, axis=1).min())
        first, last = blocks.documents(np.maximum(number, 0))
        same = whole.documents(np.maximum(number, 0))
        mates = (number[:, :-1] >= 0) & (same[0][:, 1:] == same[1][:, :-1])
        if mates.any():
            between = min(between, (first[:, 1:] - last[:, :-1])[mates].min())
    assert nearest > groups // 2  # blocks; a stripe has `groups`
    assert between > 1 or context == 1  # segments: not the same one, nor adjacent ones


def test_only_documents_that_could_meet_themselves_are_divided():
    # 40 blocks in groups of 5: stripes of 8, so mates are 5 blocks or more apart, and 4 * 8 tokens are between them.
    lengths = [32, 33, 160, 31, 65]
    blocks = in_segments(lengths, context=8, group_size=5)
    ends = blocks.ends
    assert np.diff(ends, prepend=0).tolist() == [32, 11, 11, 11, *[16] * 10, 31, *[13] * 5]
    assert blocks.segments == 18


@pytest.mark.parametrize("context", [1024, 512, 256, 2048])
def test_a_text_in_shorter_blocks_has_no_mates_from_one_document_either(context):
    """Segments that could not meet in long blocks could in short ones."""
    long = in_segments([1865] * 40, context=2048, group_size=32)
    shorter = in_blocks_of(long, context, 32)
    assert not groups_with_a_document_twice(shorter, grouped_order(shorter, 32, everything=True))
    if context < 2048:
        with pytest.raises(ValueError, match="could be in a group twice"):  # the control
            grouped_order(replace(long, context=context), 32, everything=True)
    else:
        assert shorter.ends.tolist() == long.ends.tolist()


def test_the_order_of_blocks_is_in_32_bits_and_the_same_every_time():
    blocks = blocks_of([97] * 40, context=8)
    orders = [deal(blocks, 5, seed=3, epoch=4) for _ in range(2)]
    assert (orders[0] == orders[1]).all()
    assert orders[0].dtype == np.int32
    assert (orders[0] != deal(blocks, 5, seed=3, epoch=5)).any()
    assert (orders[0] != deal(blocks, 5, seed=4, epoch=4)).any()


def test_mates_are_others_in_every_epoch_and_for_every_seed():
    blocks = blocks_of([97] * 400, context=8)

    def pairs(**options):
        order = grouped_order(blocks, 5, **options)
        return {frozenset(pair) for group in order for pair in combinations(group[group >= 0].tolist(), 2)}

    ways = [{"epoch": 0}, {"epoch": 1}, {"seed": 1}, {"everything": True}, {"everything": True, "seed": 1}]
    for one, other in combinations([pairs(**way) for way in ways], 2):
        assert len(one) > 9000
        assert len(one & other) < len(one) / 100  # about a 500th, by chance


def test_rows_depend_on_seed_and_step_alone():
    blocks = blocks_of([97] * 40, context=8)

    def rows(seed, steps=40, batch_size=20):
        batches = GroupedBatches(blocks, group_size=5, batch_size=batch_size, steps=steps, seed=seed)
        return batches.block_numbers(list(range(batch_size * steps)))

    # 40 steps of 20 rows run over several epochs of 480 rows; read backwards they are the same.
    forwards = GroupedBatches(blocks, group_size=5, batch_size=20, steps=40, seed=0)
    backwards = [forwards.block_numbers([row])[0] for row in reversed(range(800))]
    assert backwards[::-1] == rows(0).tolist()
    assert rows(0)[:400].tolist() == rows(0, steps=20).tolist() == rows(0, steps=40, batch_size=10).tolist()
    assert rows(0).tolist() != rows(1).tolist()
    assert rows(0)[:480].tolist() != rows(0, steps=48)[480:960].tolist()  # another order in the next epoch


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 9], [1, 2, 3, 4, 5], [5, 6, 7], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
def test_rows_that_are_no_whole_groups_are_refused(rows):
    batches = GroupedBatches(blocks_of([97] * 40, context=8), group_size=5, batch_size=20, steps=4, seed=0)
    with pytest.raises(ValueError, match="no whole groups of 5 consecutive rows: do not shuffle"):
        batches.__getitems__(rows)


def test_a_model_that_mixes_fewer_rows_or_none_may_have_parts_of_a_group():
    blocks, sizes = blocks_of([97] * 60, context=8), {"group_size": 8, "batch_size": 16, "steps": 4, "seed": 0}
    for mixed in (1, 2, 4):
        parts = GroupedBatches(blocks, mixed=mixed, **sizes)
        found = [parts.__getitems__(list(range(at, at + 4)))["input_ids"] for at in range(0, 64, 4)]
        assert torch.equal(torch.cat(found), GroupedBatches(blocks, **sizes).__getitems__(list(range(64)))["input_ids"])
        if mixed > 1:
            with pytest.raises(ValueError, match=f"no whole groups of {mixed}"):
                parts.__getitems__([1, 2, 3, 4])


def test_a_loader_that_shuffles_rows_or_cuts_groups_is_refused():
    def loaded(**options):
        rows = GroupedBatches(blocks_of([97] * 40, context=8), group_size=5, batch_size=20, steps=4, seed=0)
        return [len(batch["input_ids"]) for batch in DataLoader(rows, collate_fn=dict, **options)]

    assert loaded(batch_size=20) == loaded(batch_sampler=[range(20)] * 4) == [20] * 4
    assert loaded(batch_size=10) == [10] * 8
    for options in ({"batch_size": 20, "shuffle": True}, {"batch_size": 12}):
        with pytest.raises(ValueError, match="no whole groups"):
            loaded(**options)
    rows = GroupedBatches(blocks_of([97] * 40, context=8), group_size=5, batch_size=20, steps=4, seed=0)
    with pytest.raises(KeyError, match="give the DataLoader collate_fn=dict"):
        next(iter(DataLoader(rows, batch_size=20)))


def test_a_step_of_incomplete_groups_is_refused():
    with pytest.raises(ValueError, match="seed must be 0 or more, not -1"):
        GroupedBatches(blocks_of([97] * 40, context=8), group_size=5, batch_size=10, steps=1, seed=-1)
    with pytest.raises(ValueError, match="batch_size 12 must be a multiple of the group size, 5"):
        GroupedBatches(blocks_of([97] * 40, context=8), group_size=5, batch_size=12, steps=4, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 0}, "--group-size must be at least 1, not 0"),
        ({"group_size": -4}, "--group-size must be at least 1, not -4"),
        ({"group_size": 4.0}, "group_size takes a whole number, not 4.0"),
        ({"steps": 2.5}, "steps takes a whole number, not 2.5"),
        ({"seed": None}, "seed takes a whole number, not None"),
        ({"mixed": 0}, "--mixed must be at least 1, not 0"),
        ({"mixed": 2}, "group_size 5 must be a multiple of mixed, 2, or groups would meet"),
        ({"mixed": 10}, "group_size 5 must be a multiple of mixed, 10, or groups would meet"),
    ],
)
def test_sizes_of_batches_are_whole_numbers(given, message):
    blocks = blocks_of([97] * 40, context=8)
    with pytest.raises(ValueError, match=message):
        GroupedBatches(blocks, **{"group_size": 5, "batch_size": 20, "steps": 4, "seed": 0} | given)
