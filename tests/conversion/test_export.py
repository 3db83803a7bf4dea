"""`mot export`: what plain transformers gets, in a process where this library does not exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mixture_of_tokens import MixtureOfTokens, MixtureOfTokensForCausalLM, audit, export
from mixture_of_tokens.conversion import choice_of_top_k as distilled_module
from mixture_of_tokens.conversion import export as export_module
from mixture_of_tokens.conversion import verify as verify_module
from mixture_of_tokens.conversion.choice_of_top_k import Distilled, TopK, best_of, switch_and_distil
from mixture_of_tokens.conversion.to_hf import to_plain
from mixture_of_tokens.conversion.verify import in_plain_transformers
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.locking import owned_file
from processes import Python, another_python, finish, mot, mot_on_a_full_disk, start
from routings import randomized

MIXED = "MoT-Nano/4E/2"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
# By the architecture of transformers that computes them, models whose queries and keys are not normed.
UNNORMED = {
    "LlamaForCausalLM": ("dense", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "MixtralForCausalLM": (
        "token_choice",
        {"mlp_layer_types": ["token_choice"] * 3, "norm_topk_prob": True, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "Qwen2MoeForCausalLM": ("token_choice", {"norm_topk_prob": True, "rope_parameters": LLAMA3}),
}


def model_of(kind: str, **options) -> MixtureOfTokensForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 12, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "group_size": 3, "mlp_layer_types": ["dense", kind, kind]}
    config = MixtureOfTokensConfig(
        **{"vocab_size": 512, "max_position_embeddings": 256} | sizes | heads | experts | options
    )
    return randomized(MixtureOfTokensForCausalLM(config)).eval()


@pytest.fixture
def saved(beside_a_tokenizer):
    return lambda kind, **options: beside_a_tokenizer(kind, model_of(kind, **options))


READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, ids, new = sys.argv[1], *map(json.loads, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(directory).eval()
with torch.no_grad():
    logits = model(torch.tensor(ids)).logits
    written = model.generate(torch.tensor(ids)[:1], max_new_tokens=new, min_new_tokens=new, do_sample=False)
kept = AutoTokenizer.from_pretrained(directory)("def f(x):")["input_ids"]
found = {"kind": type(model).__name__, "transformers": transformers.__version__, "kept": kept}
print(json.dumps(found | {"logits": logits.tolist(), "text": written[0].tolist()}))
"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Python]:
    """One process for all tests: its imports take longer than its answers."""
    with another_python() as python:
        yield python


@pytest.fixture
def checked_elsewhere(elsewhere, monkeypatch) -> None:
    """Exports are checked there too, where users' start a process each."""
    monkeypatch.setattr(verify_module, "in_plain_transformers", elsewhere)


def read_by(python: Python, directory: Path, ids: torch.Tensor, new: int) -> dict:
    """What plain transformers makes of a directory and of ids."""
    return json.loads(python(READ, str(directory), json.dumps(ids.tolist()), str(new)))


