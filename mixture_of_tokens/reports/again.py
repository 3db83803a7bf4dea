"""The commands that make a finished run again."""

import shlex
from pathlib import Path

from mixture_of_tokens.runs.records import CONFIG, Transition
from mixture_of_tokens.runs.run import Run, read


def commands_of(run: Run) -> list[str]:
    """The commands that make such a run again."""
    after, config = run.config.transition, run.model_config
    if after is None:
        return [_train_again(run.directory)]
    source = Path(after.source)
    steps, rate = run.config.steps, run.config.learning_rate
    if run.switch is None:  # of --anneal, before the switch: one command makes it and the run after it
        whole = _other_part(run, run.directory.name.removesuffix("-annealed"))
        return [_train_again(source), _annealed(run, after)] if whole is None else commands_of(whole)
    mixing = 0
    if after.anneal is not None:  # half of the steps came before the switch
        before = _other_part(run, f"{run.directory.name}-annealed")
        mixing = steps if before is None else before.config.steps
    words = ["mot", "transition", f"again/{source.name}", "--out", place_of(run)]
    words += ["--top-k", str(config.num_experts_per_tok), "--steps", str(steps + mixing)]
    words += ["--learning-rate", repr(rate)] if steps else []
    words += [] if config.capacity_factor is None else ["--capacity", repr(config.capacity_factor)]
    words += ["--scores", "sigmoid" if "sigmoid_choice" in (config.mlp_layer_types or ()) else "softmax"]
    if steps and run.config.of_training("lr_scheduler_type") == "constant":
        words += ["--schedule", "continued"]
    elif run.config.of_training("warmup_steps") == 0 and steps >= 10:  # own has a warm-up
        words += ["--schedule", "decay"]
    given = {key: getattr(after, key) for key in ("calibrate", "distil_steps", "optimizer", "control", "anneal")}
    flags = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    words += [word for flag in flags.items() for word in flag]
    return [_train_again(source), shlex.join(words)]


def place_of(run: Run) -> str:
    """Where `commands_of` makes the run."""
    after, name = run.config.transition, run.directory.name
    if after is not None and name == Path(after.source).name:
        name = f"{name}-transition"
    return f"again/{name}"


def _other_part(run: Run, name: str) -> Run | None:
    """The finished run of this name in the same folder, if one command with --anneal made both."""
    try:
        other = read(run.directory.with_name(name))
    except (OSError, ValueError):
        return None
    made_alike = other.config.transition == run.config.transition
    return other if made_alike and (other.switch is None) != (run.switch is None) else None


def _annealed(run: Run, after: Transition) -> str:
    """The command without what is known of the run after the switch alone."""
    out = f"again/{run.directory.name.removesuffix('-annealed')}"
    words = ["mot", "transition", f"again/{Path(after.source).name}", "--out", out]
    words += ["--steps", str(2 * run.config.steps), "--anneal", str(after.anneal)]
    return shlex.join([*words, "--optimizer", after.optimizer])


def _train_again(directory: Path) -> str:
    packed = directory.with_name(f"{directory.name}.json")
    config = packed if packed.is_file() else directory / CONFIG
    return shlex.join(["mot", "train", "--config", str(config), "--out", f"again/{directory.name}"])
