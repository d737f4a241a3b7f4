"""The drift benchmarks run at a tiny size, and the committed figures hold what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--runs", "2", "--network-runs", "1", "--patients", "8", "--permutations", "19"]


def run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_sizes_of_all_tests_are_counted_part_by_part(tmp_path):
    out = tmp_path / "size.json"
    run("drift_size.py", "size", *TINY, "--out", str(out))
    run("drift_size.py", "mix", *TINY, "--out", str(out))
    found = json.loads(out.read_text("utf-8"))
    rates = found["size"]["rejections_at_5_percent"]
    assert {"domain_classifier", "mmd", "mlp_classifier", "mmd_within_types", "mmd_paired", "max_t"} <= set(rates)
    assert all(rate["runs"] == 2 for name, rate in rates.items() if name != "mlp_classifier")
    assert "mmd_within_types" in found["mix"]["rejections_at_5_percent"]


def test_committed_sizes_are_within_what_is_allowed():
    found = json.loads((FOLDER / "drift_size.json").read_text("utf-8"))
    rates = found["size"]["rejections_at_5_percent"]
    assert found["size"]["outside"] == []
    assert all(0.03 <= rate["rate"] <= 0.07 for rate in rates.values())
    assert all(rate["runs"] >= 2000 for name, rate in rates.items() if name != "mlp_classifier")
    assert rates["mlp_classifier"]["runs"] >= 400
    within = {name: rate for name, rate in found["mix"]["rejections_at_5_percent"].items() if "within" in name}
    tests = ("domain_classifier", "mmd", "max_t", "length", "vocabulary")
    assert set(within) == {f"{name}_within_types" for name in tests}
    assert all(rate["rate"] <= 0.07 for rate in within.values())
    assert found["split"]["alarms"]["rate"] <= 0.08
    assert found["looks"]["years_with_an_alarm"]["low"] <= 0.05
    assert found["looks"]["years_with_an_alarm_at_5_percent_a_look"]["rate"] > 0.3


@pytest.mark.parametrize("name", ["mmd", "domain classifier", "random features"])
def test_committed_speeds_stand_beside_a_naive_loop(name):
    cases = json.loads((FOLDER / "drift_speed.json").read_text("utf-8"))["cases"]
    for case, found in cases.items():
        if name in case:
            assert found["within"]["by_processor_seconds"], case
            naive = next(v for key, v in found["naive"].items() if key.startswith("processor_seconds"))
            assert naive > 10 * found["ours"]["processor_seconds"]
