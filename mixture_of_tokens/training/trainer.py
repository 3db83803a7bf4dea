"""Hugging Face's Trainer with grouped batches, router telemetry, `metrics.jsonl`, crash-safe checkpoints.

The clock of a resumed run goes on where it stopped. It leaves out evaluations and the writing of checkpoints, which are
the same for every system and no part of training.
"""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import GroupedBatches, grouped_order, training_groups
from mixture_of_tokens.evaluation.losses import evaluate_blocks, groups_of
from mixture_of_tokens.layers.grouping import at_least_fp32
from mixture_of_tokens.models.balance_callback import BalanceCallback
from mixture_of_tokens.models.companions import calibrate_companions, forget_companions
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.telemetry import measure, router_gradient_norms
from mixture_of_tokens.parallel.optimizer_state import check_optimizer, load_optimizer, save_optimizer
from mixture_of_tokens.parallel.sharding import IN_ONE_FILE, is_sharded, load_whole, local, unsharded, whole_state
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.training.callbacks import Clock, RunLog
from mixture_of_tokens.training.grouped import TemperaturesUndecayed
from mixture_of_tokens.training.signals import begin_worker
from mixture_of_tokens.training.tensorboard import writes_events
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.files import disk_errors, plain_errors, publish
from mixture_of_tokens.utils.formatting import few_of
from mixture_of_tokens.utils.process import of_all

EVALUATION_ROWS = 1024  # during training; the final loss is over the whole split
BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")  # what a schedule has for each of the optimizer's groups


