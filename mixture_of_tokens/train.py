"""Training one named model: Hugging Face's Trainer, plus grouped batches and the run directory."""

import ctypes
import dataclasses
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mixture_of_tokens import provenance
from mixture_of_tokens.corpus import build, standard_library
from mixture_of_tokens.cost import flops_per_token
from mixture_of_tokens.data import Blocks, GroupedBatches, prepare
from mixture_of_tokens.evaluate import evaluate_blocks
from mixture_of_tokens.generate import continue_prompts
from mixture_of_tokens.model import MixtureOfTokensConfig, MixtureOfTokensForCausalLM
from mixture_of_tokens.names import FIELDS, SIZES, config_from_name, nearest, parse_name
from mixture_of_tokens.tokenizer import END_OF_TEXT

PROMPT = "def "
COMMON_GROUP = 32
EVALUATION_ROWS = 1024  # during training; the final loss is over the whole validation split


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a size is trained. Mini to Base are the authors' settings (their configuration files); Nano's are ours."""

    learning_rate: float
    steps: int
    warmup_steps: int
    eval_every: int


RECIPES = {
    "Nano": Recipe(1e-2, 1500, 100, 100),
    "Mini": Recipe(4e-3, 150_000, 2500, 1000),
    "Medium": Recipe(7e-4, 150_000, 2500, 1000),
    "Base": Recipe(4e-4, 150_000, 2500, 1000),
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


def as_it_is(batch: Any) -> Any:
    """`GroupedBatches` gives whole batches."""
    return batch


class GroupedTrainer(Trainer):
    """Trainer on rows in their given order, evaluated in fixed groups, with cross-entropy as the loss it reports."""

    def __init__(self, model: MixtureOfTokensForCausalLM, *args, rows: GroupedBatches, validation: Blocks, **kwargs):
        # The evaluation set is named so that Trainer evaluates at all; `evaluate` does not read it.
        super().__init__(model, *args, train_dataset=rows, eval_dataset=rows, data_collator=as_it_is, **kwargs)
        self.model_accepts_loss_kwargs = False  # all micro-batches have equally many labels: a mean of means will do
        self.causal_lm, self.rows, self.validation = model, rows, validation
        self._reported: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        loss, aux_loss = outputs.loss, outputs.aux_loss
        cross_entropy = loss if aux_loss is None else loss - self.causal_lm.config.router_aux_loss_coef * aux_loss
        self._reported.append((cross_entropy.detach(), None if aux_loss is None else aux_loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._reported:
            cross_entropies, aux_losses = zip(*self._reported, strict=True)
            logs["loss"] = torch.stack(cross_entropies).mean().item()
            if aux_losses[0] is not None:
                logs["aux_loss"] = torch.stack(aux_losses).mean().item()
            self._reported.clear()
        super().log(logs, start_time)

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        result = evaluate_blocks(
            self.causal_lm,
            self.validation,
            group_size=self.rows.group_size,
            batch_size=self.args.per_device_eval_batch_size,
            groups=max(1, EVALUATION_ROWS // self.rows.group_size),
        )
        metrics = {f"{metric_key_prefix}_loss": result["loss"]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class AnnealTemperature(TrainerCallback):
    """Router temperature from `start` to `end`, geometrically; a function of the step alone."""

    def __init__(self, model: MixtureOfTokensForCausalLM, end: float):
        self.model, self.start, self.end = model, model.config.router_temperature, end

    def on_step_begin(self, args, state, control, **kwargs):
        progress = state.global_step / max(1, state.max_steps - 1)
        self.model.set_router_temperature(self.start * (self.end / self.start) ** progress)


class RunLog(TrainerCallback):
    """`metrics.jsonl` and the progress bar: loss, tokens a second, time left. Stops at a loss that is not finite."""

    def __init__(self, path: Path, tokens_per_step: int):
        self.path, self.tokens_per_step = path, tokens_per_step
        self.row: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        every = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines than a screen
        self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, mininterval=every)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if not any(name in logs for name in ("loss", "eval_loss")):
            return
        if self.row and self.row["step"] != state.global_step:
            self._write()
        seconds = time.perf_counter() - self.start
        tokens = state.global_step * self.tokens_per_step
        self.row |= {"step": state.global_step, "tokens": tokens, "seconds": round(seconds, 3)}
        self.row["tokens_per_second"] = round(tokens / seconds) if tokens else 0
        names = {"loss": "train_loss", "eval_loss": "eval_loss", "learning_rate": "learning_rate"}
        names |= {"grad_norm": "grad_norm", "aux_loss": "aux_loss"}
        self.row |= {names[name]: value for name, value in logs.items() if name in names}
        shown = {k: f"{self.row[k]:.3f}" for k in ("train_loss", "eval_loss") if k in self.row}
        self.bar.set_postfix(shown | {"tokens/s": self.row["tokens_per_second"]}, refresh=False)
        if "loss" in logs and not math.isfinite(logs["loss"]):
            self._write()
            raise ValueError(f"the loss is {logs['loss']} at step {state.global_step}: try a lower learning rate")

    def on_train_end(self, args, state, control, **kwargs):
        self._write()
        self.bar.close()

    def _write(self):
        if self.row:
            with self.path.open("a") as file:
                file.write(json.dumps(self.row) + "\n")
        self.row = {}


def train(
    name: str,
    *,
    out: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    anneal_temperature_to: float | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    model: dict[str, str] | None = None,
    training: dict[str, str] | None = None,
    dry_run: bool = False,
) -> None:
    """Train one model on the embedded corpus and write a run directory.

    Args:
        name: A model, such as Transformer-Nano or MoT-Nano/32E/4.
        out: The run directory; by default runs/NAME-seedSEED.
        steps: Optimizer steps; by default the size's own number.
        seed: Of the weights and of the order of the text.
        learning_rate: Peak rate, reached after the warm-up, then a cosine down to a tenth; by default the size's own.
        batch_size: Rows a step, a multiple of the group size; by default the size's own, 128 for Nano and 256 else.
        anneal_temperature_to: The router temperature of the last step, reached geometrically from the configuration's;
            by default it stays.
        device: cpu or cuda; by default cuda where there is one.
        model: Fields of the model's configuration, as in --model.router_temperature 0.25.
        training: Fields of transformers' TrainingArguments, as in --training.weight_decay 0.05.
        dry_run: Print the merged configuration and stop.
    """
    size = parse_name(name).size
    overrides = {field: _scalar(value) for field, value in (model or {}).items()}
    config = config_from_name(name, **overrides)
    recipe = RECIPES[size]
    steps = recipe.steps if steps is None else steps
    batch_size = SIZES[size].batch if batch_size is None else batch_size
    if learning_rate is None:
        mixes = not {"dense", "token_choice", "expert_choice"}.issuperset(config.feed_forwards)
        learning_rate = MIXTURE_LEARNING_RATES.get(size, recipe.learning_rate) if mixes else recipe.learning_rate
    out = Path("runs") / f"{name.replace('/', '-')}-seed{seed}" if out is None else out
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave the flag out, or say cpu")
    positive = {"steps": steps, "batch-size": batch_size, "learning-rate": learning_rate}
    positive |= {"anneal-temperature-to": anneal_temperature_to}
    _check(positive, batch_size=batch_size, group_size=config.group_size, out=out)
    written = config.to_diff_dict() | {"num_experts": config.num_experts}  # upstream writes it under another name
    run: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "anneal_temperature_to": anneal_temperature_to,
        "training": {field: _scalar(value) for field, value in (training or {}).items()},
        "model": {field: value for field, value in written.items() if field in FIELDS},
    }
    micro_batch, run["training"] = _training_fields(run, recipe, config.group_size)
    with torch.device("meta"):
        MixtureOfTokensForCausalLM(config)  # whatever is wrong with it is said now
    if dry_run:
        print(yaml.safe_dump(run, sort_keys=False), end="")
        return
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=device == "cpu",
        max_steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        per_device_train_batch_size=micro_batch,
        **run["training"],
    )
    _run(config, run, arguments, out)


def _scalar(text: str) -> Any:
    """A flag's text as YAML 1.2 reads it: unlike 1.1, 1e-3 is a number, and `no` and `off` are words."""
    if text.lower() in ("yes", "no", "on", "off"):
        return text
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def _check(positive: dict[str, float | None], *, batch_size: int, group_size: int, out: Path) -> None:
    for what, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{what} must be positive, not {value}")
    if batch_size % group_size:
        low = batch_size // group_size * group_size
        legal = " or ".join(str(n) for n in (low, low + group_size) if n)
        raise ValueError(f"--batch-size {batch_size} is no multiple of the group size {group_size}; {legal} would be")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name another directory with --out, or remove it")


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
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["shift_labels"],
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **given,
    }


