"""`mot upcycle` and `mot train --from`: a dense model becomes a sparse one that computes the same, and trains on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from mixture_of_tokens import (
    GroupedBatches,
    MixtureOfTokensForCausalLM,
    config_from_name,
    export,
    read_run,
    report,
    sweep,
    train,
    upcycle,
)
from mixture_of_tokens.conversion import upcycle as module
from mixture_of_tokens.conversion.copies import centres, upcycled_weights
from mixture_of_tokens.conversion.upcycle import sparse_config
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.reports.origins import without_origins
from mixture_of_tokens.reports.report import summary_of
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.trainer import RunTrainer
from processes import in_processes, mot, rows_of, start

DENSE, SPARSE = "Transformer-Nano", "TC-Nano/4E/3"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {"vocab_size": 512, "hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
OUTSIDE = {
    "qwen3, tied, wide heads": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 24}, torch.float32),
    "qwen3, bfloat16": (Qwen3Config, {"attention_bias": True}, torch.bfloat16),
    "llama, scaled rotary": (LlamaConfig, {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}, None),
    "llama, tied, biases": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}, torch.float32),
}
CLASSES = {Qwen3Config: Qwen3ForCausalLM, LlamaConfig: LlamaForCausalLM, MistralConfig: MistralForCausalLM}


def loud(model: torch.nn.Module) -> Any:
    """With larger weights than are drawn, so that every part of the model tells."""
    for weight in model.parameters():
        weight.data = weight.data * 4 if weight.dim() > 1 else weight.data + 0.2 * torch.randn_like(weight)
    return model


@pytest.fixture
def saved(tiny_runs, tmp_path):
    """Saves a model of transformers with a tokenizer, and returns its directory."""

    def save(kind: type, dtype: torch.dtype | None = None, **fields: Any) -> Path:
        set_seed(1)
        model = loud(CLASSES[kind](kind(**SIZES | fields))).to(dtype or torch.float32)
        model.save_pretrained(tmp_path / "outside")
        AutoTokenizer.from_pretrained(tiny_runs[DENSE] / "model").save_pretrained(tmp_path / "outside")
        return tmp_path / "outside"

    return save


@pytest.fixture(scope="module")
def begun(tiny_runs, tmp_path_factory) -> Path:
    """What `mot upcycle` makes of a trained dense Nano."""
    out = tmp_path_factory.mktemp("begun") / "start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs[DENSE].parent / "cache"))
        upcycle(tiny_runs[DENSE], SPARSE, out=out)
    return out


@pytest.fixture(scope="module")
def pair(tiny_runs, begun, tmp_path_factory) -> dict[str, Path]:
    """The dense run continued, and the upcycled one trained."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs[DENSE].parent / "cache"))
        for name, source in {"continued": tiny_runs[DENSE], "child": begun}.items():
            mot("train", "--from", source, "--steps", 8, "--device", "cpu", "--out", folder / name)
    return {name: folder / name for name in ("continued", "child")}


# The same function


def dense_and_sparse(name: str, gated: bool) -> tuple[MixtureOfTokensForCausalLM, MixtureOfTokensForCausalLM]:
    set_seed(0)
    dense = MixtureOfTokensForCausalLM(config_from_name(DENSE, gated=gated, hidden_act="silu", vocab_size=300)).double()
    loud(dense)
    sparse = MixtureOfTokensForCausalLM(sparse_config(parse_name(name), dense.config)).double()
    sparse.load_state_dict(upcycled_weights(dense.state_dict(), sparse))
    return dense.eval(), sparse.eval()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["TC-Nano/4E/2", "TC-Nano/5E/8", "STC-Nano/3E/4"])
def test_a_sparse_layer_is_the_dense_feed_forward(name, gated):
    if not gated:
        name = name.replace("/8", "/4")
    dense, sparse = dense_and_sparse(name, gated)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    for theirs, ours in zip(dense.model.layers[2:], sparse.model.layers[2:], strict=True):
        torch.testing.assert_close(ours.mlp(x), theirs.mlp(x))
        with torch.no_grad():  # the control: slices of several copies are not the feed-forward
            ours.mlp.gate.weight[1] += 10 * torch.randn(32, dtype=torch.float64)
        assert (ours.mlp(x) - theirs.mlp(x)).abs().max() > 1e-3


