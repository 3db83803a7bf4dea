"""A GGUF file for llama.cpp from a model in transformers' own classes (`to_hf.to_plain`).

Dense models (Qwen3) become llama.cpp's architecture `qwen3`. Both sparse ones, Qwen3-MoE with softmax gates and Dots1
with sigmoid gates, become `dots1`: of llama.cpp's architectures it alone takes dense blocks before the sparse ones, the
function of the gates, and gates that are not normalised. `dots1` has as many heads of keys and values as of queries, so
fewer are repeated, and always a shared expert, which is zero where the model has none.

Without norms of queries and keys, Llama and Mixtral become `llama`, which rotates neighbouring elements of a head,
where transformers rotates those that are half a head apart: rows of queries and keys are put in that order.

Names and metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's src/llama-arch.cpp.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType, quants
from torch import Tensor
from transformers import Dots1Config, PreTrainedTokenizerFast

from mixture_of_tokens.settings.choices import Quantize

# By transformers' class, llama.cpp's name.
ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "dots1", "Dots1ForCausalLM": "dots1"}
ARCHITECTURES |= {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "llama"}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's enum llama_ftype
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NORMED = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
FEED_FORWARD = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
ROUTER = "ffn_gate_inp"


def architecture_for(kind: str) -> str:
    """llama.cpp's name for a class of transformers. Raises ValueError for one that is not written."""
    if kind not in ARCHITECTURES:
        can = ", ".join(ARCHITECTURES)
        raise ValueError(f"a {kind} cannot be written as GGUF here; models that can are {can}")
    return ARCHITECTURES[kind]


