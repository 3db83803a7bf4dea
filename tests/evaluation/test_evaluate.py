"""`mot evaluate`: what is counted, in full groups, in smaller ones and alone."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mixture_of_tokens import MixtureOfTokens, Options, evaluate, train
from mixture_of_tokens.conversion import distil as distillation
from mixture_of_tokens.conversion.choice_of_top_k import switch_and_distil
from mixture_of_tokens.conversion.switch import branches
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.evaluation import losses
from mixture_of_tokens.evaluation.evaluate import argmax_routing, in_parts
from mixture_of_tokens.evaluation.losses import cross_entropy, evaluate_blocks
from mixture_of_tokens.layers.losses import IGNORE
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of, text_of
from processes import mot

MIXED = "MoT-Nano/4E/2"
FEW = ("alone, 4 of 8 experts", "alone, 2 of 8 experts")
SIZES = ("full groups", "2 rows a group", "alone", *FEW)


@pytest.fixture
def evaluated(tiny_cache, capsys):
    def run(*words) -> dict:
        mot("evaluate", *words, "--json")
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", ["Transformer-Nano", MIXED, "TC-Nano/4E"])
def test_the_whole_text_is_counted_once_and_gives_the_loss_of_the_run(tiny_runs, name, evaluated):
    result = evaluated(tiny_runs[name], "--regroupings", 1)
    facts = json.loads((tiny_runs[name] / "run.json").read_text())
    first = result["lines"][0]
    assert first["tokens"] == facts["corpus"]["validation"]["tokens"] - 1
    assert result["bytes"] == facts["corpus"]["validation"]["bytes"]
    loss, bits_per_byte = facts["final_loss"], facts["bits_per_byte"]
    if name == MIXED:  # the run evaluated in the data's groups of 32, this in the model's of 4
        run = str(tiny_runs[name])
        again = evaluate_blocks(load_model(run), text_of(run).validation, group_size=4, batch_size=32)
        assert again["loss"] == pytest.approx(loss, abs=0.05)
        loss, bits_per_byte = again["loss"], again["bits_per_byte"]
    assert first["loss"] == pytest.approx(loss, abs=1e-5)
    assert first["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))


@pytest.mark.usefixtures("tiny_cache")
def test_a_loss_whose_perplexity_is_no_number_any_more_is_told(tiny_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs["Transformer-Nano"], run)
    model = load_model(str(run))
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    shutil.rmtree(run / "model")
    model.save_pretrained(run / "model")
    shutil.copy(tiny_runs["Transformer-Nano"] / "model" / "tokenizer.json", run / "model")
    shutil.copy(tiny_runs["Transformer-Nano"] / "model" / "tokenizer_config.json", run / "model")
    (line, *_) = evaluate(run, regroupings=1, sweep_tokens=100).lines
    assert line.loss > 1000
    assert line.perplexity == math.inf


@pytest.mark.usefixtures("tiny_cache")
def test_rows_a_group_from_full_to_alone(tiny_runs):
    result = evaluate(tiny_runs[MIXED])
    lines = {line.label: line for line in result.lines}
    assert list(lines) == ["full groups", "full groups, argmax routing", "2 rows a group", "alone", *FEW]
    assert [line.split("  ")[0] for line in str(result).splitlines()[1:]] == list(lines)
    assert len({round(line.loss, 7) for line in lines.values()}) == 6
    model, text = load_model(str(tiny_runs[MIXED])), text_of(str(tiny_runs[MIXED])).validation
    losses = [evaluate_blocks(model, text, group_size=4, batch_size=32, seed=seed)["loss"] for seed in range(3)]
    assert lines["full groups"].spread == pytest.approx(max(losses) - min(losses), abs=1e-6)
    assert max(losses) - min(losses) > 1e-4
    assert lines["full groups"].loss == pytest.approx(sum(losses) / 3, abs=1e-6)
    model.serve_alone(num_experts_alone=2)
    nats, count = cross_entropy(model, text.batch(np.arange(len(text) + 1), padded=True))
    assert lines[FEW[1]].loss == pytest.approx(nats / count, abs=1e-5)
    assert len({line.tokens for line in lines.values()}) == 1
    assert all(line.tokens_per_second > 0 for line in lines.values())


def test_alone_by_a_number_of_experts_that_is_asked_for(tiny_runs, evaluated):
    labels = [line["label"] for line in evaluated(tiny_runs[MIXED], "--experts", 3, "--sweep-tokens", 600)["lines"]]
    assert labels[-2:] == ["alone", "alone, 3 of 8 experts"]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_experts_of_groups_of_one_are_served_and_distilled_all(small_corpus, tmp_path, monkeypatch):
    """Each weighs a token alike, so none can be left out."""
    sizes = {"group_size": "1", "num_experts": "16"}
    options = Options(steps=1, batch_size=32, device="cpu", data=[str(small_corpus)], model=sizes)
    train("MoT-Nano/4E/2", out=tmp_path / "run", options=options)
    labels = [line.label for line in evaluate(tmp_path / "run", regroupings=1, sweep_tokens=600).lines]
    assert labels[-1] == "alone"
    few = []

    def noted(source, batches, tokens, num_experts_alone, *served):
        few.append(num_experts_alone)
        return branches(source, batches, tokens, num_experts_alone, *served)

    monkeypatch.setattr(distillation, "branches", noted)
    run = str(tmp_path / "run")
    switch_and_distil(load_model(run), text_of(run), top_k=2, scores="softmax", distil_steps=2)
    assert few == [None]


@pytest.mark.parametrize("name", ["STC-Nano/4E", "EC-Nano/4E", "SoftMoE-Nano/4E", "Uniform-Nano/4E"])
def test_models_of_all_routings_are_evaluated(name, tiny_cache, small_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(name, out=tmp_path / "run", options=Options(steps=1, batch_size=32, device="cpu", data=[str(small_corpus)]))
    (tmp_path / "own.txt").write_text((small_corpus / "0.txt").read_text())
    found = evaluate(tmp_path / "run", data="./own.txt", regroupings=1)
    labels = [line.label for line in found.lines]
    assert ("alone" in labels) == (name != "EC-Nano/4E")
    assert not any("experts" in label for label in labels)
    assert found.bytes == (tmp_path / "own.txt").stat().st_size


def test_a_module_that_is_in_another_mode_stays_in_it(tiny_runs, tiny_cache):
    model, text = load_model(str(tiny_runs[MIXED])), text_of(str(tiny_runs[MIXED])).validation
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    evaluate_blocks(model, text, group_size=4, batch_size=8, groups=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_a_part_of_a_text_is_scored(tiny_runs, evaluated):
    whole = evaluated(tiny_runs[MIXED], "--sweep-tokens", 600)["lines"][0]
    part = evaluated(tiny_runs[MIXED], "--max-tokens", 2000)["lines"]
    assert {line["label"] for line in part} == {*SIZES, "full groups, argmax routing"}
    (tokens,) = {line["tokens"] for line in part}
    assert 2000 - 2 * 4 * 64 < tokens <= 2000
    assert part[0]["spread"] is None
    assert part[0]["bits_per_byte"] is None
    assert part[0]["loss"] == pytest.approx(whole["loss"], abs=0.2)
    assert part[0]["loss"] != whole["loss"]


@pytest.mark.parametrize(
    "name", [MIXED, *(pytest.param(n, marks=pytest.mark.slow) for n in ("Transformer-Nano", "TC-Nano/4E"))]
)
def test_a_model_is_read_in_bf16(tiny_runs, evaluated, name):
    words = (tiny_runs[name], "--max-tokens", 2000)
    exact, rounded = (evaluated(*words, *more)["lines"][0]["loss"] for more in ((), ("--dtype", "bfloat16")))
    assert 0 < abs(exact - rounded) < 0.02
    model = load_model(str(tiny_runs[name]), dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    precise = {key: buffer for key, buffer in model.named_buffers() if "companion" in key}
    assert bool(precise) == (name == MIXED)
    saved = load_model(str(tiny_runs[name])).state_dict()
    assert all(torch.equal(buffer, saved[key]) for key, buffer in precise.items() if key in saved)


def test_a_model_that_mixes_nothing_reads_a_few_rows_alone(tiny_runs, evaluated, monkeypatch):
    monkeypatch.setattr("mixture_of_tokens.evaluation.evaluate.ROWS_FOR_SPEED", 3)
    whole, alone = evaluated(tiny_runs["Transformer-Nano"])["lines"]
    assert (alone["label"], alone["rows"], alone["tokens"]) == ("alone, 3 rows", 1, 3 * 64)
    assert whole["tokens"] > 10 * alone["tokens"]
    monkeypatch.undo()
    assert evaluated(tiny_runs["Transformer-Nano"])["lines"][-1]["label"] == "alone"


def test_alone_is_each_block_by_itself(tiny_runs, evaluated):
    result = evaluated(tiny_runs[MIXED], "--sweep-tokens", 600)
    line = next(line for line in result["lines"] if line["label"] == "alone")
    model, text = load_model(str(tiny_runs[MIXED])), text_of(str(tiny_runs[MIXED])).validation
    nats = []
    groups = grouped_order(text, 4, everything=True)[:2]
    for block in groups[groups >= 0]:
        batch = text.batch(np.array([block]), padded=True)  # the last one is shorter
        real = batch["shift_labels"] != IGNORE
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits
        nats.append(F.cross_entropy(logits[real], batch["shift_labels"][real], reduction="none"))
    assert line["tokens"] == sum(map(len, nats)) > 6 * 64
    assert line["loss"] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-5)
    assert line["bits_per_byte"] is None  # the bytes of a part are not known
    assert [other["label"] for other in result["lines"]][1] == "full groups, same text as below"


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_text_that_is_grouped_in_one_way_has_no_spread(tiny_runs, tmp_path):
    for length in (1, 100):
        for number in range(8):
            (tmp_path / f"{number}.txt").write_text(f"text {number} " * length)
        (full, *_) = evaluate(tiny_runs[MIXED], data=[tmp_path / "*.txt"]).lines
        assert (full.spread is None) == (full.tokens < 4 * 64) == (length == 1)


def test_rows_of_a_dense_model_do_not_matter(tiny_runs, evaluated):
    together, alone = evaluated(tiny_runs["Transformer-Nano"])["lines"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert together["spread"] is None
    whole, together, alone = evaluated(tiny_runs["Transformer-Nano"], "--sweep-tokens", 1)["lines"]
    assert together["label"] == "32 rows, same text as below"
    assert together["tokens"] == alone["tokens"] < whole["tokens"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_the_text_of_a_file_is_taken_whole(tiny_runs, evaluated, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("abc de\r\n" * 300 + "café", newline="")
    result = evaluated(tiny_runs[MIXED], "--data", file)
    tokenizer = load_tokenizer_of(str(tiny_runs[MIXED]))
    assert result["bytes"] == file.stat().st_size
    assert result["lines"][0]["tokens"] == len(tokenizer(file.read_bytes().decode())["input_ids"])


def test_the_text_of_rows_is_in_the_field_that_is_asked_for(tiny_runs, evaluated, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "body": "abc de fgh " * n}) + "\n" for n in (20, 30)))
    result = evaluated(tiny_runs[MIXED], "--data", file, "--field", "body", "--regroupings", 1)
    assert result["bytes"] == 50 * len("abc de fgh ")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("learned", [False, True])
def test_argmax_routing_reads_one_token_and_ends_with_the_block(learned):
    torch.manual_seed(0)
    layer = MixtureOfTokens(8, 6, 5, 3, temperature=0.5, learnable_temperature=learned)
    if learned:
        nn.init.constant_(layer.gate.log_temperature, -0.3)
    x = torch.randn(3, 1, 8)
    before = layer(x)
    with argmax_routing(layer):
        y = layer(x)
    group = x[:, 0]
    best = (group @ layer.gate.weight.T).argmax(0)
    outputs = layer.experts(group[best][:, None])[:, 0]
    expected = torch.zeros(3, 8).index_add(0, best, outputs)
    torch.testing.assert_close(y[:, 0], expected)
    assert torch.equal(layer(x), before)
    assert layer.gate.temperature_setting == 0.5


def test_argmax_routing_of_an_incomplete_group_weighs_what_stands_for_missing_tokens_alike():
    torch.manual_seed(0)
    layer, x = MixtureOfTokens(8, 6, 5, 4, temperature=0.5).double(), torch.randn(2, 1, 8, dtype=torch.float64)
    logits = x[:, 0] @ layer.gate.weight.T / 0.5
    highest, best = logits.max(0)
    above = torch.tensor([True, False, True, False, True])  # of each expert, whether a token is above the companion
    layer.companion_logit = highest - above.double() * 2 + 1
    before = layer(x)
    with argmax_routing(layer):
        weights = layer.weights(x.transpose(0, 1), None, torch.full((1, 1, 1), 2.0, dtype=torch.float64))
    torch.testing.assert_close(weights[0], F.one_hot(best, 2).T.double() * above)
    assert torch.equal(layer(x), before)


@pytest.mark.usefixtures("tiny_cache")
def test_text_of_one_group_and_a_part_is_evaluated_whole(tiny_runs):
    model, length = load_model(str(tiny_runs[MIXED])), 64 * 5 + 1
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, length)
    blocks = Blocks(tokens, np.arange(1, length + 1), 64, length)  # every token is a document
    found = evaluate_blocks(model, blocks, group_size=4, batch_size=4, groups=1)
    assert len(blocks) == 5
    assert found == evaluate_blocks(model, blocks, group_size=4, batch_size=4)
    assert found["tokens"] == 64 * 5


def test_smaller_groups_are_parts_of_full_ones():
    groups = np.array([[3, 1, 7, 5, 2], [6, -1, -1, -1, -1]])
    assert in_parts(groups, 5).tolist() == groups.tolist()
    assert in_parts(groups, 2).tolist() == [[3, 1], [7, 5], [2, -1], [6, -1]]
    assert in_parts(groups, 1).tolist() == [[3], [1], [7], [5], [2], [6]]


def test_any_causal_language_model_of_transformers(tiny_runs, evaluated, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, num_key_value_heads=1, head_dim=8, **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer_of(str(tiny_runs[MIXED]))
    tokenizer.save_pretrained(tmp_path / "model")
    text = "some words of text " * 20
    (tmp_path / "text.txt").write_text(text)
    result = evaluated(tmp_path / "model", "--data", tmp_path / "text.txt", "--context", 1024)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
    assert [line["loss"] for line in result["lines"]] == pytest.approx([float(expected)] * 2, abs=1e-5)


def test_logits_of_foreign_models_are_never_in_memory_for_all_rows(monkeypatch):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (5, 8))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[2] = IGNORE
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    whole = cross_entropy(model, {"input_ids": ids, "shift_labels": labels})
    monkeypatch.setattr(losses, "LOGITS", 2 * 8 * 50)
    parts = cross_entropy(model, {"input_ids": ids, "shift_labels": labels})
    assert seen == [5, 2, 2, 1]
    assert parts == pytest.approx(whole)


@pytest.fixture
def strange(tmp_path, monkeypatch, tiny_runs):
    """Directories that hold no causal language model with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    t5 = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    load_model(str(tiny_runs[MIXED])).save_pretrained(tmp_path / "bare")
    load_model(str(tiny_runs[MIXED])).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "emptied").mkdir()
    shutil.copy(tiny_runs[MIXED] / "run.json", tmp_path / "emptied")
    (tmp_path / "begun").mkdir()
    shutil.copy(tiny_runs[MIXED] / "config.yaml", tmp_path / "begun")


