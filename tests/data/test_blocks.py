"""Blocks: nothing lost, nothing doubled, and which documents are divided."""

import pickle

import numpy as np
import torch

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.tokens import TokenFile
from texts import blocks_of, in_segments


def test_a_file_of_tokens_is_read_like_an_array(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 250).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens")
    file = pickle.loads(pickle.dumps(TokenFile(tmp_path / "tokens", "uint16", 250)))  # as for a spawned worker
    assert len(file) == 250
    index = np.array([[99, 100, 101], [249, 0, 199], [200, 201, 5]])
    assert type(file[index]) is np.ndarray
    assert file[index].dtype == np.uint16
    assert (file[index] == tokens[index]).all()
    ends = np.array([120, 250])
    rows = [Blocks(t, ends, context=7, bytes=250).batch(np.arange(35), padded=True) for t in (file, tokens)]
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[1])


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


def test_only_documents_that_could_meet_themselves_are_divided():
    # 40 blocks in groups of 5: stripes of 8, so mates are 5 blocks or more apart, and 4 * 8 tokens are between them.
    lengths = [32, 33, 160, 31, 65]
    blocks = in_segments(lengths, context=8, group_size=5)
    ends = blocks.ends
    assert np.diff(ends, prepend=0).tolist() == [32, 11, 11, 11, *[16] * 10, 31, *[13] * 5]
    assert blocks.segments == 18