def check_convertible(plain: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError, naming the field, for a model or a tokenizer that llama.cpp would read as another."""
    config = plain.config
    architecture_for(type(plain).__name__)
    check_config(config)
    blocks, dense = _sparse(plain), config.num_hidden_layers - len(_sparse(plain))
    if blocks and blocks != list(range(dense, config.num_hidden_layers)):
        raise ValueError("in llama.cpp's dots1 the first blocks are dense and all others sparse: this model is not so")
    if max(getattr(config, "n_group", 1), getattr(config, "topk_group", 1)) > 1:
        raise ValueError("n_group and topk_group above 1 are not written as GGUF here")
    check_tokenizer(tokenizer)


def check_config(config: Any) -> None:
    """What is known of this library's models, too, before they are distilled. Raises ValueError, naming the field."""
    for field, value in {"hidden_act": "silu", "attention_bias": False}.items():
        if getattr(config, field, value) != value:
            raise ValueError(f"{field} {getattr(config, field)} is not in llama.cpp's architecture; it has {value}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise ValueError(f"rope_type {rope} is not written as GGUF here, only default")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError("a sliding window is not written as GGUF here")


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError for any but byte-level BPE that splits text as GPT-2's does, such as `mot train` makes."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json to write as GGUF")
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    model, before = written["model"], written["pre_tokenizer"] or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    if model["type"] != "BPE" or not plain or written["normalizer"] is not None or model.get("ignore_merges"):
        what = f"{model['type']} model, {before.get('type')} pre-tokenizer"
        normalized = "" if written["normalizer"] is None else f", {written['normalizer']['type']} normalizer"
        raise ValueError(
            f"this tokenizer ({what}{normalized}) is not written as GGUF here: only byte-level BPE that splits text "
            "as GPT-2's does, such as mot train makes; for others use llama.cpp's own converter on an export"
        )


@torch.no_grad()
def write_gguf(plain: Any, tokenizer: PreTrainedTokenizerFast, file: Path, quantize: Quantize, name: str) -> str:
    """Write the file, read it again, and return llama.cpp's name of the architecture.

    Args:
        quantize: type of the matrices. Vectors and routers, and matrices whose rows the blocks of a type do not divide
            (32 for q8_0 and q4_0), are f32.
        name: of the model, in the file's metadata.

    Raises ValueError as `check_convertible`, and where the file does not hold what was written.
    """
    check_convertible(plain, tokenizer)
    architecture = architecture_for(type(plain).__name__)
    writer = GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quantize])
    _add_sizes(writer, plain.config, architecture, _sparse(plain))
    _add_tokenizer(writer, tokenizer, plain.config)
    written = {}
    for tensor, values in _tensors(plain, architecture):
        kind = _type_of(tensor, values.shape, quantize)
        written[tensor] = quants.quantize(values, kind)
        writer.add_tensor(tensor, written[tensor], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_written(file, written)
    return architecture


def _check_written(file: Path, written: dict[str, np.ndarray]) -> None:
    found = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    for name in sorted({*written, *found}):
        wanted, read = written.get(name), found.get(name)
        if wanted is None or read is None or not np.array_equal(read.view(np.uint8), wanted.view(np.uint8)):
            raise ValueError(f"{file} does not hold what was written: {name} differs")


def quantized(plain: Any, quantize: Quantize) -> dict[str, Tensor]:
    """The weights of the model as the file has them: rounded to its types, by transformers' names."""
    weights = {}
    for name, value in plain.state_dict().items():
        kind = _type_of(ROUTER if name.endswith(".mlp.gate.weight") else name, value.shape, quantize)
        rounded = quants.dequantize(quants.quantize(value.float().numpy(), kind), kind)
        weights[name] = torch.from_numpy(rounded).view_as(value)
    return weights


def _type_of(name: str, shape: tuple[int, ...], quantize: Quantize) -> GGMLQuantizationType:
    kind = GGMLQuantizationType[quantize.upper()]
    if len(shape) < 2 or ROUTER in name or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F32
    return kind


def _sparse(plain: Any) -> list[int]:
    """The numbers of the sparse blocks."""
    return [i for i, block in enumerate(plain.model.layers) if hasattr(block.mlp, "experts")]


def _add_sizes(writer: GGUFWriter, config: Any, architecture: str, sparse: list[int]) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    heads_of_keys = config.num_attention_heads if architecture == "dots1" else config.num_key_value_heads
    writer.add_head_count_kv(heads_of_keys)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if sparse:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if sparse and architecture == "dots1":  # in `llama` an expert is a feed-forward, and gates are as Mixtral's
        sigmoid = isinstance(config, Dots1Config)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_leading_dense_block_count(sparse[0])
        writer.add_expert_shared_count(max(1, getattr(config, "n_shared_experts", 0)))
        writer.add_expert_weights_scale(getattr(config, "routed_scaling_factor", 1.0))
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, config: Any) -> None:
    """Byte-level BPE as GPT-2's. Rows of the embedding without a token get names that no text has."""
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"]: token["content"] for token in written["added_tokens"]}
    by_id = {index: token for token, index in written["model"]["vocab"].items()} | special
    ids = range(config.vocab_size)
    kinds = {True: TokenType.CONTROL, False: TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([kinds[i in special] if i in by_id else TokenType.UNUSED for i in ids])
    merges = written["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end: Any = tokenizer.eos_token_id
    begin: Any = tokenizer.bos_token_id
    pad: Any = tokenizer.pad_token_id
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end if begin is None else begin)  # llama.cpp's is 11
    writer.add_pad_token_id(end if pad is None else pad)
    writer.add_add_bos_token(False)


def _tensors(plain: Any, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names in GGUF, and fp32 values. Raises ValueError where a weight of the model would be left out."""
    left = {name: value.float().numpy() for name, value in plain.state_dict().items()}
    config, take = plain.config, left.pop
    for name, ours in OUTSIDE.items():
        yield f"{ours}.weight", take(f"{name}.weight")
    for i in range(config.num_hidden_layers):
        block, mlp = f"model.layers.{i}", f"model.layers.{i}.mlp"
        for name, ours in NORMS.items():
            yield f"blk.{i}.{ours}.weight", take(f"{block}.{name}.weight")
        for name, ours in (ATTENTION if architecture == "llama" else ATTENTION | NORMED).items():
            values = take(f"{block}.self_attn.{name}.weight")
            if architecture == "llama" and name in ("q_proj", "k_proj"):
                values = _neighbours_rotated(values, config.head_dim)
            if architecture == "dots1" and name in ("k_proj", "v_proj"):
                values = _for_every_head(values, config.num_attention_heads, config.num_key_value_heads)
            yield f"blk.{i}.{ours}.weight", values
        if f"{mlp}.gate.weight" not in left:
            for name, ours in FEED_FORWARD.items():
                yield f"blk.{i}.{ours}.weight", take(f"{mlp}.{name}.weight")
            continue
        yield f"blk.{i}.{ROUTER}.weight", take(f"{mlp}.gate.weight")
        if (bias := take(f"{mlp}.gate.e_score_correction_bias", None)) is not None:
            yield f"blk.{i}.exp_probs_b.bias", bias
        gate, up = np.split(take(f"{mlp}.experts.gate_up_proj"), 2, axis=1)
        experts = {"gate_proj": gate, "up_proj": up, "down_proj": take(f"{mlp}.experts.down_proj")}
        for name, ours in FEED_FORWARD.items():
            shared = take(f"{mlp}.shared_experts.{name}.weight", np.empty(0))
            yield f"blk.{i}.{ours}_exps.weight", np.ascontiguousarray(experts[name])
            if architecture == "dots1":
                yield f"blk.{i}.{ours}_shexp.weight", shared if shared.size else np.zeros_like(experts[name][0])
    if left:
        raise ValueError(f"GGUF has no place for {', '.join(sorted(left))}")


def _for_every_head(values: np.ndarray, heads: int, shared: int) -> np.ndarray:
    """Rows of `shared` heads, each repeated for the heads that read it."""
    each = values.reshape(shared, -1, values.shape[-1])
    return np.repeat(each, heads // shared, axis=0).reshape(-1, values.shape[-1])


def _neighbours_rotated(values: np.ndarray, width: int) -> np.ndarray:
    """Rows of heads of this width, whose element i then stands beside i + width / 2, with which it is rotated."""
    halves = values.reshape(-1, 2, width // 2, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
