"""A trained model as a checkpoint of plain transformers, Qwen3-MoE, Dots1 or Qwen3: the command `mot export`."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixture_of_tokens import manifest
from mixture_of_tokens.checks import at_least_one, checked
from mixture_of_tokens.convert.card import card
from mixture_of_tokens.convert.distil import STEPS
from mixture_of_tokens.convert.serving import Served, serve
from mixture_of_tokens.convert.switch import Scores, default_scores, token_choice_config
from mixture_of_tokens.disk import disk_errors, plain_errors, publish
from mixture_of_tokens.formatting import Result
from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.model.placement import Device
from mixture_of_tokens.model.routings import BY_PREFIX, MIXTURE
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of, run_directory, text_of
from mixture_of_tokens.runs.ownership import owned_file
from mixture_of_tokens.sparse import SigmoidChoice, TokenChoice

EXPORT = "export"  # the fact `of` in the manifest of one
TOLERANCE = 1e-5  # of a logit, times the logits' standard deviation where that is above 1
ROWS = 4
# Fields of our configuration that all three have under the same name.
COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OF_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob")
NONE_SHARED = "Qwen3-MoE, with softmax gates, has no shared experts"

# Run by `in_plain_transformers` on the directory and the files of ids and of logits.
CHECK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, given, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    save_file({"logits": model(load_file(given)["ids"]).logits.contiguous()}, found)
"""


@dataclass(frozen=True)
class Exported(Result):
    """A checkpoint of plain transformers.

    difference: the largest of a logit from the run's, or the switched model's, on `compared`.
    served: of a Mixture of Tokens, which was switched for the export.
    """

    directory: str
    architecture: str
    parameters: int
    compared: str
    difference: float
    served: Served | None = None

    def __str__(self) -> str:
        whose = "the run's" if self.served is None else "the switched model's"
        differ = f"Its logits on {self.compared} differ from {whose} by at most {self.difference:.1e}."
        lines = [] if self.served is None else [str(self.served), ""]
        return "\n".join([*lines, f"{self.directory} is a {self.architecture}. {differ}"])


@checked
def export(
    run: str | Path,
    out: Path,
    *,
    top_k: int | None = None,
    scores: Scores | None = None,
    distil_steps: int | None = None,
    license: str | None = None,
    force: bool = False,
    device: Device | None = None,
) -> Exported:
    """Write a model as plain transformers: as Qwen3-MoE, with sigmoid gates as Dots1, a dense one as Qwen3.

    A Mixture of Tokens is switched to Token Choice first: each sparse layer is distilled, on text that the run was
    trained on, into one of which a token needs only a few experts. No training follows. At Nano it takes two to three
    minutes of two idle cores.

    Every weight that was written is compared with the run's, or with the switched model's. Another process, which
    cannot import this library, loads the directory and computes logits. If they differ by more than rounding, the
    directory is removed.

    Args:
        run: A run directory or a checkpoint.
        out: The directory to write.
        top_k: Of a Mixture of Tokens, experts that a token goes to. By default the granularity, half of it and a
            quarter are tried, and the fewest with a loss at most 0.01 above the lowest of the three are written.
        scores: Of a Mixture of Tokens, gates of the exported model: softmax over the experts, the default (Qwen3-MoE),
            or a sigmoid each (Dots1), the default for a model with shared experts.
        distil_steps: Of a Mixture of Tokens, steps of distillation for each layer, by default 2,000; a model that was
            trained longer may need more.
        license: The licence that the model card names, as the Hub abbreviates it, such as apache-2.0.
        force: Replace an earlier export.
        device: cpu or cuda; by default cuda where there is one.

    Raises ValueError for layers without a counterpart in plain transformers, and for a checkpoint of another model.
    """
    run, out = str(run), Path(out)
    if out.is_symlink() or out.name in ("", ".."):  # what it names is written, and needs a name
        out = out.resolve()
    at_least_one(top_k=top_k, distil_steps=distil_steps)
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(f"--license {license}: give it as the Hub abbreviates it, such as apache-2.0 or mit")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: {out.absolute().parent} is no directory")
    if not Path(run).exists():
        raise ValueError(f"{run}: there is no such directory")
    try:  # known before the distillation
        TemporaryDirectory(prefix=f"{out.name}.", dir=out.absolute().parent).cleanup()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}; name another directory") from None
    with owned_file(out, patience=0):
        checkpoints.put_back(out, EXPORT)
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
        if taken and not force:
            raise ValueError(f"{out} exists already; name another directory, or replace an export with --force")
        if taken and not checkpoints.is_described(out, EXPORT):
            raise ValueError(f"{out} is no export of mot, so --force does not replace it; name another directory")
        return _export(run, out, top_k, scores, distil_steps, license, device)