def test_each_token_goes_to_all_slices_of_one_copy_and_copies_share_the_tokens():
    _, sparse = dense_and_sparse("TC-Nano/4E/8", True)
    layer = sparse.model.layers[3].mlp
    x = torch.randn(500, 32, dtype=torch.float64)
    _, expert = layer.choose(layer.scores(layer.gate(x)))
    copy, part = expert // 8, expert % 8
    assert (copy == copy[:, :1]).all()
    assert (part.sort(-1).values == torch.arange(8)).all()
    assert len(copy[:, 0].unique()) == 4


def test_every_expert_and_every_router_row_learns():
    _, sparse = dense_and_sparse("TC-Nano/4E/3", True)
    ids = torch.randint(300, (8, 64))
    sparse.train()(input_ids=ids, labels=ids).loss.backward()
    for name, weight in sparse.named_parameters():
        assert weight.grad is not None, name
        rows = weight.grad.flatten(1) if ".experts." in name or ".gate." in name else weight.grad.flatten()[None]
        assert (rows.abs().sum(1) > 0).all(), name


CHECK = """
import sys, torch
from safetensors.torch import save_file
from mixture_of_tokens.runs.loading import load_model
model = load_model(sys.argv[1], device="cpu", dtype="float32")
ids = torch.arange(96).view(3, 32) * 5 % 500
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits}, sys.argv[2])
"""


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow, id=case) for case in OUTSIDE
])  # fmt: skip
def test_a_checkpoint_of_transformers_has_the_same_logits_in_another_process(case, saved, tmp_path):
    from safetensors.torch import load_file

    kind, fields, dtype = OUTSIDE[case]
    source, found = saved(kind, dtype, **fields), tmp_path / "found.safetensors"
    made = upcycle(source, "TC/4E/8", out=tmp_path / "start")
    assert abs(made.record.loss - made.record.source_loss) < (1e-6 if dtype != torch.bfloat16 else 1e-3)
    subprocess.run([sys.executable, "-c", CHECK, str(tmp_path / "start"), str(found)], check=True)
    theirs = CLASSES[kind].from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.arange(96).view(3, 32) * 5 % 500
    with torch.no_grad():
        torch.testing.assert_close(load_file(found)["logits"], theirs(ids).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", list(OUTSIDE))
def test_as_it_is_a_checkpoint_keeps_its_loss(case, saved, tmp_path):
    kind, fields, dtype = OUTSIDE[case]
    made = upcycle(saved(kind, dtype, **fields), "Transformer", out=tmp_path / "dense")
    assert abs(made.record.loss - made.record.source_loss) < 1e-6
    assert made.parameters == made.source_parameters


# Routers


def test_rows_are_centres_of_clusters():
    """Tokens in three directions from a common mean, far apart: each copy gets one of them."""
    set_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 3))[0].T
    which = torch.arange(900) % 3
    x = 5 * torch.randn(16) + directions[which] + 0.05 * torch.randn(900, 16)
    for _ in range(20):  # k-means may begin with two centres in one cluster
        chosen = ((x - x.mean(0)) @ centres(x, 3).T).argmax(1)
        if len(chosen[:3].unique()) == 3:
            break
    assert (chosen == chosen[which]).all()
    assert len(chosen[:3].unique()) == 3


