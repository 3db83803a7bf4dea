"""A trained model for other software: the command `mot export`."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mixture_of_tokens.conversion.card import card, hub_card
from mixture_of_tokens.conversion.choice_of_top_k import Distilled, switch_and_distil
from mixture_of_tokens.conversion.distil import STEPS
from mixture_of_tokens.conversion.hub import serve_as_written, write_code
from mixture_of_tokens.conversion.switch import default_scores, token_choice_config
from mixture_of_tokens.conversion.to_hf import NONE_SHARED, architecture_of, to_plain
from mixture_of_tokens.conversion.verify import verify
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs.loading import load_model, load_tokenizer_of, run_directory, text_of, without_progress_bars
from mixture_of_tokens.runs.locking import owned_file
from mixture_of_tokens.settings.choices import Device, Format, Quantize, Scores
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.checks import at_least_one
from mixture_of_tokens.utils.files import disk_errors, no_directory, plain_errors, publish, published, replaced
from mixture_of_tokens.utils.formatting import Result
from mixture_of_tokens.utils.process import check_one_process

if TYPE_CHECKING:
    from mixture_of_tokens.conversion.verify_gguf import CheckedGguf

EXPORT = "export"  # the fact `of` in the manifest of one
ROWS = 8  # of text, that what is written is compared on


@dataclass(frozen=True)
class Exported(Result):
    """A model that other software loads.

    directory: that was written, of GGUF the file; architecture: as that software calls it.
    difference: the largest of a logit from the run's, or the switched model's, on `compared`; of GGUF of a log
        probability, None where no engine was asked.
    distilled: of a Mixture of Tokens, which was switched for the export. gguf: what was found of a GGUF file.
    """

    directory: str
    format: Format
    architecture: str
    parameters: int
    compared: str
    difference: float | None
    distilled: Distilled | None = None
    gguf: "CheckedGguf | None" = None

    def __str__(self) -> str:
        lines = [] if self.distilled is None else [str(self.distilled), ""]
        if self.gguf is not None:
            lines.append(f"{self.directory} is a GGUF file of architecture {self.architecture}. {self.gguf}")
            return "\n".join(lines)
        whose = "the run's" if self.distilled is None else "the switched model's"
        differ = f"Its logits on {self.compared} differ from {whose} by at most {self.difference:.1e}."
        code = " It brings its own code: transformers loads it with trust_remote_code=True." * (self.format == "hub")
        return "\n".join([*lines, f"{self.directory} is a {self.architecture}. {differ}{code}"])


class Switching(NamedTuple):
    """How a Mixture of Tokens is to become Token Choice."""

    top_k: int | None
    scores: Scores | None
    distil_steps: int | None


def export(
    run: str,
    out: Path,
    *,
    format: Format | None,
    quantize: Quantize | None,
    top_k: int | None,
    scores: Scores | None,
    distil_steps: int | None,
    license: str | None,
    force: bool,
    device: Device | None,
) -> Exported:
    """As the function of `commands/export.py`, which explains its arguments."""
    format = format or ("gguf" if out.suffix == ".gguf" else "transformers")
    check_one_process()
    if out.is_symlink() or out.name in ("", ".."):  # what it names is written, and needs a name
        out = out.resolve()
    at_least_one(top_k=top_k, distil_steps=distil_steps)
    _check_flags(format, quantize, scores, distil_steps, license)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: {out.absolute().parent} is no directory")
    if out.is_mount():  # what is complete is renamed to it
        raise ValueError(f"{out} is a mount point, and cannot be replaced: name a directory in it, as {out / 'model'}")
    if not Path(run).exists():
        raise ValueError(f"{run}: {no_directory(run)}")
    try:  # known before the distillation
        TemporaryDirectory(prefix=f"{out.name}.", dir=out.absolute().parent).cleanup()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}; name another directory") from None
    asked = Switching(top_k, scores, distil_steps)
    with owned_file(out, patience=0), without_progress_bars():
        if format == "gguf":
            _check_free_file(out, force)
            return _export_gguf(run, out, quantize or "f32", asked, device)
        _put_back(out)
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
        if taken and not force:
            raise ValueError(f"{out} exists already; name another directory, or replace an export with --force")
        if taken and not manifest.is_of(out, EXPORT):
            raise ValueError(f"{out} is no export of mot, so --force does not replace it; name another directory")
        if format == "hub":
            return _export_hub(run, out, top_k, license, device)
        return _export(run, out, asked, license, device)


def _check_flags(
    format: Format, quantize: Quantize | None, scores: Scores | None, distil_steps: int | None, license: str | None
) -> None:
    """Raises ValueError for what does nothing in this format."""
    if format == "hub" and (scores, distil_steps) != (None, None):
        raise ValueError(
            "--scores and --distil-steps are for models that are distilled, which --format hub does not do"
        )
    if format != "gguf" and quantize is not None:
        raise ValueError("--quantize is for --format gguf")
    if format == "gguf" and license is not None:
        raise ValueError("--license is for a model card, and a GGUF file has none")
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(f"--license {license}: give it as the Hub abbreviates it, such as apache-2.0 or mit")
    if format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ValueError('--format gguf needs the package gguf: pip install "mixture-of-tokens[gguf]"')


def _check_free_file(out: Path, force: bool) -> None:
    """Raises ValueError for a file that is not to be replaced."""
    if out.is_dir():
        raise ValueError(
            f"{out} is a directory, and a GGUF file is written: name a file in it, as {out / 'model.gguf'}"
        )
    if out.exists() and not force:
        raise ValueError(f"{out} exists already; name another file, or replace a GGUF file with --force")
    if out.exists() and not _is_gguf(out):
        raise ValueError(f"{out} is no GGUF file, so --force does not replace it; name another file")


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _put_back(out: Path) -> None:
    """Rename back an export that was being replaced by one that was killed."""
    before = replaced(out)
    if not out.exists() and manifest.is_of(before, EXPORT):
        before.rename(out)


def _loaded(run: str, device: Device | None) -> tuple[Any, Any]:
    """The model, in fp32, and its tokenizer. Raises ValueError where they do not belong together."""
    model, tokenizer = load_model(run, device=device).float(), load_tokenizer_of(run)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer beside {run} has {len(tokenizer)} tokens and the model {model.config.vocab_size}: it is "
            "another model's"
        )
    return model, tokenizer


def _switched(
    run: str, model: MixtureOfTokensForCausalLM, asked: Switching, check: Callable[[str], object] = str
) -> tuple[MixtureOfTokensForCausalLM, Distilled | None]:
    """A model that has a counterpart in transformers, on the CPU, and how a Mixture of Tokens became one.

    check: called with the name of its class there, before what takes long.

    Raises ValueError for flags of a Mixture of Tokens and another model, and for a mixture that cannot be switched.
    """
    if not any(routing.converts_to for routing in model.config.routings):
        _check_not_switched(run, asked)
        check(architecture_of(model.config))
        return model.cpu(), None
    if run_directory(run) is None:
        what = "a Mixture of Tokens is distilled on the text that it was trained on"
        raise ValueError(f"{run} is no run directory, so its text is not known: {what}")
    if model.config.shared_experts and model.config.qk_norm and asked.scores == "softmax":
        raise ValueError(f"--scores softmax: {NONE_SHARED}; --scores sigmoid, the default here, has them")
    how: dict[str, Any] = {"top_k": asked.top_k, "scores": asked.scores or default_scores(model.config)}
    check(architecture_of(token_choice_config(model.config, **how)))
    steps = asked.distil_steps or STEPS
    switched, distilled = switch_and_distil(model, text_of(run), **how, distil_steps=steps)
    return switched.cpu(), distilled


def _check_not_switched(run: str, asked: Switching) -> None:
    """Raises ValueError for flags of a Mixture of Tokens."""
    if any(each is not None for each in asked):
        raise ValueError(f"--top-k and --scores are for a Mixture of Tokens, and so is --distil-steps; {run} is none")


def _export(run: str, out: Path, asked: Switching, license: str | None, device: Device | None) -> Exported:
    model, tokenizer = _loaded(run, device)
    if not isinstance(model, MixtureOfTokensForCausalLM):
        raise ValueError(f"{run} is a {type(model).__name__}, which transformers loads without an export")
    model, distilled = _switched(run, model, asked)
    plain = to_plain(model)
    with _written(run, out, plain, tokenizer) as (beside, ids, what):
        difference = verify(run, model, type(plain), beside, ids, what)
        _finish(beside, out, card(run, model, plain, what, difference, license, distilled))
    kind = type(plain).__name__
    return Exported(str(out), "transformers", kind, plain.num_parameters(), what, difference, distilled)


def _export_hub(run: str, out: Path, top_k: int | None, license: str | None, device: Device | None) -> Exported:
    model, tokenizer = _loaded(run, device)
    if not isinstance(model, MixtureOfTokensForCausalLM):
        raise ValueError(f"{run} is a {type(model).__name__}, which transformers loads without code of its own")
    if not all(routing.causal for routing in model.config.routings):
        raise ValueError(f"{run} is not causal: it sees what it is to predict, and writes no text")
    losses = serve_as_written(run, model, top_k)
    model = model.cpu()
    with _written(run, out, model, tokenizer) as (beside, ids, what):
        write_code(beside, model)
        difference = verify(run, model, MixtureOfTokensForCausalLM, beside, ids, what)
        _finish(beside, out, hub_card(run, model, losses, license))
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    return Exported(str(out), "hub", kind, model.num_parameters(), what, difference)


@contextmanager
def _written(run: str, out: Path, model: Any, tokenizer: Any) -> Iterator[tuple[Path, Tensor, str]]:
    """Publish a folder with model and tokenizer; the block adds to it, or raises. Gives text to compare on, too."""
    tokenizer.model_max_length = model.config.max_position_embeddings
    ids, what = _text(run, model)
    beside = out.with_name(f".{out.name}.partial")  # no name that a user gives
    with published(beside, out):
        with plain_errors(out):
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            _write_config(beside)
        yield beside, ids, what


def _finish(beside: Path, out: Path, text: str) -> None:
    with disk_errors(out):
        manifest.write(beside, of=EXPORT)
        # Which people edit. It names the text, whose name may be no UTF-8.
        (beside / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _export_gguf(run: str, out: Path, quantize: Quantize, asked: Switching, device: Device | None) -> Exported:
    from mixture_of_tokens.conversion.to_gguf import architecture_for, check_config, check_tokenizer, write_gguf
    from mixture_of_tokens.conversion.verify_gguf import check_gguf

    model, tokenizer = _loaded(run, device)
    check_config(model.config)  # before the distillation
    check_tokenizer(tokenizer)
    if isinstance(model, MixtureOfTokensForCausalLM):
        switched, distilled = _switched(run, model, asked, architecture_for)
        plain = to_plain(switched)
    else:  # written by an earlier export
        _check_not_switched(run, asked)
        plain, distilled = model.cpu(), None
    ids, what = _text(run, plain)
    beside = out.with_name(f".{out.name}.partial")
    try:
        with plain_errors(out):
            architecture = write_gguf(plain, tokenizer, beside, quantize, name=Path(run).absolute().name)
        found = check_gguf(plain, tokenizer, beside, ids, quantize)
        publish(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    parameters = plain.num_parameters()
    return Exported(str(out), "gguf", architecture, parameters, what, found.difference, distilled, found)


def _write_config(directory: Path) -> None:
    """Both names of the number of experts: transformers writes one, other software reads the other."""
    written = json.loads((directory / "config.json").read_text())
    count = written.get("num_experts", written.get("num_local_experts"))
    if count is not None:
        written |= {"num_experts": count, "num_local_experts": count}
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    settings = {key: written.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**settings).save_pretrained(directory)


def _text(run: str, model: Any) -> tuple[Tensor, str]:
    """Token ids (rows, T) to compare logits on, and what they are."""
    length = model.config.max_position_embeddings
    try:
        blocks = text_of(run).validation
    except (ValueError, OSError):  # its text, or what its tokenizer came from, is not here
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (ROWS, min(256, length)), generator=generator), "random tokens"
    return blocks.batch(np.arange(min(ROWS, len(blocks))))["input_ids"], "validation text"