def _run(config: MixtureOfTokensConfig, run: dict, arguments: TrainingArguments, out: Path) -> None:
    keep_large_blocks()
    transformers.logging.disable_progress_bar()
    print(f"Preparing the corpus for {run['name']} ...", file=sys.stderr)
    prepared = prepare(build(standard_library()), vocab_size=config.vocab_size, context=config.max_position_embeddings)
    config.vocab_size = len(prepared.tokenizer)
    config.eos_token_id = config.pad_token_id = prepared.tokenizer.get_vocab()[END_OF_TEXT]
    # Every system sees the same groups, those that mix none and those that mix fewer included.
    groups = (
        COMMON_GROUP if COMMON_GROUP % config.group_size == run["batch_size"] % COMMON_GROUP == 0 else config.group_size
    )
    rows = GroupedBatches(
        prepared.train, group_size=groups, batch_size=run["batch_size"], steps=run["steps"], seed=run["seed"]
    )
    set_seed(run["seed"])
    model = MixtureOfTokensForCausalLM(config)

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    trainer = GroupedTrainer(model, arguments, rows=rows, validation=prepared.validation)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if run["anneal_temperature_to"] is not None:
        trainer.add_callback(AnnealTemperature(model, run["anneal_temperature_to"]))
    log = RunLog(out / "metrics.jsonl", run["batch_size"] * config.max_position_embeddings)
    trainer.add_callback(log)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    final = evaluate_blocks(
        model, prepared.validation, group_size=groups, batch_size=arguments.per_device_eval_batch_size
    )
    model.save_pretrained(out / "model")
    prepared.tokenizer.save_pretrained(out / "model")
    facts = {
        "name": run["name"],
        "seed": run["seed"],
        "steps": run["steps"],
        "tokens": run["steps"] * log.tokens_per_step,
        "final_loss": final["loss"],
        "bits_per_byte": final["bits_per_byte"],
        "seconds": round(seconds, 1),
        "parameters": model.num_parameters(),
        "forward_flops_per_token": round(sum(flops_per_token(config, batch=run["batch_size"]).forward.values())),
        "corpus": prepared.facts,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        **provenance.hardware("cpu" if arguments.use_cpu else None),
    }
    (out / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    sample = continue_prompts(model, prepared.tokenizer, [PROMPT])[0]
    bits = f"{final['bits_per_byte']:.4f} bits a byte"
    print(f"{run['name']}: loss {final['loss']:.4f} nats a token of all held-out text, {bits}")
    print(f"{seconds:.0f} s, {facts['tokens'] / seconds:.0f} tokens/s. Everything is in {out}.")
    print(f"A lone prompt, continued:\n\n{PROMPT}{sample}")
