"""Training one named model: the command `mot train` and its run directory."""

import ctypes
import dataclasses
import json
import math
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import yaml
from cyclopts import Parameter
from transformers import TrainingArguments, set_seed

from mixture_of_tokens import checkpoints, provenance
from mixture_of_tokens.cost import flops_per_token
from mixture_of_tokens.data import GroupedBatches
from mixture_of_tokens.evaluate import evaluate_blocks
from mixture_of_tokens.generate import continue_prompts
from mixture_of_tokens.model import MixtureOfTokensConfig, MixtureOfTokensForCausalLM
from mixture_of_tokens.names import FIELDS, SIZES, config_from_name, nearest, parse_name
from mixture_of_tokens.shards import Prepared, prepare
from mixture_of_tokens.trainer import AnnealTemperature, GroupedTrainer, StopOnSignal

PROMPT = "def "
COMMON_GROUP = 32
# Fields of TrainingArguments that say how a run is carried out, not what it computes; a resumed run may change them.
CARRIED_OUT = ("dataloader_", "gradient_accumulation_steps", "per_device_eval_batch_size", "report_to", "save_", "ddp_")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a size is trained. Mini to Base are the authors' settings (their configuration files); Nano's are ours."""

    learning_rate: float
    steps: int
    warmup_steps: int
    eval_every: int
    save_every: int


RECIPES = {
    "Nano": Recipe(1e-2, 1500, 100, 100, 500),
    "Mini": Recipe(4e-3, 150_000, 2500, 1000, 1000),
    "Medium": Recipe(7e-4, 150_000, 2500, 1000, 1000),
    "Base": Recipe(4e-4, 150_000, 2500, 1000, 1000),
}
# Where the authors trained Mixture of Tokens at another peak rate than the dense model.
MIXTURE_LEARNING_RATES = {"Mini": 2e-3, "Base": 2e-4}


def keep_large_blocks() -> bool:
    """Keep glibc from returning large blocks to the system. Returns whether it could be set.

    Gradients and mixtures of a granular layer are hundreds of megabytes, which glibc maps and unmaps at every step: a
    third of a training step on the CPU was page faults.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_threshold, largest) and libc.mallopt(m_trim_threshold, largest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is common to commands that train.

    Args:
        steps: Optimizer steps; by default the size's own number.
        batch_size: Rows a step, a multiple of the group size; by default the size's own, 128 for Nano and 256 else.
        data: Files, folders or globs of text, .jsonl or .parquet, each also .gz, or hf:NAME[:CONFIG] for a data set of
            the Hub; may be given several times. By default the source text of Python's standard library.
        field: Of a row of .jsonl, .parquet or the Hub, the text.
        max_bytes: Read no more than so many bytes of text.
        tokenizer: A tokenizer.json, a folder or a Hub name; by default one is trained on the data.
        anneal_temperature_to: The router temperature of the last step, reached geometrically from the configuration's;
            by default it stays.
        evaluate_on: The split the losses are of: validation by default, and in mot sweep tuning, so that nothing is
            chosen by what is reported.
        device: cpu or cuda; by default cuda where there is one.
        model: Fields of the model's configuration, as in --model.router_temperature 0.25.
        training: Fields of transformers' TrainingArguments, as in --training.weight_decay 0.05.
    """

    steps: int | None = None
    batch_size: int | None = None
    data: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    max_bytes: int | None = None
    tokenizer: str | None = None
    anneal_temperature_to: float | None = None
    evaluate_on: Literal["validation", "tuning"] | None = None
    device: Literal["cpu", "cuda"] | None = None
    model: dict[str, str] = dataclasses.field(default_factory=dict)
    training: dict[str, str] = dataclasses.field(default_factory=dict)


DEFAULTS = Options()


def train(
    name: str,
    *,
    out: Path | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Train one model and write a run directory.

    It can be stopped (^C, SIGTERM) and killed at any time; the same command with --resume goes on.

    Args:
        name: A model, such as Transformer-Nano or MoT-Nano/32E/4.
        out: The run directory; by default runs/NAME-seedSEED.
        seed: Of the weights and of the order of the text.
        learning_rate: Peak rate, reached after the warm-up, then a cosine down to a tenth; by default the size's own.
        resume: Go on from the newest whole checkpoint of the run directory, or start where there is none.
        dry_run: Print the merged configuration and stop.
    """
    out = Path("runs") / f"{name.replace('/', '-')}-seed{seed}" if out is None else out
    if dry_run:
        print(yaml.safe_dump(merge(name, seed, learning_rate, options)[1], sort_keys=False), end="")
        return
    facts = run_training(name, seed, learning_rate, options, out, resume=resume)
    if not _is_main():
        return
    loss, bits = f"{facts['final_loss']:.4f} nats a token", f"{facts['bits_per_byte']:.4f} bits a byte"
    print(f"{name}: loss {loss} of all {facts['evaluated_on']} text, {bits}")
    print(f"{facts['seconds']:.0f} s, {facts['tokens_per_second']} tokens/s. Everything is in {out}.")
    print(f"A lone prompt, continued:\n\n{PROMPT}{facts['sample']}")


def run_training(
    name: str, seed: int, learning_rate: float | None, options: Options, out: Path, *, resume: bool
) -> dict[str, Any]:
    """Train as `mot train` does, or find it done with `resume`. Returns what run.json holds, and writes it last.

    Raises ValueError for bad settings, FloatingPointError for a run that diverges. Exits at a signal, after saving.
    """
    config, run, arguments = merge(name, seed, learning_rate, options)
    if resume:
        _check_resumed(out, run)
        if (out / "run.json").exists():
            print(f"{out} is finished already", file=sys.stderr)
            return json.loads((out / "run.json").read_text())
    elif _is_main() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; go on with --resume, name another with --out, or remove it")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: {existing} is no directory that can be written to")
    return _run(config, run, TrainingArguments(output_dir=str(out), **arguments), out)