def check_keys_and_shapes(out, own) -> None:
    """They are those that transformers writes for its own model of that configuration."""
    config = json.loads((out / "config.json").read_text())
    sizes = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).save_pretrained(own)
    if config["model_type"] in ("qwen3_moe", "qwen2_moe", "mixtral"):
        assert config["num_experts"] == config["num_local_experts"] == 6
    if config["model_type"] in ("qwen3_moe", "qwen2_moe"):
        assert (config["mlp_only_layers"], config["norm_topk_prob"]) == ([0], config["model_type"] == "qwen2_moe")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(place / "model.safetensors").items()} for place in (out, own)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # Dots1's shared experts: there are none
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        # The capacity is what training would drop by.
        (
            "token_choice",
            {"capacity_factor": 0.5, "router_temperature": 0.5, "learnable_temperature": True},
            "Qwen3MoeForCausalLM",
        ),
        ("sigmoid_choice", {"router_temperature": 0.5}, "Dots1ForCausalLM"),
        pytest.param("sigmoid_choice", {"shared_experts": 2}, "Dots1ForCausalLM", marks=pytest.mark.slow),
        ("dense", {}, "Qwen3ForCausalLM"),
        *((kind, options | {"qk_norm": False}, expected) for expected, (kind, options) in UNNORMED.items()),
    ],
    ids=["token_choice", "sigmoid_choice", "shared_experts", "dense", "llama", "mixtral", "qwen2_moe"],
)
def test_the_same_logits_and_200_greedy_tokens_where_this_library_does_not_exist(
    kind, options, expected, saved, elsewhere, tmp_path, request, capsys
):
    if expected != "Qwen3MoeForCausalLM":  # which is checked as users' exports are
        request.getfixturevalue("checked_elsewhere")
    directory = saved(kind, **options)
    for name in (".out.partial", "out.partial"):  # what a killed export may have left, and a folder of somebody's
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("stale")
    mot("export", directory, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    assert (tmp_path / "out.partial" / "stale").read_text() == "stale"
    assert not (tmp_path / "out" / "stale").exists()
    check_keys_and_shapes(tmp_path / "out", tmp_path / "own")
    assert "differ from the run's by at most" in capsys.readouterr().out
    model = MixtureOfTokensForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(1))
    found = read_by(elsewhere, tmp_path / "out", ids, 200)
    assert found["kind"] == expected
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits, rtol=1e-5, atol=1e-5)
        one = model(ids[:1, :1]).logits  # a single token, which no capacity may drop
        torch.testing.assert_close(torch.tensor(found["logits"])[:1, :1], one, rtol=1e-5, atol=1e-5)
    written = model.generate(ids[:1], max_new_tokens=200, min_new_tokens=200, do_sample=False)
    assert found["text"] == written[0].tolist()
    assert found["kept"] == AutoTokenizer.from_pretrained(directory)("def f(x):")["input_ids"]


@pytest.mark.usefixtures("tiny_cache", "checked_elsewhere")
@pytest.mark.parametrize(
    "words",
    [(), pytest.param(("--top-k", 3, "--scores", "sigmoid"), marks=pytest.mark.slow)],
    ids=["fewest", "sigmoid"],
)
def test_a_mixture_of_tokens_is_exported_without_training(words, tiny_runs, elsewhere, tmp_path, capsys, monkeypatch):
    """Train, export, plain transformers: the switched model's text to the last token, and the run untouched."""
    made = []
    monkeypatch.setattr(
        export_module,
        "switch_and_distil",
        lambda *args, **options: made.append(switch_and_distil(*args, **options)) or made[0],
    )
    files = {path: path.read_bytes() for path in tiny_runs[MIXED].rglob("*") if path.is_file()}
    mot("export", tiny_runs[MIXED], tmp_path / "out", "--distil-steps", 20, *words)
    shown, said = capsys.readouterr()
    assert "Comparing logits with plain transformers', in another process\n" in said
    model, served = made[0]
    assert {path: path.read_bytes() for path in tiny_runs[MIXED].rglob("*") if path.is_file()} == files
    assert [each.top_k for each in served.tried] == ([3] if words else [2, 1])
    lowest = min(each.loss for each in served.tried)
    fewest = min((each for each in served.tried if each.loss <= lowest + 0.01), key=lambda each: each.top_k)
    assert served.chosen == fewest
    assert f"Top {fewest.top_k} is written" in shown
    assert model.config.num_experts_per_tok == fewest.top_k
    run = str(tiny_runs[MIXED])
    for each, of in ((served.source, load_model(run)), (fewest, model)):
        assert each.loss == pytest.approx(distilled_module.loss_of(of, text_of(run).tuning), abs=1e-5)
    assert "rows of the tuning text: they do not compare with mot train's, by default of the whole validation" in shown
    flops = [each.flops_per_token for each in served.tried]
    assert flops == sorted(flops, reverse=True)
    assert all(each.ms > 0 for each in served.tried)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ("`output_router_logits=True` adds a loss" in (tmp_path / "out" / "README.md").read_text()) == (not words)
    ends = GenerationConfig.from_pretrained(tmp_path / "out")  # where it writes a text that may end
    assert (ends.eos_token_id, ends.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = torch.tensor([tokenizer("abc de fgh")["input_ids"]])
    found = read_by(elsewhere, tmp_path / "out", ids, 200)
    assert found["kind"] == ("Dots1ForCausalLM" if words else "Qwen3MoeForCausalLM")
    assert found["text"] == model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)[0].tolist()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"a part of the tuning text the loss was {served.source.loss:.4f} before, with texts in groups" in card
    assert f"and is {fewest.loss:.4f} now" in card
    assert "a sigmoid each" in card if words else "a softmax over all" in card


