"""`mot export --format gguf`: llama.cpp itself computes from the file, where its wheel is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Dots1Config,
    Dots1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from mixture_of_tokens import MixtureOfTokensForCausalLM, export
from mixture_of_tokens.conversion import export as export_module
from mixture_of_tokens.conversion import to_gguf, verify_gguf
from mixture_of_tokens.conversion.to_hf import to_plain
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from processes import finish, mot, mot_on_a_full_disk, start

MIXED = "MoT-Nano/4E/2"
MIXTRAL = {"qk_norm": False, "norm_topk_prob": True, "mlp_layer_types": ["token_choice"] * 3}
with_engine = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp")


def model_of(kind: str, **fields) -> MixtureOfTokensForCausalLM:
    """All sizes differ, 32 divides rows of some matrices, and there are fewer heads of keys than of queries."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 20, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 48}
    own = {"num_experts": 6, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", kind, kind]}
    torch.manual_seed(0)
    model = MixtureOfTokensForCausalLM(
        MixtureOfTokensConfig(**{"vocab_size": 512, "capacity_factor": None} | sizes | heads | own | fields)
    )
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1 + 0.3 * torch.randn_like(value)) if value.dim() == 1 else value.mul_(3)
    return model.eval()


@pytest.fixture
def saved(beside_a_tokenizer):
    return lambda kind, **fields: beside_a_tokenizer(kind, model_of(kind, **fields))


@pytest.fixture
def without_engine(monkeypatch) -> None:
    monkeypatch.setattr(verify_gguf, "ENGINE", "xllamacpp_is_not_here")


@with_engine
@pytest.mark.parametrize(
    ("kind", "fields", "architecture"),
    [
        pytest.param("dense", {"tie_word_embeddings": True}, "qwen3", marks=pytest.mark.slow),
        ("token_choice", {"router_temperature": 0.5}, "dots1"),
        pytest.param(
            *("token_choice", {"norm_topk_prob": True, "tie_word_embeddings": True}, "dots1"), marks=pytest.mark.slow
        ),
        pytest.param("sigmoid_choice", {"shared_experts": 2}, "dots1", marks=pytest.mark.slow),
        pytest.param(
            *("sigmoid_choice", {"norm_topk_prob": True, "num_key_value_heads": 4}, "dots1"), marks=pytest.mark.slow
        ),
        pytest.param("dense", {"qk_norm": False, "tie_word_embeddings": True}, "llama", marks=pytest.mark.slow),
        pytest.param("token_choice", MIXTRAL, "llama", marks=pytest.mark.slow),
    ],
    ids=["dense", "token_choice", "normalised", "shared", "sigmoid", "llama", "mixtral"],
)
def test_llama_cpp_computes_the_same_from_the_file(kind, fields, architecture, saved, tmp_path):
    made = export(saved(kind, **fields), tmp_path / "model.gguf", device="cpu")
    assert (made.format, made.architecture) == ("gguf", architecture)
    found = made.gguf
    assert found is not None
    assert found.engine is not None
    assert found.engine.startswith("llama.cpp")
    assert found.difference is not None
    assert 0 < found.difference < 1e-4
    assert found.greedy == (found.greedy[1],) * 2
    assert found.greedy[1] > 200
    assert found.lines == (50, 50)
    assert found.positions > 300
    assert found.loss_of_file == pytest.approx(found.loss, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model.gguf", f"saved-{kind}"])


@with_engine
@pytest.mark.parametrize(
    ("fields", "named"),
    [({}, "_for_every_head"), pytest.param(MIXTRAL, "_neighbours_rotated", marks=pytest.mark.slow)],
    ids=["dots1", "llama"],
)
def test_a_wrong_reading_is_noticed_by_the_engine_and_leaves_nothing(
    fields, named, saved, tmp_path, monkeypatch, capsys
):
    """The control: rows of queries and keys in another order, which reading the file back cannot tell."""
    directory, right = saved("token_choice", **fields), getattr(to_gguf, named)
    capsys.readouterr()
    monkeypatch.setattr(to_gguf, named, lambda values, *sizes: right(values, *sizes)[::-1].copy())
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "model.gguf")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "llama.cpp reads another model" in shown
    assert not list(tmp_path.glob("*model.gguf*"))