class RunTrainer(TemperaturesUndecayed):
    """Trainer on rows in their given order, evaluated in fixed groups, with cross-entropy as the loss it reports.

    Args beyond Trainer's:
        rows: training data, in order; evaluated: blocks for the losses during training; corpus: hashes of text
            and tokenizer; first_step: what its steps are counted from; scored_rows: how many are evaluated at most.

    `train(checkpoint)` goes on from a checkpoint that `checkpoints.newest` gave; None starts anew.

    Raises FloatingPointError, naming the step, at losses or weights that are not finite; earlier checkpoints are valid.
    Raises OSError where a checkpoint cannot be written, and leaves nothing of it.
    """

    def __init__(
        self,
        model: MixtureOfTokensForCausalLM,
        args: TrainingArguments,
        *,
        rows: GroupedBatches,
        evaluated: Blocks,
        corpus: str,
        first_step: int = 0,
        scored_rows: int | None = None,
        **kwargs,
    ):
        # Trainer does not save the optimizer of a model that transformers has sharded, and says so here; we do below.
        args.save_only_model = is_sharded(model)
        args.train_sampling_strategy = "sequential"
        # Trainer evaluates only where it is given an evaluation set; `evaluate` does not read it.
        super().__init__(model, args, train_dataset=rows, eval_dataset=rows, data_collator=_shifted_alone, **kwargs)
        args.save_only_model = False
        self.accelerator.dataloader_config.non_blocking = self.args.device.type == "cuda"  # no step waits for the last
        if self.accelerator.ddp_handler is not None:  # else buckets hold all gradients a second time
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # all micro-batches have equally many labels: a mean of means will do
        self.causal_lm, self.rows, self.evaluated, self.corpus = model, rows, evaluated, corpus
        self.scored_rows, self.groups_at_end = scored_rows, groups_of(evaluated, rows.group_size, scored_rows)
        self.run, self.clock = Path(str(self.args.output_dir)), Clock()
        micro_batches = self.args.gradient_accumulation_steps * self.args.world_size
        tokens_per_step = self.args.per_device_train_batch_size * micro_batches * rows.blocks.context
        self.run_log = RunLog(self.run / "metrics.jsonl", tokens_per_step, self.clock, first_step)
        self.add_callback(self.run_log)
        self.add_callback(_RouterGradients(self))
        self.add_callback(BalanceCallback(model))
        probe = evaluated.batch(grouped_order(evaluated, rows.group_size, everything=True)[0], padded=True)
        self.probe = {name: tensor.to(self.args.device) for name, tensor in probe.items()}
        self.gradient_norms: dict[str, float] = {}  # before clipping, as Trainer's own
        self.total_norm: Any = None  # of all gradients before clipping; read only at logged steps
        # Cross-entropy and auxiliary loss of every micro-batch since the last row of metrics.jsonl.
        self._reported: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._waited, self._seconds = 0.0, 0.0  # for batches since the last row, and the clock's time then
        self._ending: Any = None  # an event for the loader's workers: from now on the main process may end them
        self._output_dir: str | None = None  # where a checkpoint is written before it gets its name
        self._failure: OSError | None = None  # of this process, in writing one

    def facts_of(self, checkpoint: Path) -> dict[str, Any]:
        """What is known of a checkpoint. Raises ValueError where it was trained on another text, or is damaged."""
        facts = manifest.read(checkpoint)
        with checkpoints.reading(file := checkpoint / TRAINER_STATE_NAME):
            step = TrainerState.load_from_json(str(file)).global_step
            if step != facts["step"]:
                raise ValueError(f"it is of step {step}")
        if facts["corpus"] != self.corpus:
            raise ValueError(
                f"{checkpoint} was trained on text and tokenizer {facts['corpus']}, and now they are {self.corpus}; "
                "put back what it was trained on, or name another directory with --out; its paths are in config.yaml"
            )
        return facts

    def train(self, checkpoint: Path | None = None):  # pyright: ignore[reportIncompatibleMethodOverride]
        step = rows = 0
        if checkpoint is not None:
            facts = self.facts_of(checkpoint)
            step, rows = facts["step"], facts.get("rows", 0)  # of the file metrics.jsonl
            self.clock.before = facts["seconds"]
            self.rows.go_on_from(facts)
            precision = at_least_fp32(self.causal_lm.dtype)
            of_losses = {"dtype": precision, "device": self.args.device}  # as those that follow
            for loss, aux in facts["reported"]:
                pair = [None if each is None else torch.tensor(each, **of_losses) for each in (loss, aux)]
                self._reported += [tuple(pair)] * self.args.gradient_accumulation_steps  # pyright: ignore
        self._seconds = self.clock.before
        forget_companions(self.causal_lm)  # of a source that it goes on from
        if self.args.world_size > 1:  # each drops other elements of its rows; a checkpoint has all their states
            torch.manual_seed(self.args.seed + self.args.process_index)
        if self.is_world_process_zero():
            self.run_log.forget_after(self.run_log.first_step + step, rows)
        try:
            self.rows.begin(step)
            events = self.run / "tensorboard"
            # All other errors of the disk are named.
            with disk_errors(events), writes_events(self, events, step):
                return super().train(None if checkpoint is None else str(checkpoint))
        except BaseException:
            with suppress(OSError):  # such as of a full disk, which may be what was raised
                self.run_log.close()
            raise
        finally:
            self.rows.end()
            if self._ending is not None:
                self._ending.set()
            self.clock.stop()
            self.run_log.close()  # also of a run that stops in the middle

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if loader.num_workers:
            self._ending = (loader.multiprocessing_context or torch.multiprocessing).Event()
            inner = getattr(loader, "base_dataloader", loader)  # accelerate's loader passes on what is read, not set
            inner.worker_init_fn = partial(begin_worker, self._ending, inner.worker_init_fn)
        return loader

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as `data_wait`."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - since

    def wait_for_rows(self, step: int) -> None:
        """Until the text of this step is there."""
        with self.waiting():
            self.rows.ready(step)

    def get_batch_samples(self, *args, **kwargs):
        self.wait_for_rows(self.state.global_step)
        with self.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        # Copies, as a graph of CUDA writes the next step's over them.
        cross_entropy, aux_loss = outputs.cross_entropy.detach().clone(), outputs.aux_loss
        self._reported.append((cross_entropy, None if aux_loss is None else aux_loss.detach().clone()))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._reported:
            self._check_finite()
            cross_entropies, aux_losses = zip(*self._reported, strict=True)
            logs["loss"] = self._mean(cross_entropies)
            if aux_losses[0] is not None:
                logs["aux_loss"] = self._mean(aux_losses)
            self._reported.clear()
            seconds = self.clock.seconds
            if seconds > self._seconds:
                logs["data_wait"] = float(f"{self._waited / (seconds - self._seconds):.3g}")
            self._waited, self._seconds = 0.0, seconds
            for layer, measured in measure(self.causal_lm, self.probe).items():
                logs |= {f"layer/{layer}/{name}": float(f"{value:.5g}") for name, value in measured.items()}
            logs |= {f"layer/{layer}/router_gradient_norm": norm for layer, norm in self.gradient_norms.items()}
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl has it; checkpoints need not

    def _mean(self, losses: tuple[torch.Tensor, ...]) -> float:
        return self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()  # pyright: ignore

    def _reported_by_step(self) -> list[tuple[float, float | None]]:
        """Means over processes and micro-batches, so that a resumed run may split its batches otherwise."""
        count = self.args.gradient_accumulation_steps
        steps = [self._reported[start : start + count] for start in range(0, len(self._reported), count)]
        pairs = [tuple(zip(*step, strict=True)) for step in steps]
        return [(self._mean(losses), None if aux[0] is None else self._mean(aux)) for losses, aux in pairs]

    def _clip_grad_norm(self, model):
        self.total_norm = super()._clip_grad_norm(model)
        return self.total_norm

    def _check_finite(self) -> None:
        """Raises FloatingPointError in all processes if one has a loss that is not finite."""
        losses: Any = self.accelerator.reduce(torch.stack([loss for loss, _ in self._reported]), "sum")
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            after = len(losses) - int(bad[0])  # micro-batches since, the bad one included
            step = self.state.global_step - (after - 1) // self.args.gradient_accumulation_steps
            loss = losses[int(bad[0])].item()
            raise of_all(FloatingPointError(f"the loss is {loss} at step {step}: try a lower learning rate"))

    def _check_weights(self) -> None:
        """Raises FloatingPointError in all processes if one has weights that are not finite."""
        finite = torch.stack([local(weight).isfinite().all() for weight in self.causal_lm.parameters()])
        bad: Any = self.accelerator.reduce(finite.logical_not().sum(), "sum")
        if bad:
            step = self.state.global_step
            raise of_all(FloatingPointError(f"weights are not finite after step {step}: try a lower learning rate"))

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        with self.clock.stopped():
            loss = self.loss_of(self.causal_lm)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def loss_of(self, model: Any, groups: int | None = None) -> float:
        """A model's loss over the part of the text that is evaluated during training, or over so many groups."""
        return self._evaluate_blocks(model, groups=groups or self.groups_at_once)["loss"]

    @property
    def groups_at_once(self) -> int:
        """Of an evaluation during training."""
        return max(1, min(EVALUATION_ROWS, self.scored_rows or EVALUATION_ROWS) // self.rows.group_size)

    def evaluate_all(self, seed: int) -> dict[str, float]:
        """The result of `evaluate_blocks` over what is scored at the end, grouped by a seed."""
        progress = "Evaluating all of the text" if self.is_world_process_zero() else None
        return self._evaluate_blocks(self.causal_lm, groups=self.groups_at_end, seed=seed, progress=progress)

    def _evaluate_blocks(self, model: Any, **options: Any) -> dict[str, float]:
        """By all processes together."""
        sizes = {"group_size": self.rows.group_size, "batch_size": self.args.per_device_eval_batch_size}
        with self.accelerator.autocast():  # as in training, whether or not it has prepared the model
            found = evaluate_blocks(model, self.evaluated, accelerator=self.accelerator, **sizes, **options)
        if not math.isfinite(loss := found["loss"]):
            step = self.state.global_step
            raise of_all(
                FloatingPointError(f"the evaluation loss is {loss} after step {step}: try a lower learning rate")
            )
        return found

    def _get_output_dir(self, trial) -> str:
        return self._output_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        beside, main = self.run / "checkpoint.partial", self.args.should_save
        written, final = checkpoints.at(beside, step), checkpoints.at(self.run, step)
        if self._reported:
            self._check_finite()
        self._check_weights()
        with self.clock.stopped():
            if main:
                shutil.rmtree(beside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._output_dir = str(beside)
            # A checkpoint is a model that can be served; training goes on without companions, resumed or not.
            calibrate_companions(self.causal_lm, training_groups(self.rows.blocks, self.rows.group_size))
            try:
                with self._failing_together(final):
                    super()._save_checkpoint(model, trial)
                reported = self._reported_by_step()
                with self._failing_together(final):
                    if main:
                        check_optimizer(written)
                        self.run_log.save()
                        facts = {"seconds": self.clock.seconds, "reported": reported, "corpus": self.corpus}
                        facts |= {"rows": self.run_log.written} | self.rows.position(step)
                        manifest.write(written, step=step, **facts)
                        publish(written, final)
                        checkpoints.keep_newest(self.run, step, self.args.save_total_limit)
            finally:
                forget_companions(self.causal_lm)
                self._output_dir = None
                if main:
                    shutil.rmtree(beside, ignore_errors=True)

    @contextmanager
    def _failing_together(self, final: Path) -> Iterator[None]:
        """Raise in all processes what one of them could not write: the others would wait for it."""
        self._failure = None
        with self._keeping_failure(final):
            yield
        said = [message for message in gather_object([self._failure and str(self._failure)]) if message]
        if said:
            raise of_all(OSError(said[0])) from self._failure

    @contextmanager
    def _keeping_failure(self, final: Path) -> Iterator[None]:
        """Keep an error of the disk until all processes are ready to hear of it."""
        try:
            with plain_errors(final):
                yield
        except OSError as error:
            self._failure = self._failure or error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        model, state = self.causal_lm, None
        if is_sharded(model):
            state = whole_state(model)
            with torch.device("meta"):
                model = unsharded(model)
        if self.args.should_save:
            with self._keeping_failure(self.run / Path(output_dir).name):
                model.save_pretrained(output_dir, state_dict=state, max_shard_size=IN_ONE_FILE)
                self.processing_class.save_pretrained(output_dir)  # pyright: ignore

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """By the names of weights, each process its part, so that a run may go on in any layout."""
        optimizer = cast(Any, self.optimizer)
        with self._keeping_failure(self.run / Path(output_dir).name):
            save_optimizer(self.causal_lm, optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # pyright: ignore

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = cast(Any, self.optimizer)
        load_optimizer(self.causal_lm, optimizer.optimizer, Path(checkpoint))
        with checkpoints.reading(file := Path(checkpoint) / SCHEDULER_NAME):
            schedule = torch.load(file, weights_only=True)
            for name in BY_GROUP:  # with expert parallelism there are groups for experts
                schedule[name] = schedule[name][:1] * len(optimizer.param_groups)
            self.lr_scheduler.load_state_dict(schedule)  # pyright: ignore

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(Path(checkpoint or "") / SCALER_NAME):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        of = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with checkpoints.reading(Path(checkpoint or "") / f"rng_state{of}.pth"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.causal_lm
        with checkpoints.reading(file := Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME):
            weights, tied = safetensors.torch.load_file(file), model.all_tied_weights_keys
            own, its = (
                {n: w.shape for n, w in each.items() if n not in tied} for each in (model.state_dict(), weights)
            )
            if other := {name for name, _ in own.items() ^ its.items()}:
                raise ValueError(f"it is not of this model: {few_of(sorted(other))}")
        if is_sharded(model):
            load_whole(model, weights)
        else:
            model.load_state_dict(weights, strict=False)  # of tied ones, one is not saved
        forget_companions(model)


class _RouterGradients(TrainerCallback):
    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if step % state.logging_steps == 0 or (step == 1 and args.logging_first_step):
            total, norms = self.trainer.total_norm, router_gradient_norms(self.trainer.causal_lm)
            kept = 1.0 if total is None else min(1.0, args.max_grad_norm / (float(total) + 1e-6))
            # Clipping sets all gradients to zero if one is infinite.
            self.trainer.gradient_norms = {layer: norm / kept if kept else math.inf for layer, norm in norms.items()}


def _shifted_alone(batch: Any) -> dict[str, torch.Tensor]:
    """`GroupedBatches` gives complete batches. These models need no labels that they would have to shift."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
