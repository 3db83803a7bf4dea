"""The commands that make a finished run again."""

import itertools
import os
import shlex
from pathlib import Path

from mixture_of_tokens.runs.records import CONFIG, Transition
from mixture_of_tokens.runs.run import Run, read_run


class Places:
    """Where runs are made again: in the folder again, by their own names, numbered where several have one."""

    def __init__(self):
        self._names: dict[Path, str] = {}

    def of(self, directory: Path) -> str:
        directory = _named(directory)
        if directory not in self._names:
            names = itertools.chain([directory.name], (f"{directory.name}-{number}" for number in itertools.count(2)))
            self._names[directory] = next(name for name in names if name not in self._names.values())
        return f"again/{self._names[directory]}"


def _named(directory: Path) -> Path:
    """The same place with a name, which . and .. lack."""
    return Path(os.path.abspath(directory))


def commands_of(run: Run, places: Places) -> list[str]:
    """The commands that make such a run again."""
    after, config = run.config.transition, run.model_config
    if after is None:
        return [_train_again(run.directory, places)]
    source, own = Path(after.source), _named(run.directory)
    first = _train_again(source, places)
    steps, rate = run.config.steps, run.config.learning_rate
    if run.switch is None:  # of --anneal, before the switch: one command makes it and the run after it
        whole = _other_part(run, own.name.removesuffix("-annealed"))
        return [first, _annealed(run, after, places)] if whole is None else commands_of(whole, places)
    mixing = 0
    if after.anneal is not None:  # half of the steps came before the switch
        before = _other_part(run, f"{own.name}-annealed")
        mixing = steps if before is None else before.config.steps
    words = ["mot", "transition", places.of(source), "--out", places.of(run.directory)]
    words += ["--top-k", str(config.num_experts_per_tok), "--steps", str(steps + mixing)]
    words += ["--learning-rate", repr(rate)] if steps else []
    drops = "capacity_factor" in run.config.reads and config.capacity_factor is not None
    words += ["--capacity", repr(config.capacity_factor)] if drops else []
    words += ["--scores", "sigmoid" if "sigmoid_choice" in (config.mlp_layer_types or ()) else "softmax"]
    if steps and run.config.of_training("lr_scheduler_type") == "constant":
        words += ["--schedule", "continued"]
    elif run.config.of_training("warmup_steps") == 0 and steps >= 10:  # own has a warm-up
        words += ["--schedule", "decay"]
    given = {key: getattr(after, key) for key in ("calibrate", "distil_steps", "optimizer", "control", "anneal")}
    flags = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    words += [word for flag in flags.items() for word in flag]
    return [first, shlex.join(words)]


def _other_part(run: Run, name: str) -> Run | None:
    """The finished run of this name in the same folder, if one command with --anneal made both."""
    try:
        other = read_run(_named(run.directory).with_name(name))
    except (OSError, ValueError):
        return None
    made_alike = other.config.transition == run.config.transition
    return other if made_alike and (other.switch is None) != (run.switch is None) else None


def _annealed(run: Run, after: Transition, places: Places) -> str:
    """The command without what is known of the run after the switch alone."""
    own = _named(run.directory)
    out = places.of(own.with_name(own.name.removesuffix("-annealed")))
    words = ["mot", "transition", places.of(Path(after.source)), "--out", out]
    words += ["--steps", str(2 * run.config.steps), "--anneal", str(after.anneal)]
    return shlex.join([*words, "--optimizer", after.optimizer])


def _train_again(directory: Path, places: Places) -> str:
    packed = directory.parent / f"{directory.name}.json"  # of a kept run, whose directory there is not
    config = packed if packed.is_file() else directory / CONFIG
    return shlex.join(["mot", "train", "--config", str(config), "--out", places.of(directory)])