@pytest.mark.parametrize(
    ("losses", "best"), [((2.0, 2.009, 2.011), 4), ((2.0, 2.0, 2.0), 2), ((2.2, 2.1, 2.3), 4), ((2.0, 2.02, 2.01), 2)]
)
def test_the_fewest_experts_that_are_as_good_as_the_best_are_written(losses, best):
    source, *tried = (TopK(k, loss, 1.0, 1.0) for k, loss in zip((32, 8, 4, 2), (2.3, *losses), strict=True))
    chosen = best_of(tried)
    assert chosen.top_k == best
    why = "the fewest experts with a loss at most 0.01 nats above the lowest of these"
    assert f"Top {best} is written: {why}" in str(Distilled("tuning", source, tried, chosen))


@pytest.mark.usefixtures("tiny_cache", "checked_elsewhere")
def test_a_checkpoint_is_exported_as_what_it_is(tiny_runs, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(
        export_module,
        "switch_and_distil",
        lambda source, *args, **options: served.append(source) or switch_and_distil(source, *args, **options),
    )
    mot("export", tiny_runs[MIXED] / "checkpoint-30", tmp_path / "out", "--distil-steps", 1)
    assert all(layer.companion.any() for layer in served[0].modules() if isinstance(layer, MixtureOfTokens))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {tiny_runs[MIXED].name}, checkpoint-30" in card
    assert "Loss on all" not in card
    assert "distilled into a sparse model" in card


@pytest.mark.parametrize(
    "options",
    [{}, *(UNNORMED[name][1] | {"qk_norm": False} for name in ("MixtralForCausalLM", "Qwen2MoeForCausalLM"))],
    ids=["qwen3_moe", "mixtral", "qwen2_moe"],
)
def test_an_export_that_is_trained_on_is_balanced_as_hard(options):
    """Upstream's loss is the number of choices where load is even, ours is 1."""
    model = model_of("token_choice", capacity_factor=None, router_aux_loss_coef=0.5, **options).train()
    plain = to_plain(model)
    plain.config.output_router_logits = True
    ids = torch.randint(512, (6, 17), generator=torch.Generator().manual_seed(1))
    theirs = plain.train()(ids, labels=ids, output_router_logits=True)
    ours = model(ids, labels=ids)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=0.02, atol=0)  # theirs is over all layers' tokens at once
    assert (ours.loss - ours.cross_entropy).item() > 0.4


def test_time_is_taken_of_a_model_whose_padding_is_the_first_token():
    model = model_of("mixture_of_tokens")
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    assert distilled_module._milliseconds([model])[0] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache", "checked_elsewhere")
def test_the_circle_from_training_to_plain_transformers(tiny_runs, elsewhere, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    mot("transition", tiny_runs[MIXED], "--steps", "3", "--calibrate", "none", "--out", run)
    mot("export", run, out, "--license", "apache-2.0")
    assert "validation text" in capsys.readouterr().out
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("abc de fgh")["input_ids"]])
    model = MixtureOfTokensForCausalLM.from_pretrained(run / "model")
    found = read_by(elsewhere, out, ids, 20)
    assert found["text"] == model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0].tolist()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    facts = json.loads((run / "run.json").read_text())
    for told in (f"{facts['final_loss']:.4f}", "33 steps", facts["corpus"]["hash"], "8 experts of width 48", "loss"):
        assert told in card
    mot("audit", out, "--expect", "private")