def merge(
    name: str, seed: int, learning_rate: float | None, options: Options
) -> tuple[MixtureOfTokensConfig, dict[str, Any], dict[str, Any]]:
    """The model's configuration, the run's (what config.yaml holds), and keywords of TrainingArguments.

    Raises ValueError for whatever is wrong with them.
    """
    size = parse_name(name).size
    overrides = {field: _scalar(value) for field, value in options.model.items()}
    config = config_from_name(name, **overrides)
    recipe = RECIPES[size]
    steps = recipe.steps if options.steps is None else options.steps
    batch_size = SIZES[size].batch if options.batch_size is None else options.batch_size
    if learning_rate is None:
        mixes = not {"dense", "token_choice", "expert_choice"}.issuperset(config.feed_forwards)
        learning_rate = MIXTURE_LEARNING_RATES.get(size, recipe.learning_rate) if mixes else recipe.learning_rate
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave the flag out, or say cpu")
    positive = {"steps": steps, "batch-size": batch_size, "learning-rate": learning_rate}
    positive |= {"anneal-temperature-to": options.anneal_temperature_to, "max-bytes": options.max_bytes}
    _check(positive, batch_size=batch_size, group_size=config.group_size)
    written = config.to_diff_dict() | {"num_experts": config.num_experts}  # upstream writes it under another name
    written = {field: value for field, value in written.items() if field in FIELDS}
    if options.tokenizer is not None and "vocab_size" not in overrides:
        written["vocab_size"] = None  # the tokenizer's
    run: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "anneal_temperature_to": options.anneal_temperature_to,
        "data": options.data,
        "field": options.field,
        "max_bytes": options.max_bytes,
        "tokenizer": options.tokenizer,
        "evaluate_on": options.evaluate_on or "validation",
        "training": {field: _scalar(value) for field, value in options.training.items()},
        "model": {field: value for field, value in written.items() if value is not None},
    }
    micro_batch, run["training"] = _training_fields(run, recipe, config.group_size)
    with torch.device("meta"):
        MixtureOfTokensForCausalLM(config)  # whatever is wrong with it is said now
    taken = {"max_steps": steps, "seed": seed, "learning_rate": learning_rate, "use_cpu": options.device == "cpu"}
    taken |= {"per_device_train_batch_size": micro_batch}
    TrainingArguments(output_dir=os.devnull, **taken, **run["training"])  # the same
    return config, run, taken | run["training"]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _scalar(text: str) -> Any:
    """A flag's text as YAML 1.2 reads it: unlike 1.1, 1e-3 is a number, and `no` and `off` are words."""
    if text.lower() in ("yes", "no", "on", "off"):
        return text
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def _check(positive: dict[str, float | None], *, batch_size: int, group_size: int) -> None:
    for what, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{what} must be positive, not {value}")
    if batch_size % group_size:
        low = batch_size // group_size * group_size
        legal = " or ".join(str(n) for n in (low, low + group_size) if n)
        raise ValueError(f"--batch-size {batch_size} is no multiple of the group size {group_size}; {legal} would be")


