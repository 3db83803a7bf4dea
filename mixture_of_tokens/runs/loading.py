"""A trained model, its tokenizer and its text, by run directory, checkpoint or Hub name."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.data.tokenizer import refuse
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.placement import COPIES, Placement, check_device
from mixture_of_tokens.parallel.sharding import shard_model
from mixture_of_tokens.runs import checkpoints, records
from mixture_of_tokens.runs.records import RunConfig, RunFacts
from mixture_of_tokens.settings.choices import Device, Dtype
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.files import no_directory
from mixture_of_tokens.utils.formatting import first_line
from mixture_of_tokens.utils.process import process_count
from mixture_of_tokens.utils.progress import warned_if_slow
from mixture_of_tokens.utils.wording import nearest

SHIPPED = Path(__file__).parents[1] / "nano"  # a trained model that comes with the library (examples/nano.py)
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model")  # one of which every tokenizer has


def place_of(run: str) -> str:
    """Where a run is: of the name nano the model that comes with the library, unless there is one of that name here."""
    return str(SHIPPED) if run == SHIPPED.name and not Path(run).exists() else run


def model_directory(run: str) -> str:
    """The directory of the model in a run directory, a checkpoint or a transformers directory; a Hub name is returned.

    Raises ValueError where the model is missing or damaged, and for a path that does not exist.
    """
    directory = Path(_located(run))
    own = run_directory(run) is not None and (directory / manifest.NAME).is_file()
    if (damage := manifest.fault(directory) if own else manifest.damage(directory)) is not None:
        raise ValueError(f"{directory} is damaged: {damage}")
    return str(directory)


def _located(run: str) -> str:
    path = Path(run := place_of(run))
    if not path.exists():
        folder = path.parent  # a name such as runs/mine could be the Hub's too, but not where there are runs
        if run.count("/") > 1 or run.startswith((".", "/", "~")) or (folder != Path() and folder.exists()):
            raise ValueError(f"{run}: {no_directory(run)}")
        return run
    if (path / "model").is_dir():
        return str(path / "model")
    if not (path / "config.json").is_file():
        newest = checkpoints.newest(path) if path.is_dir() else None
        hint = "it has neither model/ nor config.json" if newest is None else f"it is not finished, but has {newest}"
        if (path / records.FACTS).is_file():
            hint = "its folder model/ is gone"
        elif newest is None and path.is_dir() and checkpoints.has_any(path):
            hint = "it is not finished, and none of its checkpoints is whole"
        elif newest is None and (path / records.CONFIG).is_file():
            hint = "it is a run that has saved no checkpoint yet"
        raise ValueError(f"{run} is no model: {hint}; give a finished run, a checkpoint or a name on the Hub")
    return str(path)


def load_model(
    run: str,
    *,
    alone: bool = False,
    experts: int | None = None,
    device: Device | None = None,
    dtype: Dtype | None = None,
    placement: Placement = COPIES,
) -> Any:
    """The causal language model of a run, in evaluation mode.

    Args:
        alone: serve each row by itself, `MixtureOfTokensForCausalLM.serve_alone`.
        experts: that a token of a Mixture of Tokens goes to alone, by default all.
        device: by default a CUDA device if there is one.
        dtype: of the weights, by default as they were saved.
        placement: over processes, which all call this, each with memory for the whole model on its CPU.

    Raises ValueError as `model_directory` does, for what transformers cannot load as a causal language model, and for
    a device or a number of experts that is not there.
    """
    check_device(device)
    if experts is not None and not alone:
        raise ValueError("--experts says how many experts serve a text alone; give --alone too")
    directory = model_directory(run := place_of(run))
    of_the_hub = f"{run} is no directory here, so it is a name on the Hub"
    try:
        # Which takes half a minute where there is no connection.
        with nullcontext() if Path(run).exists() else warned_if_slow(of_the_hub):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"a {config.model_type} model is no causal language model")
        if "/" in str(attention := getattr(config, "_attn_implementation", None)):
            raise ValueError(f"its attn_implementation, {attention}, would be code on the Hub")
        how: dict[str, Any] = {"config": config, "trust_remote_code": False, "dtype": dtype or "auto"}
        with without_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(directory, **how)
    except Exception as error:  # transformers, safetensors and the Hub raise their own, some with pages of advice
        where = "" if Path(run).exists() else f": {no_directory(run)}. As a name on the Hub it"
        why = f"{first_line(error).removesuffix('.')}{nearest(run, [SHIPPED.name])}"
        raise ValueError(f"{run}{where} cannot be loaded: {why}") from None
    check_experts(run, model, experts)
    if alone and hasattr(model, "serve_alone"):  # other models never mix rows
        model.serve_alone(num_experts_alone=experts)
    if placement.sharded:
        if not isinstance(model, MixtureOfTokensForCausalLM):
            raise ValueError(f"{run} is a {type(model).__name__}: --shard is for models of this library")
        placement.check(model.config, on_cpu=device == "cpu")
        return shard_model(model, placement).eval()
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Transformers' own."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def placed(shard: int | None, expert_parallel: int | None, experts: int | None = None) -> Placement:
    """How a model that is only read lies over the processes of torchrun, as flags say.

    Raises ValueError where they do not fit, for several processes that would each do all of the work, and for few
    experts of a model that lies over several.
    """
    placement = Placement.of(shard, None, expert_parallel, process_count())
    if process_count() > 1 and not placement.sharded:
        raise ValueError(
            f"{process_count()} processes would each do all of the work; give --shard, or leave out torchrun"
        )
    if experts is not None and placement.sharded:
        raise ValueError("--experts is not for --shard: give one of them")
    return placement


def check_experts(run: str, model: Any, experts: int | None) -> None:
    """Raises ValueError for a number of experts of a model that mixes no rows."""
    if experts is not None and group_size_of(model) is None:
        raise ValueError(f"--experts is for a Mixture of Tokens, and {run} serves each row alone as it is")


def weights_hash(run: str) -> str | None:
    """A hash of what the weights of a local model are; None of a name on the Hub, whose revision is in the cache."""
    directory = Path(_located(run))
    files = sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.bin"))
    if not files:
        return None
    return hashlib.sha256("".join(manifest.hash_of_file(file) for file in files).encode()).hexdigest()


def group_size_of(model: Any) -> int | None:
    """The group size where the rows of a batch influence each other; None where each row is computed by itself."""
    return model.config.group_size if getattr(model, "shares_batch", False) else None


def check_tokens(model: Any, run: str, largest: int) -> None:
    """Raises ValueError for a token that the model has no embedding of."""
    count = model.config.get_text_config().vocab_size
    if largest >= count:
        raise ValueError(f"{run}: its tokenizer gives token {largest}, and its model knows tokens below {count}")


def context_of(model: Any) -> int:
    """The longest row that a model takes, in tokens; a large number where its configuration sets no limit."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if known is None else known