def test_an_expert_perturbed_by_a_bit_fails_and_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    """No logits show it, nor would they show any change in an expert that the few rows of text do not reach."""

    def perturbed(model):
        plain = to_plain(model)
        weight = plain.model.layers[2].mlp.experts.down_proj.detach()
        weight[3, 0, 0] = torch.nextafter(weight[3, 0, 0], torch.tensor(9.0))
        return plain

    directory = saved("token_choice")
    monkeypatch.setattr(export_module, "to_plain", perturbed)
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "out")
    shown = capsys.readouterr().err
    assert "is not the same model, and was removed" in shown
    assert "model.layers.2.mlp.experts.down_proj is not the run's" in shown
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("checked_elsewhere")
def test_the_right_weights_read_another_way_fail_and_leave_nothing(saved, tmp_path, monkeypatch, capsys):
    def misread(model):
        plain = to_plain(model)
        plain.config.norm_topk_prob = True
        return plain

    directory = saved("token_choice")
    monkeypatch.setattr(export_module, "to_plain", misread)
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "out")
    assert re.search(r"is not the same model.*: logits on random tokens differ by up to", capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("full_at", ["model.safetensors", "tokenizer.json"])
def test_a_full_disk_is_one_line_and_leaves_nothing(full_at, saved, tmp_path):
    small = {"hidden_size": 4, "num_attention_heads": 1, "head_dim": 4, "intermediate_size": 4}
    small |= {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}
    directory = saved("dense", **small if full_at == "tokenizer.json" else {})
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert max(sizes, key=sizes.__getitem__) == full_at
    limit = sizes[full_at] - 1000
    words = ["export", str(directory), str(tmp_path / "out")]
    assert finish(start(mot_on_a_full_disk, limit, *words, log=tmp_path / "log")) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("mot: error:")
    assert "out could not be written" in last
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("command", ["export", "transition"])
def test_a_flipped_bit_in_a_run_is_one_line_and_leaves_nothing(command, tiny_runs, tmp_path, capsys):
    shutil.copytree(tiny_runs[MIXED], tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1000] ^= 1
    weights.write_bytes(flipped)
    out = {"export": [str(tmp_path / "out")], "transition": ["--out", str(tmp_path / "out")]}[command]
    with pytest.raises(SystemExit, match="2"):
        mot(command, tmp_path / "run", *out)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "model is damaged: model.safetensors is not what was written" in shown
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.network
def test_the_oldest_transformers_we_support_opens_an_export(saved, elsewhere, tmp_path):
    directory = saved("token_choice")
    mot("export", directory, tmp_path / "out")
    ids = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(1))
    (oldest,) = (re.search(r">=([\d.]+)", need)[1] for need in requires("mixture-of-tokens") if "transformers" in need)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "old")]
    subprocess.run([*install, f"transformers=={oldest}"], check=True)
    now = read_by(elsewhere, tmp_path / "out", ids, 200)
    with another_python(PYTHONPATH=str(tmp_path / "old")) as python:
        then = read_by(python, tmp_path / "out", ids, 200)
    assert then["transformers"].startswith(oldest)
    assert now["transformers"] != then["transformers"]
    torch.testing.assert_close(torch.tensor(then["logits"]), torch.tensor(now["logits"]), rtol=1e-5, atol=1e-5)
    assert then["text"] == now["text"]


@pytest.mark.parametrize("words", [(), ("--force",)])
def test_a_mount_point_is_refused_before_anything_is_fitted(saved, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("export", saved("dense"), "/proc", *words)
    assert "/proc is a mount point, and cannot be replaced: name a directory in it" in capsys.readouterr().err


@pytest.mark.usefixtures("checked_elsewhere")
def test_what_exists_is_replaced_only_by_force_and_only_by_what_is_whole(saved, tmp_path, monkeypatch, capsys):
    directory, out = saved("dense"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, out)
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, out, "--force")
    assert "out is no export of mot, so --force does not replace it" in capsys.readouterr().err
    shutil.rmtree(out)
    mot("export", directory, out)
    (out / "README.md").write_text("mine")  # a card may be written on
    (out / "mine").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "in_plain_transformers", in_plain_transformers)
        patch.setattr(verify_module, "CHECK", "import sys; sys.exit('no room')")
        with pytest.raises(SystemExit, match="2"):
            mot("export", directory, out, "--force")
    assert "plain transformers cannot load what was written: no room" in capsys.readouterr().err
    assert (out / "mine").read_text() == "mine"
    mot("export", directory, out, "--force")
    assert not (out / "mine").exists()
    assert (out / "model.safetensors").stat().st_mode & 0o044 == (out / "config.json").stat().st_mode & 0o044
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


@pytest.mark.usefixtures("checked_elsewhere")
def test_an_export_that_was_being_replaced_is_put_back_and_a_folder_of_that_name_is_not_touched(
    saved, tmp_path, capsys
):
    directory, out, before = saved("dense"), tmp_path / "out", tmp_path / "out.replaced"
    before.mkdir()
    (before / "mine").write_text("mine")
    mot("export", directory, out)
    assert (before / "mine").read_text() == "mine"
    shutil.rmtree(before)
    (out / "README.md").write_text("the old one")
    out.rename(before)  # as a kill between the two renames leaves it
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, out)
    assert "exists already" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "the old one"
    assert not before.exists()


