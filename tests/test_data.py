"""Corpus, tokens and groups: nothing lost, nothing doubled, no document beside itself."""

import numpy as np
import pytest
import torch

from mixture_of_tokens.corpus import Document, build
from mixture_of_tokens.data import Blocks, GroupedBatches, collisions, grouped_order, prepare
from mixture_of_tokens.tokenizer import train_tokenizer


def sentences(seed: int, lines: int) -> str:
    words = np.random.default_rng(seed).integers(0, 26**3, size=(lines, 6))
    return "\n".join(" ".join(chr(97 + w % 26) * 2 + chr(97 + w // 26 % 26) for w in line) for line in words)


def documents(count: int = 60, lines: int = 40) -> list[Document]:
    return [Document(f"d{i}", sentences(i, lines + i % 7)) for i in range(count)]


def blocks_of(lengths: list[int], context: int) -> Blocks:
    """Token 1000 * d + i is number i of document d, so that a block tells where it comes from."""
    tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)]).astype(np.uint32)
    return Blocks(tokens, np.cumsum(lengths), context, bytes=len(tokens))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Corpus


def test_exact_and_near_duplicates_are_dropped():
    originals = documents()
    near = Document("near", originals[3].text + "\none more line that no other document has")
    corpus = build(iter([*originals, Document("copy", originals[5].text), near, Document("empty", "\n")]))
    assert corpus.duplicates == 2
    assert {d.name for d in [*corpus.train, *corpus.validation]} == {d.name for d in originals}


def test_no_document_keeps_more_than_its_share():
    long = Document("long", sentences(99, 2000))
    corpus = build(iter([*documents(1000, lines=10), long]), largest_share=1 / 80)
    for split in (corpus.train, corpus.validation):
        total = sum(len(d.text) for d in split)
        assert max(len(d.text) for d in split) <= total / 80 + 1
    assert corpus.cut >= 1


def test_a_corpus_does_not_depend_on_the_order_of_its_documents():
    assert build(iter(documents())).hash == build(reversed(documents())).hash
    assert build(iter(documents())).hash != build(iter(documents(59))).hash


def test_splits_share_no_document():
    corpus = build(iter(documents()))
    assert len(corpus.validation) == 6
    assert not {d.name for d in corpus.train} & {d.name for d in corpus.validation}


def test_a_corpus_of_one_document_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        build(iter([Document("a", sentences(1, 50))] * 3))


# Tokenizer


def test_tokenizer_gives_any_bytes_back():
    tokenizer = train_tokenizer([sentences(0, 50)], 300)
    text = "naïve  \t<|x|> 漢字\r\n\x00 end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["text"], 200)


# Blocks


def test_every_token_but_the_first_is_predicted_exactly_once():
    blocks = blocks_of([50, 31, 77, 12], context=8)
    rows = blocks.batch(np.arange(blocks.total), padded=True)
    predicted = rows["shift_labels"][rows["shift_labels"] != -100]
    assert predicted.tolist() == blocks.tokens[1:].tolist()
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


def test_preparing_loses_and_doubles_nothing(cache):
    corpus = build(iter(documents()))
    prepared = prepare(corpus, vocab_size=300, context=16)
    for split, texts in ((prepared.train, corpus.train), (prepared.validation, corpus.validation)):
        text = prepared.tokenizer.decode(torch.from_numpy(split.tokens.astype(np.int64)))
        assert text == "".join(d.text + "<|endoftext|>" for d in texts)
        assert split.bytes == sum(len(d.text.encode()) for d in texts)
    assert [path.name for path in cache.iterdir() if "." in path.name] == []  # nothing half-written is left


def test_preparing_again_reads_the_cache(cache):
    corpus = build(iter(documents()))
    prepare(corpus, vocab_size=300, context=16)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = prepare(corpus, vocab_size=300, context=8)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    assert again.train.context == 8


def test_a_split_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match="less than a block of 100000"):
        prepare(build(iter(documents())), vocab_size=300, context=100_000)


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
    group, place = collisions(blocks, np.array([[0, 6, 12], [0, 1, 12], [0, -1, -1], [4, 5, 13]]))
    assert group.tolist() == [1, 3]  # two blocks of document 0; one that reaches into document 1, and one of it
    assert place.tolist() == [0, 0]


def test_a_document_with_more_than_its_share_is_refused():
    with pytest.raises(ValueError, match="could meet itself"):
        grouped_order(blocks_of([400, 50, 50], context=8), 4)
    with pytest.raises(ValueError, match="do not fill a group of 64"):
        grouped_order(blocks_of([97] * 5, context=8), 64)


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
