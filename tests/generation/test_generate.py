"""`mot generate`: one prompt, several, a file of them that is interrupted."""

import io
import json
import os
import shutil
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixture_of_tokens import generate
from mixture_of_tokens.generation.continuations import to_file
from mixture_of_tokens.generation.generate import Row, in_batches
from mixture_of_tokens.generation.sampling import Sampling, continue_prompts
from mixture_of_tokens.generation.stream import Streamer, text_after
from mixture_of_tokens.runs.loading import check_tokens, load_model, load_tokenizer_of
from processes import finish, mot, mot_on_a_full_disk, start

MIXED = "MoT-Nano/4E/2"
NAMES = ("Transformer-Nano", MIXED, "TC-Nano/4E")


@pytest.fixture
def run(tiny_runs):
    return tiny_runs[MIXED]


@pytest.fixture
def prompts(small_corpus, tmp_path):
    """A file of eleven prompts of different lengths."""
    lines = [line for number in (0, 1) for line in (small_corpus / f"{number}.txt").read_text().splitlines()]
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{line[: 5 + 3 * (7 * i % 11)]}\n" for i, line in enumerate(lines[:11])))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_prompt_gets_the_likeliest_tokens_and_nothing_else_on_standard_output(tiny_runs, name, capsys):
    run, prompt = str(tiny_runs[name]), "abc d"
    mot("generate", run, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 12)
    shown = capsys.readouterr()
    model, tokenizer = load_model(run), load_tokenizer_of(run)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.eos_token_id not in ids
    assert shown.out == tokenizer.decode(ids[0]) + "\n"
    assert "12 tokens in" in shown.err
    assert "tokens/s" in shown.err


def test_sampling_depends_on_the_seed_and_top_p_narrows_it(tiny_runs, capsys):
    def text(*flags):
        mot("generate", tiny_runs["Transformer-Nano"], "--prompt", "abc d", *flags)
        return capsys.readouterr().out

    assert text("--temperature", 1.5) == text("--temperature", 1.5) != text("--temperature", 1.5, "--seed", 1)
    assert text("--top-p", 1e-6) == text("--temperature", 0) != text("--seed", 1)