@with_engine
def test_a_file_that_llama_cpp_cannot_use_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    questions = {"rows": [[1, 2]], "lines": [], "prompt": 1, "new": 1, "forced": 1, "vocab_size": 4, "threads": 1}
    with pytest.raises(ValueError, match=r"llama\.cpp cannot use the file") as raised:
        verify_gguf.answers_of(tmp_path / "model.gguf", questions)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("quantize", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.usefixtures("without_engine")
def test_types_of_tensors_and_the_loss_of_a_quantised_file(quantize, saved, tmp_path):
    made = export(saved("token_choice"), tmp_path / "model.gguf", quantize=quantize, device="cpu")
    found = made.gguf
    assert found is not None
    assert (found.engine, found.difference, found.greedy) == (None, None, None)
    assert (found.loss_of_file == found.loss) == (quantize == "f32")
    assert found.loss_of_file == pytest.approx(found.loss, rel=0.05)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    wanted = quantize.upper()
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.attn_norm.weight"] == "F32"  # a router, a vector
    assert kinds["token_embd.weight"] == kinds["blk.2.ffn_gate_exps.weight"] == wanted
    assert kinds["blk.2.ffn_down_exps.weight"] == ("F16" if quantize == "f16" else "F32")  # 32 does not divide 20


@pytest.mark.usefixtures("without_engine")
def test_reading_back_notices_a_flipped_byte(tmp_path, tiny_runs):
    plain = to_plain(model_of("token_choice"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model")
    file, written = tmp_path / "model.gguf", {}
    to_gguf.write_gguf(plain, tokenizer, file, "q8_0", "model")
    written = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    to_gguf._check_written(file, written)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="does not hold what was written"):
        to_gguf._check_written(file, written)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache", "without_engine")
def test_a_mixture_of_tokens_is_switched_first(tiny_runs, tmp_path, capsys):
    mot("export", tiny_runs[MIXED], tmp_path / "model.gguf", "--top-k", 2, "--distil-steps", 5, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["architecture"] == "dots1"
    assert shown["distilled"]["chosen"]["top_k"] == 2
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["dots1.expert_used_count"].contents() == 2
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"


@pytest.mark.usefixtures("without_engine")
def test_an_earlier_export_gives_the_same_tensors_as_the_run(saved, tmp_path, monkeypatch):
    directory = saved("sigmoid_choice")
    monkeypatch.setattr(export_module, "verify", lambda *given: 0.0)  # as test_export.py has it
    export(directory, tmp_path / "plain", device="cpu")
    for name, source in {"a": directory, "b": tmp_path / "plain"}.items():
        export(source, tmp_path / f"{name}.gguf", device="cpu")
    a, b = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in "ab")
    assert [tensor.name for tensor in a] == [tensor.name for tensor in b]
    assert all(np.array_equal(one.data, other.data) for one, other in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.usefixtures("without_engine")
def test_an_export_of_before_has_no_shared_expert_and_becomes_the_same_file(tiny_runs, tmp_path):
    plain = to_plain(model_of("sigmoid_choice"))
    config = Dots1Config.from_dict(plain.config.to_dict() | {"n_shared_experts": 0})
    before = Dots1ForCausalLM(config).eval()
    weights = {name: value for name, value in plain.state_dict().items() if "shared_experts" not in name}
    before.load_state_dict({name: value for name, value in before.state_dict().items() if not value.numel()} | weights)
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, plain(ids).logits)  # bit for bit
    tokenizer, written = AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model"), []
    for model in (plain, before):
        model.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(tmp_path / "folder")
        export(tmp_path / "folder", tmp_path / "model.gguf", device="cpu", force=True)
        written.append((tmp_path / "model.gguf").read_bytes())
    assert written[0] == written[1]


@pytest.mark.usefixtures("without_engine")
def test_what_exists_is_replaced_only_by_force_and_only_a_gguf_file(saved, tmp_path, capsys):
    directory, out = saved("dense"), tmp_path / "model.gguf"
    out.write_text("mine")
    for words, message in (((), "exists already"), (("--force",), "is no GGUF file")):
        with pytest.raises(SystemExit, match="2"):
            mot("export", directory, out, *words)
        assert message in capsys.readouterr().err
        assert out.read_text() == "mine"
    out.unlink()
    mot("export", directory, out)
    before = out.read_bytes()
    mot("export", directory, out, "--force")
    assert out.read_bytes() == before
    assert out.stat().st_mode & 0o044 == (directory / "config.json").stat().st_mode & 0o044


@pytest.mark.usefixtures("tiny_cache")
def test_a_full_disk_is_one_line_and_leaves_nothing(saved, tmp_path):
    words = ["export", str(saved("dense")), str(tmp_path / "out.gguf")]
    assert finish(start(mot_on_a_full_disk, 50_000, *words, log=tmp_path / "log")) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("mot: error:")
    assert "could not be written" in last
    assert not list(tmp_path.glob("*out.gguf*"))


def unusual(kind: str) -> PreTrainedTokenizerFast:
    if kind == "WordLevel":
        made = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    else:
        made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind != "whole")
    if kind == "Lowercase":
        made.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["WordLevel", "prefix", "whole", "Lowercase"])