@pytest.mark.usefixtures("strange", "tiny_cache")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing is no model: it has neither model/ nor config.json"),
        (["emptied"], "emptied is no model: its folder model/ is gone"),
        (["begun"], "begun is no model: it is a run that has saved no checkpoint yet; give a finished run"),
        (["./missing"], "./missing: there is no such directory"),
        (["file"], "file is no model"),
        (["t5"], "t5 cannot be loaded: a t5 model is no causal language model"),
        (["cut"], "cut cannot be loaded"),
        (["bare"], "bare is no run directory, so its text is not known; name one with --data"),
        (["bare", "--data", "short.txt"], "bare has no tokenizer beside the model"),
        (["RUN", "--data", "missing.txt"], "missing.txt: there is no such file or folder"),
        (["RUN", "--regroupings", "0"], "--regroupings must be at least 1, not 0"),
        (["RUN", "--context", "65"], "--context 65 is more than the 64 tokens that the model takes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_use_is_one_line(words, message, tiny_runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("evaluate", *(tiny_runs[MIXED] if word == "RUN" else word for word in words))
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_text_that_has_changed_is_not_taken_for_the_run_s(tiny_runs, tmp_path, tiny_cache, small_corpus, capsys):
    settings = (tiny_runs[MIXED] / "config.yaml").read_text()
    changed = tmp_path / "texts"
    changed.mkdir()
    for i in range(250):
        (changed / f"{i}.txt").write_text((small_corpus / f"{i}.txt").read_text())
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(tiny_runs[MIXED] / "model")
    (run / "run.json").write_text((tiny_runs[MIXED] / "run.json").read_text())
    (run / "config.yaml").write_text(settings.replace(str(small_corpus), str(changed)))
    with pytest.raises(SystemExit, match="2"):
        mot("evaluate", run)
    assert f"the text of {run} has changed" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_cache")
def test_groups_that_a_short_text_does_not_fill_are_not_called_full(tiny_runs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc de fgh ijk lmn opa " * 17)
    mot("evaluate", tiny_runs[MIXED], "--data", tmp_path / "short.txt", "--json")
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert lines[0]["label"] == "groups of 2 of 4 rows"
    assert lines[0]["tokens_per_second"] < 2.5 * 64 / lines[0]["seconds_per_group"]  # of what is there
    (tmp_path / "short.txt").write_text("hello world")
    mot("evaluate", tiny_runs[MIXED], "--data", tmp_path / "short.txt", "--json")
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert 0 < lines[0]["tokens_per_second"] <= 1.01 * lines[0]["tokens"] / lines[0]["seconds_per_group"]
    labels = [line["label"] for line in lines]
    assert labels == ["groups of 1 of 4 rows", "groups of 1 of 4 rows, argmax routing", "alone", *FEW]


@pytest.mark.usefixtures("tiny_cache")
def test_a_model_that_says_nothing_of_its_context_or_of_an_end_is_evaluated_and_audited(tiny_runs, tmp_path, capsys):
    bloom = BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    tokenizer = AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "bloom")
    (tmp_path / "text.txt").write_text("abc de fgh ijk lmn opa " * 200)
    mot("evaluate", tmp_path / "bloom", "--data", tmp_path / "text.txt", "--context", 32, "--json")
    assert json.loads(capsys.readouterr().out)["lines"][0]["loss"] == pytest.approx(math.log(512), abs=0.5)
    mot("audit", tmp_path / "bloom", "--expect", "private", "--batches", "1")
    assert "private: yes" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_cache")
def test_a_model_that_expects_a_token_at_the_beginning_is_told(tiny_runs, tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=513, num_key_value_heads=1, head_dim=8, **sizes)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    (tmp_path / "text.txt").write_text("abc de fgh ijk lmn opa " * 200)
    told = "expects <bos> at the beginning of a text, and blocks have none: its loss may come out too high"
    for begins in (False, True):
        if begins:
            special = [("<bos>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=special)
        tokenizer.save_pretrained(tmp_path)
        mot("evaluate", tmp_path, "--data", tmp_path / "text.txt", "--context", 32, "--json")
        captured = capsys.readouterr()
        assert json.loads(captured.out)["lines"]
        assert (told in captured.err) == begins
