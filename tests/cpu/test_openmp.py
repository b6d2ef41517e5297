"""How long OpenMP's threads spin: bounded before torch is loaded, unless the user has said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "import posttrain, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["ours", "spins", "policy"],
)
def test_the_spin_is_bounded_and_a_user_s_setting_wins(own: dict[str, str], expected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | own
    out = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [expected, "False"]
