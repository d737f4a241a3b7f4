"""A discriminator is trained by two processes together: both see its gradients, and the run is whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from safetensors.torch import load_file
from tiny_models import write_decoder


def test_dann_trains_in_two_processes(tmp_path):
    model = write_decoder(tmp_path / "decoder")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [sys.executable, *launcher, "-m", "clinical_nlp", "run", "ner", "--output", str(tmp_path / "run")]
    options = {
        "base_model": model,
        "corpus.options.patients": 8,
        "corpus.options.notes_per_patient": "[1, 1]",
        "window": 64,
        "overlap": 16,
        "strategy.name": "lora",
        "objective.name": "dann",
        "max_steps": 4,
        "training.batch_size": 12,
        "training.save_steps": 4,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert manifest["training"]["processes"] == 2
    assert manifest["objective"]["name"] == "dann"
    saved = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainable.safetensors")
    last = saved["objective.discriminator.6.weight"]
    assert last.shape[0] == 3
