"""How the threads of a process wait for each other: as `mot` sets it before torch is loaded, or as the user does."""

import os
import subprocess
import sys

import pytest

OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
PLAN = [sys.executable, "-m", "mixture_of_tokens", "plan", "Transformer-Nano"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '2000'"),
        ({"GOMP_SPINCOUNT": "777"}, "GOMP_SPINCOUNT = '777'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_openmp_is_loaded_with_brief_spinning_unless_the_user_chose(given, expected):
    """As OpenMP itself shows its settings when it is loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP}
    environment = kept | given | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(PLAN, capture_output=True, text=True, check=True, env=environment)
    assert expected in done.stderr
    assert ("GOMP_SPINCOUNT = '2000'" in done.stderr) == (not given)