def test_another_tokenizer_is_refused_by_name(kind, saved, tmp_path, capsys):
    directory = saved("dense")
    unusual(kind).save_pretrained(directory)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "model.gguf")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "byte-level BPE" in shown
    assert {"WordLevel": "WordLevel", "Lowercase": "Lowercase"}.get(kind, "ByteLevel") in shown
    assert not list(tmp_path.glob("*model.gguf*"))


@pytest.mark.parametrize(
    ("kind", "fields", "words", "message"),
    [
        ("remoe", {}, [], "remoe layers are not in plain transformers"),
        ("dense", {}, ["--top-k", 2], "--top-k and --scores are for a Mixture of Tokens"),
        ("dense", {}, ["--license", "mit"], "--license is for a model card"),
        ("dense", {"attention_bias": True}, [], "attention_bias"),
        ("mixture_of_tokens", {"attention_bias": True}, [], "attention_bias"),  # before text is asked for
        ("token_choice", {"mlp_layer_types": ["token_choice", "dense", "token_choice"]}, [], "first blocks are dense"),
        ("token_choice", {"qk_norm": False}, [], "a Qwen2MoeForCausalLM cannot be written as GGUF here"),
    ],
    ids=["routing", "top_k", "license", "bias", "bias of a mixture", "order", "qwen2_moe"],
)
@pytest.mark.usefixtures("without_engine")
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(kind, fields, words, message, saved, tmp_path, capsys):
    directory = saved(kind, **fields)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        mot("export", directory, tmp_path / "model.gguf", *words)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown
    assert not list(tmp_path.glob("*model.gguf*"))


def test_flags_of_another_format_are_refused(saved, tmp_path, monkeypatch):
    directory = saved("dense")
    with pytest.raises(ValueError, match="quantize is for format gguf"):
        export(directory, tmp_path / "out", quantize="q8_0")
    with pytest.raises(ValueError, match="is a directory"):
        export(directory, tmp_path, format="gguf")
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mixture-of-tokens\[gguf\]"):
        export(directory, tmp_path / "out.gguf")


def test_a_model_of_another_architecture_is_refused(tiny_runs, tmp_path, capsys):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=512)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SystemExit, match="2"):
        mot("export", tmp_path / "gpt2", tmp_path / "model.gguf")
    assert "GPT2LMHeadModel cannot be written as GGUF" in capsys.readouterr().err
    assert not list(tmp_path.glob("*model.gguf*"))


def test_the_engine_s_program_needs_numpy_alone():
    code = "import sys, runpy; sys.modules |= {'torch': None, 'mixture_of_tokens': None}; runpy.run_path(sys.argv[1])"
    file = verify_gguf.llama_cpp.__file__
    subprocess.run([sys.executable, "-P", "-c", code, file], check=True, capture_output=True)