def test_copies_begin_with_tokens_that_are_alike_and_logits_far_apart(begun, tiny_runs, tiny_cache):
    model = load_model(str(begun), device="cpu")
    ids = torch.stack([batch["input_ids"] for batch in training_groups(text_of(tiny_runs[DENSE]).train, 4, 8)])
    for layer in (block.mlp for block in model.model.layers[2:]):
        seen = []
        layer.register_forward_pre_hook(lambda layer, given, seen=seen: seen.append(given[0].detach()))
        model(input_ids=ids.flatten(0, 1))
        x = seen[0].flatten(0, 1)
        copy = layer.gate(x)[:, ::3].argmax(1)
        apart = F.normalize(x - x.mean(0), dim=1)
        within = torch.stack([apart[copy == c].mean(0).norm() for c in copy.unique()])
        drawn = torch.stack([apart[torch.randperm(len(x))[: len(x) // 4]].mean(0).norm() for _ in range(9)])
        assert within.mean() > 3 * drawn.mean()
        logits = layer.gate(x)[:, ::3]
        assert 2 < (logits - logits.mean(1, keepdim=True)).std() < 8


# What is refused


def refused(*words: object, out: Path, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        mot("upcycle", *words, "--out", out)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return said[-1]


@pytest.mark.parametrize(("kind", "fields", "named"), [
    (LlamaConfig, {"mlp_bias": True}, "mlp_bias"),
    (Qwen3Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "use_sliding_window"),
    (LlamaConfig, {"hidden_act": "tanh"}, "hidden_act"),
    (MistralConfig, {}, "MistralForCausalLM"),
])  # fmt: skip
def test_what_this_library_does_not_compute_is_named(kind, fields, named, saved, tmp_path, capsys):
    assert named in refused(saved(kind, **fields), "TC/4E/8", out=tmp_path / "out", capsys=capsys)


@pytest.mark.parametrize(("name", "named"), [
    ("MoT-Nano/4E/2", "MoT"), ("EC-Nano/4E/2", "EC"), ("TC-Nano/4E", "granularity"), ("TC-Nano/4E/7", "granularity 7"),
    ("TC-Micro/4E/2", "TC-Nano/4E/2"), ("TC-Nano", "TC-Nano"),
])  # fmt: skip
def test_names_that_do_not_fit_are_refused(name, named, tiny_runs, tiny_cache, tmp_path, capsys):
    assert named in refused(tiny_runs[DENSE], name, out=tmp_path / "out", capsys=capsys)


def test_other_sources_are_refused(tiny_runs, tiny_cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert "Mixture of Tokens" in refused(tiny_runs["MoT-Nano/4E/2"], SPARSE, out=out, capsys=capsys)
    assert "no such directory" in refused(tmp_path / "none", SPARSE, out=out, capsys=capsys)


def test_a_directory_that_holds_something_is_left_alone(tiny_runs, tiny_cache, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        upcycle(tiny_runs[DENSE], SPARSE, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_nothing_is_written_of_a_model_with_another_loss(tiny_runs, tiny_cache, tmp_path, monkeypatch):
    """The control of the check."""

    def wrong(dense, model):
        weights = upcycled_weights(dense, model)
        return {name: weight / 3 if "down_proj" in name else weight for name, weight in weights.items()}

    monkeypatch.setattr(module, "upcycled_weights", wrong)
    with pytest.raises(ValueError, match="would not be the same model"):
        upcycle(tiny_runs[DENSE], SPARSE, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Training on


def losses_at_0(run: Path) -> float:
    (row,) = (row for row in rows_of(run) if row["step"] == 0)
    return row["eval_loss"]


def test_both_begin_with_the_loss_that_the_source_ended_with(tiny_runs, pair):
    end = rows_of(tiny_runs[DENSE])[-1]["eval_loss"]
    assert losses_at_0(pair["continued"]) == pytest.approx(end, abs=1e-5)
    assert losses_at_0(pair["child"]) == pytest.approx(end, abs=1e-4)


def test_the_text_goes_on_where_the_source_stopped(tiny_runs, pair, tiny_cache, monkeypatch):
    """Rows of the source and of what continues it are those of one longer run."""
    seen: list[Any] = []
    monkeypatch.setattr(RunTrainer, "train", lambda trainer, checkpoint: seen.append(trainer.rows) or sys.exit(0))
    config = read_run(pair["child"]).config
    assert config.start is not None
    assert config.start.rows == 30 * 32
    with pytest.raises(SystemExit):
        train(start=tiny_runs[DENSE], out=pair["child"].parent / "again", options=Options(steps=2, device="cpu"))
    shutil.rmtree(pair["child"].parent / "again", ignore_errors=True)
    (rows,) = seen
    sizes = {"group_size": rows.group_size, "batch_size": 32, "seed": read_run(tiny_runs[DENSE]).seed}
    longer = GroupedBatches(rows.blocks, steps=32, **sizes)
    assert (rows.block_numbers(list(range(64))) == longer.block_numbers(list(range(30 * 32, 32 * 32)))).all()


def test_steps_rate_and_seed_are_those_of_what_is_continued(tiny_runs, tiny_cache):
    config: Any = train(start=tiny_runs[DENSE], dry_run=True)
    before = read_run(tiny_runs[DENSE]).config
    assert (config.name, config.seed, config.steps) == (DENSE, before.seed, before.steps // 4)
    assert config.learning_rate < before.learning_rate
    assert (config.data, config.batch_size) == (before.data, before.batch_size)


def test_rates_of_what_is_trained_on_are_swept(tiny_runs, begun, tiny_cache, tmp_path):
    """Each run begins with the source's loss, on tuning text, and the best is a command that trains."""
    options = Options(steps=4, device="cpu")
    plans: Any = sweep(start=str(begun), options=options, dry_run=True)
    assert Path(plans.runs[0].directory).parent.name == f"sweep-{SPARSE.replace('/', '-')}-from-{begun.name}"
    found: Any = sweep(start=begun, learning_rate=[1e-30, 1e-2], options=options, out=tmp_path / "rates")
    seed = read_run(tiny_runs[DENSE]).seed
    runs = [Path(cell.runs[0].directory) for cell in found.cells]
    assert [run.name for run in runs] == [f"learning-rate={rate}-seed={seed}" for rate in ("0.01", "1e-30")]
    assert losses_at_0(runs[0]) == pytest.approx(losses_at_0(runs[1]), abs=1e-6)
    assert found.cells[1].loss == pytest.approx(losses_at_0(runs[1]), abs=1e-3)
    mot(*shlex.split(found.best)[1:], "--dry-run")
    assert f"--from {begun}" in found.best


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_weights(begun, pair, tiny_cache, tmp_path):
    """By SIGKILL, once before there is a checkpoint and once after."""
    out, log = tmp_path / "run", tmp_path / "log"
    words = ("train", "--from", str(begun), "--steps", "8", "--device", "cpu", "--out", str(out))
    words += ("--training.save_steps", "3", "--resume")
    for there in (out / "metrics.jsonl", out / "checkpoint-3" / "manifest.json"):
        process = start(mot, *words, log=log)
        while not there.exists():
            assert process.is_alive(), log.read_text()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    mot(*words)
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (pair["child"] / weights).read_bytes()
    undisturbed = [(row["step"], row.get("eval_loss")) for row in rows_of(pair["child"])]
    assert [(row["step"], row.get("eval_loss")) for row in rows_of(out)] == undisturbed


@pytest.mark.slow
def test_sigmoid_gates_train_on(tiny_runs, tiny_cache, tmp_path):
    upcycle(tiny_runs[DENSE], "STC-Nano/4E/2", out=tmp_path / "start")
    mot("train", "--from", tmp_path / "start", "--steps", 1, "--device", "cpu", "--out", tmp_path / "run")
    assert losses_at_0(tmp_path / "run") == pytest.approx(rows_of(tiny_runs[DENSE])[-1]["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("name", [pytest.param("MoT-Nano/4E/2", marks=pytest.mark.slow), "TC-Nano/4E"])
def test_any_run_can_be_trained_on(name, tiny_runs, tiny_cache, tmp_path):
    mot("train", "--from", tiny_runs[name], "--steps", 1, "--device", "cpu", "--out", tmp_path / "run")
    assert losses_at_0(tmp_path / "run") == pytest.approx(rows_of(tiny_runs[name])[-1]["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_are_one(begun, pair, tiny_cache, tmp_path):
    words = ["train", "--from", str(begun), "--steps", "8", "--device", "cpu", "--out", str(tmp_path / "two")]
    in_processes(mot, words, 2, tmp_path / "log")
    ours, theirs = ([row.get("eval_loss") for row in rows_of(run)] for run in (tmp_path / "two", pair["child"]))
    assert ours[0] == theirs[0]
    assert [x for x in ours if x] == pytest.approx([x for x in theirs if x], abs=2e-3)  # other sums, and choices jump


def test_other_text_is_read_with_the_models_own_tokenizer(begun, pair, small_corpus, tmp_path):
    (tmp_path / "more").mkdir()
    for path in small_corpus.iterdir():
        (tmp_path / "more" / path.name).write_text(path.read_text() + " and more")
    mot(
        "train",
        "--from",
        begun,
        "--data",
        tmp_path / "more",
        "--steps",
        1,
        "--batch-size",
        32,
        "--out",
        tmp_path / "run",
    )
    run = read_run(tmp_path / "run")
    assert run.facts.corpus["tokenizer"] == read_run(pair["child"]).facts.corpus["tokenizer"]
    assert run.config.start is not None
    assert run.facts.corpus["hash"] != read_run(pair["child"]).facts.corpus["hash"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture"), [
    (Qwen3Config, "Qwen3MoeForCausalLM"), (LlamaConfig, "Qwen2MoeForCausalLM"),
])  # fmt: skip
def test_a_checkpoint_of_transformers_trains_and_is_exported(kind, architecture, saved, small_corpus, tmp_path):
    upcycle(saved(kind), "TC/4E/8", out=tmp_path / "start")
    mot("train", "--from", tmp_path / "start", "--data", small_corpus, "--steps", 2, "--batch-size", 32,
        "--out", tmp_path / "run", "--model.max_position_embeddings", 64)  # fmt: skip
    run = read_run(tmp_path / "run")
    assert (run.name, run.config.start and run.config.start.origin) == ("TC/4E/8", "outside")
    assert export(tmp_path / "run", tmp_path / "exported", device="cpu").architecture == architecture
    model, plain = (load_model(str(tmp_path / name), device="cpu") for name in ("run", "exported"))
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(plain(ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("words", "named"), [
    (["MoT-Nano/4E/3"], SPARSE), (["--model.num_experts", 8], "num_experts"), (["--tokenizer", "gpt2"], "tokenizer"),
    (["--model.norm_topk_prob", "false"], "norm_topk_prob"),
])  # fmt: skip
def test_what_would_make_it_another_model_is_refused(words, named, begun, tiny_cache, tmp_path, capsys):
    for command in ("train", "sweep"):
        with pytest.raises(SystemExit) as ended:
            mot(command, *words, "--from", begun, "--out", tmp_path / "run")
        assert ended.value.code == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_what_is_no_beginning_is_refused(saved, tmp_path, capsys):
    for source, named in ((saved(Qwen3Config), "mot upcycle"), (tmp_path / "none", "no such directory")):
        with pytest.raises(SystemExit) as ended:
            mot("train", "--from", source, "--out", tmp_path / "run")
        assert ended.value.code == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        mot("train", "--out", tmp_path / "run")
    assert ended.value.code == 2
    assert "NAME" in capsys.readouterr().err


def test_a_damaged_beginning_is_refused(begun, tiny_cache, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "start")
    weights = tmp_path / "start" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit) as ended:
        mot("train", "--from", tmp_path / "start", "--out", tmp_path / "run")
    assert ended.value.code == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_its_config_yaml_makes_it_again(pair, tiny_cache, capsys):
    mot("train", "--config", pair["child"] / "config.yaml", "--dry-run", "--json")
    again, before = json.loads(capsys.readouterr().out), read_run(pair["child"]).config
    assert again["start"] == json.loads(before.to_json())["start"]
    assert (again["steps"], again["model"]) == (before.steps, before.model)


# Reported


def test_steps_are_counted_from_the_end_of_what_all_began_with(tiny_runs, pair, tiny_cache, tmp_path):
    result = report(tiny_runs[DENSE], pair["continued"], pair["child"], out=tmp_path / "page.html").comparison
    assert [model.label for model in result.models] == [f"{DENSE}, continued", f"{SPARSE}, upcycled"]
    assert result.origin is not None
    assert (result.origin.label, result.origin.steps) == (DENSE, 30)
    (before,) = result.origin.curves
    assert (before[-1].step, before[-1].seconds, before[0].step) == (0, 0, 10 - 30)
    assert result.models[1].runs[0].curve[0].step == 0
    differ = result.origin.scored_tokens != result.scored_tokens
    assert ("of other tokens than these losses" in summary_of(result)) == differ
    page = (tmp_path / "page.html").read_text()
    assert f"{DENSE}, before" in page
    saved = json.loads(result.to_json())
    assert saved["origin"]["label"] == DENSE


def test_a_run_of_as_many_steps_as_its_source_is_compared_and_not_taken_for_it():
    kept = Path(__file__).parents[2] / "experiments" / "upcycle"
    source, longer, child = (
        read_run(kept / f"Transformer-Nano-seed1{end}.json") for end in ("", "-1000", "-upcycled-1000")
    )
    assert source.name == longer.name
    assert source.config.steps == longer.config.steps
    assert without_origins([source, longer, child]) == ([longer, child], [source])
    assert without_origins([longer, child]) == ([longer, child], [])
    assert without_origins([longer]) == ([longer], [])


def test_going_on_with_another_beginning_names_the_flag(pair, tiny_runs, tmp_path, tiny_cache, capsys):
    shutil.copytree(tiny_runs[DENSE], tmp_path / "copy")
    with pytest.raises(SystemExit, match="2"):
        mot(
            "train",
            "--from",
            tmp_path / "copy",
            "--steps",
            8,
            "--device",
            "cpu",
            "--resume",
            "--out",
            pair["continued"],
        )
    *_, told = capsys.readouterr().err.splitlines()
    assert f"was started with --from {tiny_runs[DENSE]}, now it is {tmp_path / 'copy'}; give the same flags" in told


def test_without_it_they_are_compared_all_the_same(pair, tmp_path, tiny_cache):
    result = report(pair["continued"], pair["child"], out=tmp_path / "page.html").comparison
    assert result.origin is None
    assert len(result.models) == 2
