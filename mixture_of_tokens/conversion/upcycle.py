"""A trained dense model becomes a sparse one, to be trained on: the command `mot upcycle`. `copies.py` says how."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixture_of_tokens.conversion.copies import route_by_clusters, upcycled_weights
from mixture_of_tokens.conversion.to_hf import COMMON
from mixture_of_tokens.data.evaluation_text import whole_text
from mixture_of_tokens.data.groups import Blocks, grouped_order
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.names import FIELDS, config_from_name, name_of
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.loading import (
    check_tokens,
    context_of,
    load_model,
    load_tokenizer_of,
    run_directory,
    text_of,
    without_progress_bars,
)
from mixture_of_tokens.runs.locking import owned_file
from mixture_of_tokens.runs.preconditions import check_free, check_seed, check_writable
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.runs.warm_start import NOT_OF_A_START, UPCYCLED, Upcycled, origin_of, text_of_run
from mixture_of_tokens.settings.names import Name, parse_name
from mixture_of_tokens.settings.routings import DENSE
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.checks import divisors, shown
from mixture_of_tokens.utils.files import plain_errors, published, write_text
from mixture_of_tokens.utils.formatting import Result, enumerated, listing
from mixture_of_tokens.utils.process import check_one_process
from mixture_of_tokens.utils.progress import progress_bar
from mixture_of_tokens.utils.rendering import card_of

TOLERANCE = 1e-3  # nats between the source's loss and the new model's
TOKENS = 16_384  # about so many are scored, and as many clustered
LONGEST = 512  # tokens of a row that is scored
ROWS = 32  # at once
STANDARD = Path(torch.__file__).parent / "optim" / "*.py"  # text for a model whose own is not known: Python, 700 kB
LEGAL = ("TC", "STC", "Transformer")  # systems that a dense model can become exactly

# Fields of transformers' configurations with which a model computes what ours cannot, and the values that ours has.
MUST_BE = {"mlp_bias": (False, None), "use_sliding_window": (False, None), "quantization_config": (None,)}


@dataclass(frozen=True)
class UpcycledModel(Result):
    """What `mot upcycle` wrote to `directory`: a model with `parameters`, made of one with `source_parameters`."""

    directory: str
    name: str
    parameters: int
    source_parameters: int
    record: Upcycled

    def __str__(self) -> str:
        made = self.record
        of = f"of {self.parameters:,} parameters, made of {made.source} ({self.source_parameters:,})"
        lines = [
            f"{self.directory} is a {self.name} {of}.",
            f"Over {made.scored_tokens:,} tokens of {made.scored} its loss is {made.loss:.4f}, and the source's "
            f"{made.source_loss:.4f}.",
        ]
        if made.largest_load:
            lines.append(
                f"The busiest copy of the feed-forward gets {made.largest_load:.1f} times an even share of tokens."
            )
        return "\n".join([*lines, "", f"mot train --from {self.directory} trains it on."])


def upcycle(source: str, name: str, *, out: Path, data: list[str] | None, field: str, seed: int) -> UpcycledModel:
    """As the function of `commands/upcycle.py`, which explains its arguments."""
    check_one_process()
    check_seed(seed)
    wanted = _checked_name(name)
    check_free(out)
    check_writable(out)
    model = load_model(source, device="cpu").float()
    config, tokenizer = _dense_config(source, model), load_tokenizer_of(source)
    named = _with_size(wanted, config, source)
    target = sparse_config(named, config)
    text, read, scored = _text(source, data, field, tokenizer, model)
    before, count = _loss_of(model, text)
    with owned_file(out, patience=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = MixtureOfTokensForCausalLM(target)
            made.load_state_dict(upcycled_weights(model.state_dict(), made))
            largest_load = route_by_clusters(made.eval(), _rows_of(read)) if named.routing.sparse else 0.0
        beside = out.with_name(f".{out.name}.partial")
        with published(beside, out):
            with plain_errors(out), without_progress_bars():
                made.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
            after, _ = _loss_of(load_model(str(beside), device="cpu"), text)
            if not abs(after - before) <= TOLERANCE:
                what = f"its loss is {after:.4f}, and that of {source} {before:.4f}"
                raise ValueError(f"{out} would not be the same model, and was not written: {what}")
            kind = "copies" if named.routing.sparse else "continued"
            record = Upcycled(
                name=str(named), source=_located(source), kind=kind, source_loss=before, loss=after, scored=scored,
                scored_tokens=count, seed=seed, largest_load=largest_load, **_origin(source, config),
            )  # fmt: skip
            record.write(beside / UPCYCLED)
            manifest.write(beside)
            write_text(beside / "README.md", card_of("run.md.j2", name=str(named), config=target))  # which people edit
    return UpcycledModel(str(out), str(named), made.num_parameters(), model.num_parameters(), record)


def _dense_config(source: str, model: Any) -> MixtureOfTokensConfig:
    """The configuration of a dense model as one of this library.

    Raises ValueError, naming the architecture or the field, for what this library's dense model does not compute.
    """
    config = model.config
    if isinstance(model, MixtureOfTokensForCausalLM):
        if config.sparse_routings:
            raise ValueError(f"{source} has {config.sparse_routings[0].title} layers, and a dense model is upcycled")
        return config
    kind = config.model_type
    if kind not in ("qwen3", "llama"):
        raise ValueError(
            f"{source} is a {type(model).__name__}: Qwen3, Llama and dense models of this library are taken"
        )
    for field, legal in MUST_BE.items():
        if (value := getattr(config, field, None)) not in legal:
            raise ValueError(f"{source}: its {field} is {shown(value)}, and only {shown(legal[0])} is taken")
    fields = {field: getattr(config, field) for field in COMMON if hasattr(config, field)}
    own = {"head_dim": config.head_dim, "moe_intermediate_size": config.intermediate_size, "group_size": 1}
    own |= {"num_experts": 1, "mlp_layer_types": [DENSE.kind] * config.num_hidden_layers}
    try:
        return MixtureOfTokensConfig(**fields, **own, qk_norm=kind == "qwen3")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _checked_name(name: str) -> Name:
    """Raises ValueError for a system that a dense model cannot become exactly."""
    parsed = parse_name(name)
    if (system := parsed.system) not in LEGAL:
        raise ValueError(f"{name}: a dense model becomes {enumerated(LEGAL)}, and no {system}")
    if parsed.routing.sparse and parsed.granularity == 1:
        what = "a lone expert's normalised gate is always 1, and would never teach its router"
        raise ValueError(f"{name}: the granularity must be 2 or more, as in {parsed}/8: {what}")
    return parsed


def _with_size(name: Name, config: MixtureOfTokensConfig, source: str) -> Name:
    """The name with the size that the source has, if it has one. Raises ValueError for a name with another."""
    own = name_of(config)
    size = "" if own is None else parse_name(own).size
    if name.size not in ("", size):
        is_of = f"is a {own}" if own else "has the sizes of no name"
        raise ValueError(f"{name}: {source} {is_of}; give {replace(name, size=size)}")
    return replace(name, size=size)


def sparse_config(name: Name, dense: MixtureOfTokensConfig) -> MixtureOfTokensConfig:
    """The configuration of the new model.

    Raises ValueError for a granularity that does not divide the width of the feed-forwards.
    """
    width, slices = dense.intermediate_size, name.granularity
    if width % slices:
        raise ValueError(
            f"{name}: granularity {slices} does not divide the width {width}; {listing(divisors(width))} do"
        )
    of_experts = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "group_size", "mlp_layer_types")
    left_out = {*of_experts, *NOT_OF_A_START, "router_temperature"}
    known = dense.to_diff_dict()
    fields = {key: value for key, value in known.items() if key in FIELDS and key not in left_out}
    fields |= {key: getattr(dense, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name.routing.sparse:
        made = {"norm_topk_prob": True, "capacity_factor": None}
        fields |= {field: value for field, value in made.items() if field in name.routing.settings}
    return config_from_name(str(name), **fields)


def _text(source: str, data: list[str] | None, field: str, tokenizer: Any, model: Any) -> tuple[Blocks, Blocks, str]:
    """Text that losses are measured on, text that routers are made by, and what the first is."""
    if data is None and run_directory(source) is not None:
        try:
            prepared = text_of(source)
            return prepared.validation, prepared.train, "its validation text"
        except ValueError as error:
            raise ValueError(f"{error}; or name other text with --data") from None
    context = min(LONGEST, context_of(model))
    text = whole_text(data or [str(STANDARD)], tokenizer, field=field, context=context, group_size=1)
    tokens: Any = text.tokens  # in memory
    check_tokens(model, source, int(tokens.max()))
    return text, text, "Python" if data is None else ", ".join(data)


def _loss_of(model: Any, text: Blocks) -> tuple[float, int]:
    """The loss over about `TOKENS` tokens, and their number."""
    rows = max(1, TOKENS // text.context)
    sizes: dict[str, Any] = {"group_size": 1, "batch_size": min(ROWS, rows), "groups": rows}
    found = evaluate_blocks(model.eval(), text, **sizes, progress="Scoring")
    return found["loss"], int(found["tokens"])


def _rows_of(text: Blocks) -> Iterator[Tensor]:
    """About `TOKENS` tokens from all over the text, some rows at a time."""
    order = grouped_order(text, 1).ravel()[: max(1, TOKENS // text.context)]
    for first in progress_bar("Clustering", range(0, len(order), ROWS), unit="batch", delay=2, leave=False):
        yield text.batch(order[first : first + ROWS])["input_ids"]


def _located(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _origin(source: str, config: MixtureOfTokensConfig) -> dict[str, Any]:
    """Of the record: where the model comes from, and how much text it has read."""
    directory = run_directory(source)
    if directory is None or not (directory / records.FACTS).is_file():
        return {"origin": name_of(config) or Path(source).name}
    run = read_run(directory)
    return origin_of(run) | {"text": text_of_run(run.config)}
