"""Groups: no block lost or doubled, no document beside itself."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixture_of_tokens.data.blocks import Blocks, in_blocks_of
from mixture_of_tokens.data.groups import GroupedBatches, collisions, deal, grouped_order, meetings
from texts import blocks_of, groups_with_a_document_twice, in_segments


def test_a_split_without_tokens_has_no_blocks_and_no_order():
    empty = Blocks(np.zeros(0, dtype=np.uint16), np.zeros(0, dtype=np.int64), context=8, bytes=0)
    assert (len(empty), empty.total) == (0, 0)
    for everything in (False, True):
        with pytest.raises(ValueError, match="0 blocks of 8 tokens do not fill two groups of 4"):
            grouped_order(empty, 4, everything=everything)


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
    # Two blocks of document 0; one that reaches into document 1, and one of it.
    groups = np.array([[0, 6, 12], [0, 1, 12], [0, -1, -1], [4, 5, 13]])
    assert [collisions(blocks, group[None]) for group in groups] == [0, 1, 0, 1]
    assert collisions(blocks, groups[:0]) == 0
    many = np.tile(groups[[0, 2]], (2**18, 1))  # more than are looked at at once
    many[[7, -5]] = groups[1]
    assert collisions(blocks, many) == 2


def test_segments_of_a_document_meet_as_the_document_that_they_are_of():
    whole, divided = blocks_of([160, 40], context=8), in_segments([160, 40], context=8, group_size=3)
    groups = np.array([[0, 6, 12], [0, 1, 22], [0, 12, 23]])
    assert meetings(whole, groups) == (4, 4)
    assert meetings(divided, groups) == (1, 4)


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
        ({"group_size": 0}, "group_size must be at least 1, not 0"),
        ({"group_size": -4}, "group_size must be at least 1, not -4"),
        ({"group_size": 4.0}, "group_size takes a whole number, not 4.0"),
        ({"steps": 2.5}, "steps takes a whole number, not 2.5"),
        ({"seed": None}, "seed takes a whole number, not None"),
        ({"mixed": 0}, "mixed must be at least 1, not 0"),
        ({"mixed": 2}, "group_size 5 must be a multiple of mixed, 2, or groups would meet"),
        ({"mixed": 10}, "group_size 5 must be a multiple of mixed, 10, or groups would meet"),
    ],
)
def test_sizes_of_batches_are_whole_numbers(given, message):
    blocks = blocks_of([97] * 40, context=8)
    with pytest.raises(ValueError, match=message):
        GroupedBatches(blocks, **{"group_size": 5, "batch_size": 20, "steps": 4, "seed": 0} | given)
