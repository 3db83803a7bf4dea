"""A trained model as a checkpoint of plain transformers, Qwen3-MoE, Dots1 or Qwen3: the command `mot export`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mixture_of_tokens import manifest
from mixture_of_tokens.checks import at_least_one, checked
from mixture_of_tokens.convert.card import card
from mixture_of_tokens.convert.distil import STEPS
from mixture_of_tokens.convert.distilled import Distilled, switch_and_distil
from mixture_of_tokens.convert.plain import NONE_SHARED, check_exportable, to_plain
from mixture_of_tokens.convert.switch import Scores, default_scores, token_choice_config
from mixture_of_tokens.convert.verify import verify
from mixture_of_tokens.disk import disk_errors, plain_errors, published, replaced
from mixture_of_tokens.formatting import Result
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.model.placement import Device
from mixture_of_tokens.process import check_one_process
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of, run_directory, text_of, without_progress_bars
from mixture_of_tokens.runs.ownership import owned_file

EXPORT = "export"  # the fact `of` in the manifest of one
ROWS = 4


@dataclass(frozen=True)
class Exported(Result):
    """A checkpoint of plain transformers.

    difference: the largest of a logit from the run's, or the switched model's, on `compared`.
    distilled: of a Mixture of Tokens, which was switched for the export.
    """

    directory: str
    architecture: str
    parameters: int
    compared: str
    difference: float
    distilled: Distilled | None = None

    def __str__(self) -> str:
        whose = "the run's" if self.distilled is None else "the switched model's"
        differ = f"Its logits on {self.compared} differ from {whose} by at most {self.difference:.1e}."
        lines = [] if self.distilled is None else [str(self.distilled), ""]
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
    check_one_process()
    if out.is_symlink() or out.name in ("", ".."):  # what it names is written, and needs a name
        out = out.resolve()
    at_least_one(top_k=top_k, distil_steps=distil_steps)
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(f"--license {license}: give it as the Hub abbreviates it, such as apache-2.0 or mit")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: {out.absolute().parent} is no directory")
    if out.is_mount():  # what is complete is renamed to it
        raise ValueError(f"{out} is a mount point, and cannot be replaced: name a directory in it, as {out / 'model'}")
    if not Path(run).exists():
        raise ValueError(f"{run}: there is no such directory")
    try:  # known before the distillation
        TemporaryDirectory(prefix=f"{out.name}.", dir=out.absolute().parent).cleanup()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}; name another directory") from None
    with owned_file(out, patience=0), without_progress_bars():
        _put_back(out)
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
        if taken and not force:
            raise ValueError(f"{out} exists already; name another directory, or replace an export with --force")
        if taken and not manifest.is_of(out, EXPORT):
            raise ValueError(f"{out} is no export of mot, so --force does not replace it; name another directory")
        return _export(run, out, top_k, scores, distil_steps, license, device)


def _put_back(out: Path) -> None:
    """Rename back an export that was being replaced by one that was killed."""
    before = replaced(out)
    if not out.exists() and manifest.is_of(before, EXPORT):
        before.rename(out)


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
    distilled = None
    if any(routing.converts_to for routing in model.config.routings):
        if run_directory(run) is None:
            what = "a Mixture of Tokens is distilled on the text that it was trained on"
            raise ValueError(f"{run} is no run directory, so its text is not known: {what}")
        if model.config.shared_experts and scores == "softmax":
            raise ValueError(f"--scores softmax: {NONE_SHARED}; --scores sigmoid, the default here, has them")
        scores = scores or default_scores(model.config)
        check_exportable(token_choice_config(model.config, top_k=top_k, scores=scores))  # before the distillation
        model, distilled = switch_and_distil(
            model, text_of(run), top_k=top_k, scores=scores, distil_steps=distil_steps or STEPS
        )
    elif (top_k, scores, distil_steps) != (None, None, None):
        raise ValueError(f"--top-k and --scores are for a Mixture of Tokens, and so is --distil-steps; {run} is none")
    model = model.cpu()
    plain = to_plain(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    ids, what = _text(run, model)
    beside = out.with_name(f".{out.name}.partial")  # no name that a user gives
    with published(beside, out):
        with plain_errors(out):
            plain.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            _write_config(beside)
        difference = verify(run, model, type(plain), beside, ids, what)
        with disk_errors(out):
            manifest.write(beside, of=EXPORT)
            text = card(run, model, plain, what, difference, license, distilled)
            # Which people edit. It names the text, whose name may be no UTF-8.
            (beside / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    return Exported(str(out), type(plain).__name__, plain.num_parameters(), what, difference, distilled)


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
