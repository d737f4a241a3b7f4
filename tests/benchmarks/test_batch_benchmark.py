"""The batch benchmark runs at a tiny size: its stub annotator gives every column that mentions have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch.py"


def run(out: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8"))


def test_linear(tmp_path):
    found = run(tmp_path / "linear.json", "--scratch", str(tmp_path), "linear", "--notes", "2000")
    assert found["all_notes"]["notes"] == 2000
    assert found["half_of_the_notes"]["notes"] == 1000
    assert 0 < found["all_notes"]["ledger_share"] < 1


def test_speed_counts_every_note(tmp_path):
    found = run(tmp_path / "speed.json", "--scratch", str(tmp_path), "speed", "--short", "20", "--long", "4")
    assert [(row["words"], row["notes"], row["workers"]) for row in found["runs"]] == [
        (300, 20, 1), (300, 20, 2), (1900, 4, 1), (1900, 4, 2)
    ]  # fmt: skip
    assert found["runs"][0]["mentions_per_note"] == found["runs"][1]["mentions_per_note"] > 1
