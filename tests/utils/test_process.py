"""How the threads of a process wait for each other: as `mot` sets it before torch is loaded, or as the user does."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from mixture_of_tokens import __main__ as command
from mixture_of_tokens import generate
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.utils import cpu
from mixture_of_tokens.utils.cpu import cores, spin_briefly
from mixture_of_tokens.utils.process import is_main, process_count, process_number

OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
PLAN = [sys.executable, "-m", "mixture_of_tokens", "plan", "Transformer-Nano"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
def test_openmp_is_loaded_with_brief_spinning():
    """As OpenMP itself shows its settings when it is loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(PLAN, capture_output=True, text=True, check=True, env=environment)
    assert "GOMP_SPINCOUNT = '2000'" in done.stderr


@pytest.mark.parametrize("name", [None, *OPENMP])
def test_who_has_chosen_how_threads_wait_keeps_their_choice(name, monkeypatch):
    for each in OPENMP:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "777")
    assert spin_briefly() == (name is None)
    found = {each: os.environ[each] for each in OPENMP if each in os.environ}
    assert found == ({"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"} if name is None else {name: "777"})


def test_a_number_without_others_is_one_process(monkeypatch):
    """As an environment may have it that torchrun has not made."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert (process_count(), process_number(), is_main()) == (1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (process_count(), process_number(), is_main()) == (2, 1, False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE=two in the environment is no whole number: torchrun sets it"):
        process_count()


SAYS = "from mixture_of_tokens.training.signals import seconds_after_signal as s; print(s())"


def seconds_said(*flags: str, **environment: str) -> str:
    """By a process that another one has started, with these flags, as torchrun does."""
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    words = [sys.executable, "-c", start, SAYS, *flags]
    return subprocess.run(
        words, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 12) or sys.platform != "linux", reason="of torch 2.12, on Linux")
def test_it_is_known_how_long_torchrun_waits():
    started = {"TORCHELASTIC_RUN_ID": "none"}
    assert seconds_said("--shutdown-timeout", "77", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="55", **started) == "77"
    assert seconds_said(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="55", **started) == "55"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are chosen for a process on Linux alone")
def test_cores_are_those_that_the_process_may_run_on(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 9})
    assert cores() == provenance.hardware()["cores"] == 3


def test_the_command_line_alone_keeps_freed_memory(tiny_runs, monkeypatch):
    called = []
    libc = SimpleNamespace(mallopt=lambda *given: called.append(given))
    monkeypatch.setattr(cpu, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    for name, value in {"TQDM_MININTERVAL": "30", "HF_HUB_VERBOSITY": "error"}.items():  # which `main` sets
        monkeypatch.setenv(name, value)
    generate(tiny_runs["MoT-Nano/4E/2"], prompt=["abc"], max_new_tokens=1)
    assert not called
    monkeypatch.setattr(sys, "argv", ["mot", "--version"])
    with suppress(SystemExit):
        command.main()
    assert bool(called) == (sys.platform == "linux" and platform.libc_ver()[0] == "glibc")