@pytest.mark.usefixtures("checked_elsewhere")
def test_a_card_names_a_text_whose_name_is_not_utf_8(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "card", lambda *args: os.fsdecode(b"trained on caf\xe9.txt"))
    mot("export", saved("dense"), tmp_path / "out")
    assert r"caf\udce9" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("checked_elsewhere")
def test_two_exports_to_one_directory_do_not_meet(saved, tmp_path, capsys):
    directory, out = saved("dense"), tmp_path / "out"
    with owned_file(out), pytest.raises(SystemExit, match="2"):
        mot("export", directory, out)
    assert f"{out} is being written by another process" in capsys.readouterr().err
    mot("export", directory, out)


@pytest.mark.usefixtures("checked_elsewhere")
def test_an_export_through_a_link_is_written_where_the_link_leads(saved, tmp_path, monkeypatch):
    directory, link = saved("dense"), tmp_path / "link"
    link.symlink_to("big")
    (tmp_path / "big").mkdir()  # empty, so nothing is replaced
    for flags in ([], ["--force"], ["--force"]):
        mot("export", directory, link, *flags)
        assert link.is_symlink()
        assert (tmp_path / "big" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "big")
    mot("export", directory, ".", "--force")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {directory.name, "link", "big"}


@pytest.mark.slow
def test_an_export_runs_no_code_from_where_it_is_called(saved, tmp_path, monkeypatch):
    directory = saved("dense")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "random.py").write_text("raise RuntimeError('mine')")
    monkeypatch.chdir(tmp_path / "here")
    mot("export", directory, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# What no architecture has without norms of queries and keys, and what would be legal.
REFUSED_UNNORMED = {
    "unnormed, sigmoid gates": ("sigmoid_choice", {}, "with sigmoid gates (STC-); softmax gates (TC-) can"),
    "unnormed, biases": ("token_choice", {"attention_bias": True}, "attention_bias must be false"),
    "unnormed, shared": ("token_choice", {"shared_experts": 1}, "shared_experts must be 0"),
    "unnormed, uneven": (
        "dense",
        {"num_attention_heads": 3},
        "hidden_size must be a multiple of num_attention_heads 3",
    ),
}
WITHOUT_EXPORT = ("expert_choice", "expert_threshold", "remoe", "soft_moe")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "mixture_of_tokens",
            "is no run directory, so its text is not known: a Mixture of Tokens is distilled on the text",
        ),
        ("uniform", "they cannot be exported; models that can are Transformer-, TC-, STC-, MoT-"),
        ("shared", "Qwen3-MoE, with softmax gates, has no shared experts: this model cannot be exported"),
        *((kind, f"{kind} layers are not in plain transformers: they cannot be exported") for kind in WITHOUT_EXPORT),
        ("plain", "plain feed-forwards (gated false) are not in Qwen3"),
        (
            "narrow",
            "moe_intermediate_size is 6: plain transformers multiplies experts by grouped_mm, which takes multiples",
        ),
        ("windows", "models whose attention has a sliding window cannot be exported; train without one"),
        *((given, message) for given, (_, _, message) in REFUSED_UNNORMED.items()),
        ("another order", "in Dots1 the first blocks are dense and all others sparse"),
        ("two gates", "softmax gates in some blocks and sigmoid gates in others are in no model of transformers"),
        ("top k of a dense model", "--top-k and --scores are for a Mixture of Tokens, and"),
        ("distillation of a dense model", "and so is --distil-steps; "),
        ("foreign tokenizer", "it is another model's"),
        ("transformers' own", "is a Qwen3ForCausalLM, which transformers loads without an export"),
        ("truncated", "cannot be loaded"),
        ("no tokenizer", "has no tokenizer beside the model"),
        ("a tokenizer of nothing", "has no tokenizer beside the model: "),
        ("half a tokenizer", "has no tokenizer beside the model: "),
        ("nowhere", "is no directory"),
        ("unwritable", "/proc/out cannot be written: No such file or directory; name another directory"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(given, message, saved, tmp_path, capsys):
    out = tmp_path / "out"
    if given == "plain":
        directory = saved("token_choice", gated=False, hidden_act="relu")
    elif given == "narrow":
        directory = saved("token_choice", moe_intermediate_size=6)
    elif given == "windows":
        directory = saved("token_choice", use_sliding_window=True, sliding_window=4)
    elif given in REFUSED_UNNORMED:
        kind, fields, _ = REFUSED_UNNORMED[given]
        directory = saved(kind, qk_norm=False, **fields)
    elif given == "another order":
        directory = saved("sigmoid_choice", mlp_layer_types=["sigmoid_choice", "dense", "sigmoid_choice"])
    elif given == "two gates":
        directory = saved("token_choice", mlp_layer_types=["dense", "token_choice", "sigmoid_choice"])
    elif given == "foreign tokenizer":
        directory = saved("token_choice", vocab_size=200)
    elif given == "shared":
        directory = saved("token_choice", shared_experts=1)
    elif given in ("mixture_of_tokens", "uniform", *WITHOUT_EXPORT):
        directory = saved(given)
    else:
        directory = saved("dense")
    if given == "transformers' own":
        to_plain(MixtureOfTokensForCausalLM.from_pretrained(directory)).save_pretrained(directory)
    elif given == "truncated":
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif given == "no tokenizer":
        for file in directory.glob("tokenizer*"):
            file.unlink()
    elif given == "a tokenizer of nothing":
        (directory / "tokenizer.json").write_text('{"added_tokens": []}')
    elif given == "half a tokenizer":
        whole = (directory / "tokenizer.json").read_text()
        (directory / "tokenizer.json").write_text(whole[: len(whole) // 2])
    elif given == "unwritable":
        out = Path("/proc/out")
    elif given == "nowhere":
        out = tmp_path / "missing" / "out"
    capsys.readouterr()
    words = ["--top-k", 2] if given.startswith("top k") else []
    words += ["--distil-steps", 5] if given.startswith("distillation") else []
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, out, *words)
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gated": False, "hidden_act": "relu"}, "plain feed-forwards (gated false) are not in Qwen3"),
        ({"hidden_size": 30, "head_dim": 8}, "hidden_size is 30: plain transformers multiplies experts by grouped_mm"),
        ({"use_sliding_window": True, "sliding_window": 4}, "models whose attention has a sliding window cannot be"),
        (
            {"shared_experts": 1, "mlp_layer_types": ["mixture_of_tokens", "dense", "mixture_of_tokens", "dense"]},
            "in Dots1 the first blocks are dense and all others sparse",
        ),
        ({"qk_norm": False, "attention_bias": True}, "attention_bias must be false"),
        ({"qk_norm": False, "shared_experts": 1}, "shared_experts must be 0"),
        ({"qk_norm": False}, "a Qwen2MoeForCausalLM cannot be written as GGUF here"),
    ],
    ids=["plain", "width", "window", "order", "biases", "shared", "gguf"],
)
def test_a_mixture_without_a_counterpart_is_refused_before_the_text_is_read(
    fields, message, tiny_runs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / ("out.gguf" if "GGUF" in message else "out")
    source = tiny_runs["MoT-Nano/4E/2"]
    config = load_model(str(source), device="cpu").config.to_dict() | fields
    model = MixtureOfTokensForCausalLM(MixtureOfTokensConfig.from_dict(config))
    monkeypatch.setattr(export_module, "load_model", lambda *args, **options: model)
    monkeypatch.setattr(export_module, "text_of", lambda run: pytest.fail("the text was read"))
    with pytest.raises(SystemExit, match="2"):
        mot("export", source, out)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_an_impossible_top_k_is_refused_before_the_text_is_read(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "text_of", lambda run: pytest.fail("the text was read"))
    with pytest.raises(SystemExit, match="2"):
        mot("export", tiny_runs["MoT-Nano/4E/2"], tmp_path / "out", "--top-k", 9)
    assert "--top-k must be 1 to 8, the number of experts, not 9" in capsys.readouterr().err


@pytest.mark.parametrize("command", [lambda run, out: export(run, out), lambda run, out: audit(run)])
def test_what_several_processes_would_all_do_is_for_one(command, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes would each do all of the work"):
        command(tiny_runs["TC-Nano/4E"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
