"""Two processes learn what one learns from the same batches, and one of them writes the run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_decoder


def run_ner(model, output, *launcher, **settings):
    command = [sys.executable, *launcher, "-m", "clinical_nlp", "run", "ner", "--output", str(output)]
    options = {
        "base_model": str(model),
        "corpus.options.patients": 6,
        "window": 64,
        "overlap": 16,
        "training.epochs": 2,
        "training.batch_size": 6,
        "training.accumulation": 2,
        **settings,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("strategy", ["lora", "gradual"])
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path, strategy):
    model = write_decoder(tmp_path / "decoder")
    settings = {"strategy.name": strategy}
    one = run_ner(model, tmp_path / "one", **settings)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    two = run_ner(model, tmp_path / "two", *launcher, **settings)
    manifests = [json.loads((run / "manifest.json").read_text("utf-8")) for run in (one, two)]
    assert [manifest["training"]["processes"] for manifest in manifests] == [1, 2]
    assert len({manifest["training"]["steps"] for manifest in manifests}) == 1
    folder = "model/model.safetensors" if strategy == "gradual" else "adapter/adapter_model.safetensors"
    for name in (folder, "head.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.allclose(value, second[key], atol=2e-5, rtol=1e-3), (name, key)
    scores = [json.loads((run / "metrics.json").read_text("utf-8"))["test.f1_strict"] for run in (one, two)]
    assert scores[0]["value"] == pytest.approx(scores[1]["value"], abs=0.02)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