def load_tokenizer_of(run: str) -> Any:
    """The tokenizer beside a model that `load_model` has loaded. Raises ValueError where there is none."""
    located = _located(run)
    names = {path.name for path in Path(located).iterdir()} if Path(located).is_dir() else None
    if names is not None and not any(fnmatch(name, kind) for name in names for kind in TOKENIZER_FILES):
        raise ValueError(f"{run} has no tokenizer beside the model: there is no tokenizer.json in {located}")
    try:
        return AutoTokenizer.from_pretrained(located, padding_side="left", trust_remote_code=False)
    except BaseException as error:  # of many kinds
        refuse(error, f"{run} has no tokenizer beside the model")


def run_directory(run: str) -> Path | None:
    """The run directory that this is, or that this checkpoint or model is in."""
    path = Path(place_of(run)).absolute()
    return next((place for place in (path, path.parent) if _is_run_directory(place)), None)


def _is_run_directory(path: Path) -> bool:
    if not (path / records.CONFIG).is_file():
        return False
    try:
        RunConfig.read(path / records.CONFIG)
    except ValueError:  # written by other software
        return False
    return True


def config_of(run: str) -> RunConfig:
    """Of a run directory, or of that of a checkpoint."""
    directory = run_directory(run)
    assert directory is not None
    return RunConfig.read(directory / records.CONFIG)


def separates_documents(run: str) -> bool:
    """Whether documents of a row did not see each other in its training; False where that is unknown."""
    return run_directory(run) is not None and config_of(run).separate_documents


def text_of(run: str) -> Prepared:
    """The text that a run directory, or a checkpoint in one, was trained on.

    Raises ValueError where it is unknown, missing or changed.
    """
    directory = run_directory(run)
    if directory is None:
        raise ValueError(f"{run} is no run directory, so its text is not known; name one with --data")
    try:
        prepared = RunConfig.read(directory / records.CONFIG).prepare()
    except ValueError as error:  # such as of a relative path
        raise ValueError(f"the text of {run}, its --data as seen from here: {error}") from None
    before = _corpus_of(Path(run), directory) or prepared.facts
    for what, key in {"text": "hash", "tokenizer": "tokenizer"}.items():
        was, now = before.get(key), prepared.facts.get(key)
        if was != now:
            raise ValueError(
                f"the {what} of {run} has changed: its hash is {now} now and was {was}; put back what it was trained on"
            )
    return prepared


def _corpus_of(run: Path, directory: Path) -> dict[str, Any] | None:
    """Hashes of the text and the tokenizer of a finished run, or of a checkpoint."""
    if (directory / records.FACTS).is_file():
        return RunFacts.read(directory / records.FACTS).corpus
    if not (run / manifest.NAME).is_file() or "corpus" not in (facts := manifest.read(run)):
        return None
    return dict(zip(("hash", "tokenizer"), facts["corpus"].split(), strict=True))