def _export(
    run: str,
    out: Path,
    top_k: int | None,
    scores: Scores | None,
    distil_steps: int | None,
    license: str | None,
    device: Device | None,
) -> Exported:
    model, tokenizer = load_model(run, device=device).float(), load_tokenizer_of(run)
    if not isinstance(model, MixtureOfTokensForCausalLM):
        raise ValueError(f"{run} is a {type(model).__name__}, which transformers loads without an export")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer beside {run} has {len(tokenizer)} tokens and the model {model.config.vocab_size}: it is "
            "another model's"
        )
    served = None
    if any(routing.converts_to for routing in model.config.routings):
        if run_directory(run) is None:
            what = "a Mixture of Tokens is distilled on the text that it was trained on"
            raise ValueError(f"{run} is no run directory, so its text is not known: {what}")
        if model.config.shared_experts and scores == "softmax":
            raise ValueError(f"--scores softmax: {NONE_SHARED}; --scores sigmoid, the default here, has them")
        scores = scores or default_scores(model.config)
        check_exportable(token_choice_config(model.config, top_k=top_k, scores=scores))  # before the distillation
        model, served = serve(model, text_of(run), top_k=top_k, scores=scores, distil_steps=distil_steps or STEPS)
    elif (top_k, scores, distil_steps) != (None, None, None):
        raise ValueError(f"--top-k and --scores are for a Mixture of Tokens, and so is --distil-steps; {run} is none")
    model = model.cpu()
    plain = to_plain(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    ids, what = _text(run, model)
    beside = out.with_name(f".{out.name}.partial")  # no name that a user gives
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with plain_errors(out):
            plain.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            _write_config(beside)
        not_the_same = f"the checkpoint written from {run} is not the same model, and was removed"
        with _nothing_shared():
            written = type(plain).from_pretrained(beside, dtype=torch.float32)
        if (name := different_weight(model, written)) is not None:
            raise ValueError(f"{not_the_same}: {name} is not the run's")
        print("Comparing logits with plain transformers', in another process", file=sys.stderr)
        difference, scale = compare_logits(model, beside, ids)
        allowed = TOLERANCE * max(1.0, scale)
        if not difference <= allowed:
            much = f"logits on {what} differ by up to {difference:.1e}, and {allowed:.1e} is allowed"
            raise ValueError(f"{not_the_same}: {much}")
        with disk_errors(out):
            manifest.write(beside, of=EXPORT)
            text = card(run, model, plain, what, difference, license, served)
            # Which people edit. It names the text, whose name may be no UTF-8.
            (beside / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        publish(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(str(out), type(plain).__name__, plain.num_parameters(), what, difference, served)


def to_plain(model: MixtureOfTokensForCausalLM) -> Any:
    """The same model in transformers' own classes. Raises ValueError as `check_exportable`."""
    config = model.config
    check_exportable(config)
    common = {field: getattr(config, field) for field in COMMON if hasattr(config, field)}
    common["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = {routing.exports_as for routing in config.sparse_routings}
    if not kinds:
        plain: Any = Qwen3ForCausalLM(Qwen3Config(**common, use_sliding_window=False, layer_types=None))
    elif kinds == {"Dots1ForCausalLM"}:
        plain = _dots1(config, common)
    else:
        plain = _qwen3_moe(config, common)
    empty = {name: value for name, value in plain.state_dict().items() if not value.numel()}  # of no shared experts
    plain.load_state_dict(plain_weights(model) | empty)
    return plain.eval()


def check_exportable(config: MixtureOfTokensConfig) -> None:
    """Raises ValueError, naming an alternative, for a model that has no counterpart in transformers."""
    if ours := {routing.kind for routing in config.routings if routing.exports_as is None}:
        can = [*(f"{prefix}-" for prefix, row in BY_PREFIX.items() if row.exports_as), f"{MIXTURE.prefix}-"]
        raise ValueError(
            f"{', '.join(sorted(ours))} layers are not in plain transformers: they cannot be exported; models that can "
            f"are {', '.join(can)}"
        )
    if config.sliding_window is not None:
        raise ValueError("models whose attention has a sliding window cannot be exported; train without one")
    if not config.gated:
        raise ValueError("plain feed-forwards (gated false) are not in Qwen3; train with the default, gated ones")
    for field in ("hidden_size", "moe_intermediate_size"):
        if config.sparse_routings and (width := getattr(config, field)) % 4:
            what = "plain transformers multiplies experts by grouped_mm, which takes multiples of 4 in fp32"
            raise ValueError(f"{field} is {width}: {what}")
    kinds = {routing.exports_as for routing in config.sparse_routings}
    if len(kinds) > 1:
        raise ValueError("softmax gates in some blocks and sigmoid gates in others are in no model of transformers")
    dense = len(config.routings) - len(config.sparse_routings)
    if kinds == {"Dots1ForCausalLM"} and any(routing.sparse for routing in config.routings[:dense]):
        raise ValueError("in Dots1 the first blocks are dense and all others sparse; this model has another order")
    if kinds == {"Qwen3MoeForCausalLM"} and config.shared_experts:
        raise ValueError(f"{NONE_SHARED}: this model cannot be exported; with sigmoid gates (STC-) it could, as Dots1")


def _qwen3_moe(config: MixtureOfTokensConfig, common: dict[str, Any]) -> Any:
    experts = {field: getattr(config, field) for field in OF_EXPERTS}
    # Upstream's loss is not divided by the number of choices.
    experts["router_aux_loss_coef"] = config.router_aux_loss_coef / config.num_experts_per_tok
    experts |= {"mlp_only_layers": config.mlp_only_layers, "decoder_sparse_step": config.decoder_sparse_step}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, use_sliding_window=False))


def _dots1(config: MixtureOfTokensConfig, common: dict[str, Any]) -> Any:
    dense = len(config.routings) - len(config.sparse_routings)
    experts = {"n_routed_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    experts |= {"moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob}
    alone = {"n_shared_experts": config.shared_experts, "n_group": 1, "topk_group": 1, "sliding_window": None}
    with _nothing_shared():
        return Dots1ForCausalLM(Dots1Config(**common, **experts, **alone, first_k_dense_replace=dense))


@contextmanager
def _nothing_shared() -> Iterator[None]:
    """Dots1 has shared experts; where we have none, torch warns that there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        yield


def plain_weights(model: MixtureOfTokensForCausalLM) -> dict[str, Tensor]:
    """The model's weights by transformers' names, which are its own; plain routers have no temperature."""
    named = model.named_parameters(remove_duplicate=False)  # both names of tied embeddings
    weights = {
        name.replace(".shared_experts.", ".mlp.shared_experts."): value.detach().clone()
        for name, value in named
        if "log_temperature" not in name
    }
    for i, block in enumerate(model.model.layers):
        gate = f"model.layers.{i}.mlp.gate"
        if isinstance(block.mlp, TokenChoice):
            weights[f"{gate}.weight"] /= block.mlp.gate.temperature.detach()
        if isinstance(block.mlp, SigmoidChoice):
            weights[f"{gate}.e_score_correction_bias"] = block.mlp.selection_bias.detach().clone()
    return weights


def different_weight(model: MixtureOfTokensForCausalLM, plain: Any) -> str | None:
    """The name of a weight that is not exactly the model's. Logits of a few rows do not involve every expert."""
    expected = plain_weights(model)
    found = {name: value for name, value in plain.state_dict().items() if value.numel()}
    names = sorted({*expected, *found})
    return next((name for name in names if not _equal(expected.get(name), found.get(name))), None)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _write_config(directory: Path) -> None:
    """Both names of the number of experts: transformers writes one, other software reads the other."""
    written = json.loads((directory / "config.json").read_text())
    count = written.get("num_experts", written.get("num_local_experts"))
    if count is not None:
        written |= {"num_experts": count, "num_local_experts": count}
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    settings = {key: written.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**settings).save_pretrained(directory)


def _text(run: str, model: MixtureOfTokensForCausalLM) -> tuple[Tensor, str]:
    """Token ids (rows, T) to compare logits on, and what they are."""
    length = model.config.max_position_embeddings
    try:
        blocks = text_of(run).validation
    except (ValueError, OSError):  # its text, or what its tokenizer came from, is not here
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (ROWS, min(256, length)), generator=generator), "random tokens"
    return blocks.batch(np.arange(min(ROWS, len(blocks))))["input_ids"], "validation text"


def compare_logits(model: Any, directory: Path, ids: Tensor) -> tuple[float, float]:
    """The largest difference of a model's logits from plain transformers', and their standard deviation.

    Raises ValueError where transformers cannot load the directory.
    """
    given, found = directory / "given.safetensors", directory / "found.safetensors"
    try:
        with plain_errors(directory):
            save_file({"ids": ids.contiguous()}, given)
        in_plain_transformers(CHECK, str(directory), str(given), str(found))
        with torch.no_grad():
            logits = model(ids).logits
        return float((load_file(found)["logits"] - logits).abs().max()), float(logits.std())
    finally:
        given.unlink(missing_ok=True)
        found.unlink(missing_ok=True)


def in_plain_transformers(code: str, *words: str) -> str:
    """What a program prints in another process, which cannot import this package.

    Raises ValueError with the last line of its errors where it fails.
    """
    alone = f"import sys\nsys.modules['mixture_of_tokens'] = None\n{code}"
    done = subprocess.run([sys.executable, "-P", "-c", alone, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"plain transformers cannot load what was written: {last}")
    return done.stdout