def _check_resumed(out: Path, run: dict[str, Any]) -> None:
    """That a run directory, where there is one, was made with the same configuration."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.yaml").is_file():
        raise ValueError(f"--resume: {out} is no run directory: it has no config.yaml")

    def flat(configuration: dict[str, Any]) -> dict[str, Any]:
        nested = {"model", "training"}
        outer = {key: value for key, value in configuration.items() if key not in nested}
        inner = {f"{key}.{name}": value for key in nested for name, value in configuration[key].items()}
        return outer | {k: v for k, v in inner.items() if not k.removeprefix("training.").startswith(CARRIED_OUT)}

    before, now = flat(yaml.safe_load((out / "config.yaml").read_text())), flat(yaml.safe_load(yaml.safe_dump(run)))
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            flag = key.replace("_", "-") if "." not in key else key
            raise ValueError(
                f"--resume: {out} was started with --{flag} {before.get(key)}, now it is {now.get(key)}; "
                "give the same flags, or name another directory with --out"
            )


def _training_fields(run: dict, recipe: Recipe, group_size: int) -> tuple[int, dict[str, Any]]:
    """Rows at once, and fields of TrainingArguments: this project's, and over them what the user gave."""
    given = run["training"]
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    taken = {"output_dir": "--out", "use_cpu": "--device", "max_steps": "--steps", "seed": "--seed"}
    taken |= {"learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size"}
    for field in given:
        if field not in known:
            raise ValueError(f"--training.{field} is no field of TrainingArguments{nearest(field, known)}")
        if field in taken:
            raise ValueError(f"--training.{field} has a flag of its own: {taken[field]}")
    parts = given.get("gradient_accumulation_steps", 1) * int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, rest = divmod(run["batch_size"], parts)
    if rest or micro_batch % group_size or not micro_batch:
        raise ValueError(
            f"a batch of {run['batch_size']} rows in {parts} parts (processes x accumulation) gives no parts that are "
            f"multiples of the group size {group_size}; --batch-size {group_size * parts} would, and its multiples"
        )
    return micro_batch, {
        "per_device_eval_batch_size": micro_batch,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": min(recipe.warmup_steps, run["steps"] // 10),
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": max(1, min(20, run["steps"] // 20)),
        "eval_strategy": "steps",
        "eval_steps": max(1, min(recipe.eval_every, run["steps"] // 10)),
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": 2,
        "report_to": "tensorboard",
        "remove_unused_columns": False,
        "label_names": ["shift_labels"],
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        **given,
    }


def build(
    config: MixtureOfTokensConfig, run: dict[str, Any], arguments: TrainingArguments
) -> tuple[GroupedTrainer, Prepared]:
    """The trainer of a run, its data prepared and its model initialised."""
    # Every system sees the same groups, those that mix none and those that mix fewer included.
    common = COMMON_GROUP % config.group_size == run["batch_size"] % COMMON_GROUP == 0
    group_size = COMMON_GROUP if common else config.group_size
    prepared = prepare(
        run["data"],
        field=run["field"],
        max_bytes=run["max_bytes"],
        vocab_size=config.vocab_size if run["tokenizer"] is None else run["model"].get("vocab_size"),
        context=config.max_position_embeddings,
        tokenizer=run["tokenizer"],
        group_size=group_size,
    )
    vocabulary = prepared.tokenizer.get_vocab()
    if run["tokenizer"] is None or "vocab_size" not in run["model"]:
        config.vocab_size = max(vocabulary.values()) + 1
    config.eos_token_id = vocabulary[str(prepared.tokenizer.eos_token)]
    config.pad_token_id = vocabulary[str(prepared.tokenizer.pad_token)]
    rows = GroupedBatches(
        prepared.train, group_size=group_size, batch_size=run["batch_size"], steps=run["steps"], seed=run["seed"]
    )
    set_seed(run["seed"])
    model = MixtureOfTokensForCausalLM(config)
    evaluated, corpus = getattr(prepared, run["evaluate_on"]), prepared.facts["hash"]
    trainer = GroupedTrainer(
        model, arguments, rows=rows, evaluated=evaluated, corpus=corpus, processing_class=prepared.tokenizer
    )
    if run["anneal_temperature_to"] is not None:
        trainer.add_callback(AnnealTemperature(model, run["anneal_temperature_to"]))
    return trainer, prepared


def _run(config: MixtureOfTokensConfig, run: dict[str, Any], arguments: TrainingArguments, out: Path) -> dict:
    keep_large_blocks()
    transformers.logging.disable_progress_bar()
    trainer, prepared = build(config, run, arguments)
    checkpoint = checkpoints.newest(out) if out.exists() else None
    if _is_main():
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(out / "config.yaml", yaml.safe_dump(run, sort_keys=False))
        if checkpoint is not None:
            print(f"Going on from {checkpoint}", file=sys.stderr)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.installed():
        trainer.train(checkpoint)
    if trainer.state.global_step < run["steps"]:
        assert stop.received is not None
        if _is_main():
            step, name = trainer.state.global_step, signal.Signals(stop.received).name
            print(f"mot: stopped by {name} after step {step}, which is saved; --resume goes on", file=sys.stderr)
        sys.exit(128 + stop.received)
    return _finish(trainer, prepared, run, out) if _is_main() else {}


def _finish(trainer: GroupedTrainer, prepared: Prepared, run: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `model/` and, last, `run.json`, which says that the run is finished."""
    model, config, seconds = trainer.causal_lm, trainer.causal_lm.config, trainer.clock.seconds
    tokens = run["steps"] * trainer.run_log.tokens_per_step
    final = evaluate_blocks(
        model, trainer.evaluated, group_size=trainer.rows.group_size, batch_size=trainer.args.per_device_eval_batch_size
    )
    beside = out / "model.partial"
    with checkpoints.plain_errors(out / "model"):
        model.save_pretrained(beside)
    prepared.tokenizer.save_pretrained(beside)
    checkpoints.publish(beside, out / "model")
    facts = {
        "name": run["name"],
        "seed": run["seed"],
        "steps": run["steps"],
        "tokens": tokens,
        "evaluated_on": run["evaluate_on"],
        "final_loss": final["loss"],
        "bits_per_byte": final["bits_per_byte"],
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "parameters": model.num_parameters(),
        "forward_flops_per_token": round(sum(flops_per_token(config, batch=run["batch_size"]).forward.values())),
        "corpus": prepared.facts,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "sample": continue_prompts(model, prepared.tokenizer, [PROMPT])[0],
        **provenance.hardware("cpu" if trainer.args.use_cpu else None),
    }
    checkpoints.write_text(out / "run.json", json.dumps(facts, indent=2) + "\n")
    return facts
