"""What a result depends on besides its configuration: versions, commit, hardware."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixture_of_tokens.utils.cpu import cores

PACKAGES = ("mixture-of-tokens", "torch", "transformers", "accelerate", "tokenizers", "numpy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """None for what is not installed: this package, where it runs from a checkout."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def commit() -> str | None:
    """The commit of this checkout, with a "+" if tracked files have changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", here, *words], capture_output=True, text=True, check=False
            ).stdout.strip()
        except FileNotFoundError:  # no git on this machine
            return ""

    followed = git("ls-files", Path(__file__).name)  # an installed copy may lie within another project's repository
    revision = git("rev-parse", "--short=12", "HEAD") if followed else ""
    return revision + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if revision else None


def hardware(device: str | None = None) -> dict[str, Any]:
    """Name of the processor, or of the GPU where "cuda" is asked for or found; cores; the threads that torch uses."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", cpuinfo)
    name = model[1] if model else platform.processor() or platform.machine()
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        name = torch.cuda.get_device_name()
    return {"hardware": name, "cores": cores(), "threads": torch.get_num_threads()}
