"""Training that was killed at any moment and resumed gives the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_decoder

HERE = Path(__file__).parent


@pytest.mark.parametrize("points", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_and_resumed_equals_uninterrupted(tmp_path, points):
    model = write_decoder(tmp_path / "decoder")
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_points.py"), str(model), str(tmp_path), str(points), str(points)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == points, done.stderr[-2000:]
    assert all(line.endswith(" same") for line in lines), done.stdout + (tmp_path / "log").read_text("utf-8")[-2000:]
    # Some were killed with a checkpoint to resume from, or this has tested nothing.
    assert any(int(line.split()[1]) > 0 for line in lines), done.stdout