def test_sampling_leaves_the_random_state_of_its_caller_alone(run):
    model, tokenizer = load_model(str(run), device="cpu"), load_tokenizer_of(str(run))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (continue_prompts(model, tokenizer, ["def "], Sampling(temperature=1.0)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_it_says_where_the_context_cuts_a_continuation(run, capsys):
    mot("generate", run, "--prompt", "abc", "--max-new-tokens", 5)
    assert "the context" not in capsys.readouterr().err
    mot("generate", run, "--prompt", "abc", "--max-new-tokens", 500)
    shown = capsys.readouterr().err
    assert "the context of 64 tokens ends 1 of 1 texts before" in shown
    mot("generate", run, "--prompt", "abc")  # of whom no number was asked
    assert "the context" not in capsys.readouterr().err


GREEDY = ("--temperature", 0, "--max-new-tokens", 30, "--json")


def test_alone_a_prompt_s_text_does_not_depend_on_the_others(run, prompts, capsys):
    def texts(*flags):
        mot("generate", run, "--prompt", "abc d", "--prompt", "e", "--prompt", "fgh", *GREEDY, *flags)
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    def by_itself(prompt, *flags):
        mot("generate", run, "--prompt", prompt, *GREEDY, *flags)
        return json.loads(capsys.readouterr().out)["text"]

    expected = [by_itself(prompt) for prompt in ("abc d", "e", "fgh")]
    assert texts("--alone") == expected
    assert texts() != expected  # the control: together they mix
    to_few = [by_itself(prompt, "--alone", "--experts", 1) for prompt in ("abc d", "e", "fgh")]
    assert texts("--alone", "--experts", 1) == to_few != expected


@pytest.mark.parametrize(
    ("name", "flags"), [pytest.param("TC-Nano/4E", (), marks=pytest.mark.slow), (MIXED, ("--alone", "--experts", 2))]
)
def test_a_long_prompt_does_not_end_the_others_that_it_is_not_mixed_with(name, flags, tiny_runs, capsys):
    prompts = ["abc d", "e", "fgh ij " * 12, "klm no " * 6]
    lengths = [len(tokens) for tokens in load_tokenizer_of(str(tiny_runs[name]))(prompts)["input_ids"]]
    assert max(lengths) > 40
    flags = ("--temperature", 0, "--max-new-tokens", 60, "--json", *flags)
    expected = []
    for prompt in prompts:
        mot("generate", tiny_runs[name], "--prompt", prompt, *flags)
        expected.append(json.loads(capsys.readouterr().out))
    mot("generate", tiny_runs[name], *(word for prompt in prompts for word in ("--prompt", prompt)), *flags)
    shown = capsys.readouterr()
    together = [json.loads(line) for line in shown.out.splitlines()]
    assert [each["text"] for each in together] == [each["text"] for each in expected]
    assert [each["tokens"] for each in together] == [min(60, 64 - length) for length in lengths]
    cut = sum(length > 4 for length in lengths)
    assert f"ends {cut} of 4 texts before 60 new tokens" in shown.err


def test_several_prompts_are_one_batch_in_their_order(run, capsys):
    prompts = ["a longer prompt", "bc"]
    mot("generate", run, "--prompt", prompts[0], "--prompt", prompts[1], "--json", "--seed", 3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = load_model(str(run)), load_tokenizer_of(str(run))
    expected = continue_prompts(model, tokenizer, prompts[::-1], Sampling(seed=3))[::-1]  # the shorter one goes first
    assert [(line["prompt"], line["text"]) for line in lines] == list(zip(prompts, expected, strict=True))


def test_samples_of_one_prompt_are_never_in_one_batch(run, capsys):
    mot("generate", run, "--prompt", "abc", "--samples", 3, "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2]
    model, tokenizer = load_model(str(run)), load_tokenizer_of(str(run))
    for sample, line in enumerate(lines):
        assert line["text"] == continue_prompts(model, tokenizer, ["abc"], Sampling().of_batch(sample))[0]
    mot("generate", run, "--prompt", "abc", "--samples", 3, "--seed", 1, "--json")
    others = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert not {line["text"] for line in lines} & set(others)


def test_batches_hold_every_row_once_by_length_in_whole_groups():
    lengths = [5, 1, 4, 1, 3, 9, 2, 6, 8, 7]
    batches = in_batches(lengths, samples=2, batch_size=3, group_size=4)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == [Row(index, sample) for index in range(10) for sample in range(2)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert [lengths[row.prompt] for row in rows[:10]] == sorted(lengths)
    assert all(len({row.sample for row in batch}) == 1 for batch in batches)


def test_a_file_is_continued_in_its_order(run, prompts):
    mot("generate", run, "--prompts-file", prompts, "--max-new-tokens", 8, "--batch-size", 4)
    out = prompts.with_name("prompts.continued.jsonl")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts.read_text().splitlines()
    assert all(line["tokens"] <= 8 for line in lines)
    assert not out.with_name("prompts.continued.jsonl.unfinished").exists()


def test_a_run_is_the_same_by_any_spelling_and_a_byte_order_mark_is_no_text(run, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfdef f\n")
    mot("generate", run, "--prompts-file", file, "--max-new-tokens", 2)
    (line,) = map(json.loads, (tmp_path / "prompts.continued.jsonl").read_text().splitlines())
    assert line["prompt"] == "def f"
    mot("generate", f"{run.parent}/./{run.name}/", "--prompts-file", file, "--max-new-tokens", 2)
    said = capsys.readouterr().err
    assert f"1 continuation is in {tmp_path / 'prompts.continued.jsonl'}" in said
    assert "prompts.continued.jsonl is finished already" in said


def test_json_lines_of_prompts_may_hold_line_ends(run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    texts = ["two\nlines", "a \u2028 separator"]
    file.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts))
    mot("generate", run, "--prompts-file", file, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    lines = (tmp_path / "out.jsonl").read_text().rstrip("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == texts


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_write_what_one_command_writes(run, prompts, tmp_path, monkeypatch):
    flags = [str(run), "--prompts-file", str(prompts), "--samples", "4", "--batch-size", "4", "--max-new-tokens", "24"]
    flags += ["--alone", "--experts", "2"]
    mot("generate", *flags, "--out", tmp_path / "whole.jsonl")
    monkeypatch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tmp_path))
    out, partial = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.unfinished"
    process = start(mot, "generate", *flags, "--out", out, log=tmp_path / "log")
    give_up = time.monotonic() + 60
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 9):
        assert time.monotonic() < give_up
        assert process.is_alive(), (tmp_path / "log").read_text()
    process.kill()
    process.join()
    assert not out.exists()
    partial.write_bytes(partial.read_bytes()[:-20])  # in the middle of a line
    before = partial.read_bytes().count(b"\n") - 1
    assert 0 < before < 44
    for others in ([*flags, "--seed", "1"], flags[:-2]):  # another seed; all experts
        with pytest.raises(SystemExit, match="2"):
            mot("generate", *others, "--out", out)
    mot("generate", *flags, "--out", out)
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_a_file_is_not_continued_by_other_weights(run, prompts, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = [copied, "--prompts-file", prompts, "--max-new-tokens", 2, "--out", tmp_path / "out.jsonl"]
    mot("generate", *flags)
    mot("generate", *flags)
    assert "out.jsonl is finished already" in capsys.readouterr().err
    model = load_model(str(copied))
    with torch.no_grad():
        model.lm_head.weight *= 2
    model.save_pretrained(copied / "model")
    (copied / "model" / "manifest.json").unlink()  # with which this would be damage
    before = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(SystemExit, match="2"):
        mot("generate", *flags)
    assert "out.jsonl exists already, and is not what this command writes" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == before


def test_a_file_is_continued_in_the_precision_that_it_was_begun_in(run, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    mot("generate", run, "--prompts-file", prompts, "--out", out, "--dtype", "bfloat16")
    before = out.read_text()
    assert '"dtype"' not in before  # it is in the hash
    with pytest.raises(SystemExit, match="2"):
        mot("generate", run, "--prompts-file", prompts, "--out", out)
    assert "out.jsonl" in capsys.readouterr().err
    mot("generate", run, "--prompts-file", prompts, "--out", out, "--dtype", "bfloat16")
    assert out.read_text() == before


def test_a_full_disk_is_told_of_continuations(run, prompts, tmp_path, capsys):
    out, words = tmp_path / "out.jsonl", ["--prompts-file", prompts, "--max-new-tokens", 24]
    settings = len(prompts.read_text()) + 900  # more than stands in the first line
    process = start(mot_on_a_full_disk, settings, "generate", run, *words, "--out", out, log=tmp_path / "log")
    assert finish(process) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("mot: error:")
    assert "out.jsonl could not be written" in last
    assert not out.exists()
    assert len((tmp_path / "out.jsonl.unfinished").read_bytes()) == settings  # no first line alone
    mot("generate", run, *words, "--out", out)
    assert out.read_text().count("\n") == 11


def test_what_is_there_already_is_not_overwritten(run, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        mot("generate", run, "--prompts-file", prompts, "--out", out)
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_prompts_that_are_mixed_are_told_of(run, capsys):
    given = ("generate", run, "--max-new-tokens", 2, "--prompt", "def ")
    for more, told in (((), 0), (("--prompt", "import "), 1), (("--prompt", "import ", "--alone"), 0)):
        mot(*given, *more)
        assert capsys.readouterr().err.count("mot: prompts of a batch influence each other; with --alone") == told


def test_an_error_is_told_without_notes_that_it_makes_pointless(run, prompts, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        mot("generate", run, "--prompts-file", prompts, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 500)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("samples", [10**6 + 1, 2**80])
def test_there_is_a_most_of_samples(run, samples):
    with pytest.raises(ValueError, match=r"samples must be at most 1000000"):
        generate(run, prompt=["abc"], samples=samples)


def test_samples_are_made_when_they_come(tmp_path):
    batches = in_batches([3, 2], samples=10**12, batch_size=1, group_size=1)  # a list of them has no room
    assert len(batches) == 2 * 10**12
    assert batches[2 * 10**12 - 1] == [Row(0, 10**12 - 1)]

    def write(number: int):
        raise ValueError("the first batch")

    with pytest.raises(ValueError, match="the first batch"):
        to_file(tmp_path / "out.jsonl", {}, batches, write, ["abc", "de"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--samples", "99999999999"], "--samples must be at most 1000000, not 99999999999"),
        (["--prompt", "caf\udce9"], "prompt 1 is no text"),
        (["--prompt", "ab " * 200], "leaves no room in the context of 64"),
        ([], "give either --prompt, which may be repeated, or --prompts-file"),
        (["--prompt", "a", "--prompts-file", "x"], "give either --prompt, which may be repeated, or --prompts-file"),
        (["--prompt", "a", "--out", "x"], "--out is for --prompts-file"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be 0 or 1e-06 to 1e+06, not -1"),
        (["--prompt", "a", "--top-p", "0"], "--top-p must be above 0 and at most 1, not 0"),
        (["--prompt", "a", "--samples", "0"], "must be at least 1, not 0"),
        (["--prompts-file", "missing.txt"], "missing.txt: there is no such file"),
        (["--prompts-file", "empty.txt"], "empty.txt is empty"),
        (["--prompts-file", "blank.txt"], "blank.txt: line 2 is empty"),
        (["--prompts-file", "latin.txt"], "latin.txt is not UTF-8 at byte"),
        (["--prompts-file", "."], "cannot be read: Is a directory"),
        (["--prompts-file", "pipe"], "pipe is no regular file: name the file of continuations with --out"),
        (["--prompts-file", "other.jsonl"], 'other.jsonl: line 1 is no object with the text "prompt"'),
        (["--prompts-file", "gap.jsonl"], "gap.jsonl: line 2 is empty"),
        (["--prompt", "long " * 200], "and leaves no room in the context of 64"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_use_is_one_line_and_leaves_nothing(run, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "gap.jsonl").write_text('{"prompt": "a"}\n\n')
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        mot("generate", run, *words)
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not shown.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_s_own_defaults_change_nothing_but_where_a_text_ends(name, tiny_runs):
    model, tokenizer = load_model(str(tiny_runs[name])), load_tokenizer_of(str(tiny_runs[name]))
    likeliest = Sampling(max_new_tokens=12, temperature=0)
    (expected,) = continue_prompts(model, tokenizer, ["abc def"], likeliest)
    own = model.generation_config
    own.repetition_penalty, own.num_beams, own.num_return_sequences, own.return_dict_in_generate = 1.3, 3, 2, True
    assert continue_prompts(model, tokenizer, ["abc def"], likeliest) == [expected]
    assert model.generation_config is own
    assert own.num_beams == 3
    tokens = tokenizer(expected)["input_ids"]
    own.eos_token_id = [tokenizer.eos_token_id, end := tokens[5]]
    before = tokenizer.decode(tokens[: tokens.index(end)])
    assert continue_prompts(model, tokenizer, ["abc def"], likeliest) == [before]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_one_line(run, temperature, tmp_path, capsys):
    model = load_model(str(run))
    with torch.no_grad():
        model.lm_head.weight *= 1e40
    model.save_pretrained(tmp_path)
    load_tokenizer_of(str(run)).save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        mot("generate", tmp_path, "--prompt", "abc", "--temperature", temperature)
    assert capsys.readouterr().err == "mot: error: the model's logits are not finite: there is nothing to sample from\n"


def test_a_token_that_the_model_does_not_know_is_told(run, tmp_path, capsys):
    model = load_model(str(run))
    check_tokens(model, "there", model.config.vocab_size - 1)
    count = model.config.vocab_size
    with pytest.raises(ValueError, match=f"there: its tokenizer gives token {count}, and its model .* below {count}"):
        check_tokens(model, "there", count)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    load_tokenizer_of(str(run)).save_pretrained(tmp_path)
    (tmp_path / "own.txt").write_text("abc")
    for words in (("generate", tmp_path, "--prompt", "abc"), ("evaluate", tmp_path, "--data", tmp_path / "own.txt")):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            mot(*words)
        assert f"{tmp_path}: its tokenizer gives token" in capsys.readouterr().err


def test_whole_numbers_are_numbers_in_a_file_s_settings(run, prompts):
    words = {"prompts_file": prompts, "max_new_tokens": 2}
    first = generate(run, temperature=1, top_p=1, **words)
    assert generate(run, temperature=1.0, top_p=1.0, **words) == first


def test_what_is_streamed_is_what_is_returned(run):
    for prompt in ("a b", "caf\u00e9 \u2013 \u6f22"):
        stream = io.StringIO()
        found = generate(run, prompt=[prompt], max_new_tokens=20, temperature=1, stream=stream)
        assert stream.getvalue() == str(found) + "\n"
    with pytest.raises(ValueError, match=r"stream takes what can be written to, .* not str"):
        generate(run, prompt=["a"], stream="x")  # pyright: ignore[reportArgumentType]


def test_text_is_streamed_as_it_is_whatever_the_tokenizer():
    words = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    stream = io.StringIO()
    streamer = Streamer(PreTrainedTokenizerFast(tokenizer_object=words), stream, ends=[3])
    for tokens in ([[0, 0]], [1], [0], [3]):
        streamer.put(torch.tensor(tokens))
    assert stream.getvalue() == " b a"
    streamer.end()
    assert stream.getvalue() == " b a\n"


def test_a_space_at_the_seam_is_kept_whatever_the_tokenizer():
    """As SentencePiece has it, a text's first token stands without the space that another's begins with."""
    words = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([1]) == "b"
    assert text_after(tokenizer, [0], [1]) == " b"
    assert text_after(tokenizer, [0, 0], []) == ""
