"""The commands that make a finished run again."""

import itertools
import os
import shlex
from pathlib import Path

from mixture_of_tokens.runs.records import CONFIG, RETIRED
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.utils.formatting import enumerated


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
        return [*_gone(run), _train_again(run.directory, places)]
    source = Path(after.source)
    first = _train_again(source, places)
    if run.switch is None:  # the part before the switch, of --anneal
        return [first, *_gone(run)]
    steps, rate = run.config.steps, run.config.learning_rate
    words = ["mot", "transition", places.of(source), "--out", places.of(run.directory)]
    words += ["--top-k", str(config.num_experts_per_tok), "--steps"]
    words += [str(steps if after.anneal is None else 2 * steps)]  # half of them came before the switch
    words += ["--learning-rate", repr(rate)] if steps else []
    drops = "capacity_factor" in run.config.reads and config.capacity_factor is not None
    words += ["--capacity", repr(config.capacity_factor)] if drops else []
    words += ["--scores", "sigmoid" if "sigmoid_choice" in (config.mlp_layer_types or ()) else "softmax"]
    words += ["--norm-topk-prob"] if config.norm_topk_prob else []
    if steps and run.config.of_training("lr_scheduler_type") == "constant":
        words += ["--schedule", "continued"]
    elif run.config.of_training("warmup_steps") == 0 and steps >= 10:  # own has a warm-up
        words += ["--schedule", "decay"]
    given = {key: getattr(after, key) for key in ("calibrate", "distil_steps", "optimizer", "control", "anneal")}
    flags = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    words += [word for flag in flags.items() for word in flag]
    return [first, *_gone(run), shlex.join(words)]


def _gone(run: Run) -> list[str]:
    """A comment on a command with flags of an earlier version, if it has such."""
    asked = {key.rpartition(".")[2]: value for key, value in run.config.identity().items()}
    gone = [f"--{key.replace('_', '-')}" for key in RETIRED if asked.get(key) is not None]
    gone += ["--calibrate scales"] if asked.get("calibrate") == "scales" else []
    return [f"# Commit 8112891 is the last with {enumerated(gone)}"] if gone else []


def _train_again(directory: Path, places: Places) -> str:
    packed = directory.parent / f"{directory.name}.json"  # of a kept run, whose directory there is not
    config = packed if packed.is_file() else directory / CONFIG
    return shlex.join(["mot", "train", "--config", str(config), "--out", places.of(directory)])
