"""The training benchmark runs at a tiny size and its figures hold together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("CLINICAL_NLP_DATA", None)
    return subprocess.run(
        [sys.executable, str(FOLDER / "training.py"), *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def modules():
    """Import the benchmark's own modules, which stand beside the script and in no package."""
    sys.path.insert(0, str(FOLDER))
    import measuring
    import random_llama
    import throughput_gpu

    yield measuring, random_llama, throughput_gpu
    sys.path.remove(str(FOLDER))


def test_padding_compares_the_same_tokens(tmp_path):
    out = tmp_path / "padding.json"
    size = ["--model", "tiny", "--lengths", "128", "--notes", "16", "--test-notes", "80", "--batch", "4"]
    arms = ["--repeats", "1", "--corpus", "synthetic_hospitals", "--arms", "trainer", "bucketed", "packed"]
    done = run("padding", *size, *arms, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text("utf-8"))
    assert {"machine", "packages", "date", "arguments"} <= result.keys()
    cap = result["caps"][0]
    runs = {row["arm"]: row for row in cap["runs"]}
    assert runs.keys() == {"trainer", "bucketed", "packed"}
    assert len({row["tokens"] for row in runs.values()}) == 1
    assert all(row["padded_tokens"] >= row["tokens"] and row["seconds"] > 0 for row in runs.values())
    assert cap["ceiling"] == pytest.approx(runs["trainer"]["padded_tokens"] / cap["tokens"], abs=1e-3)
    before = cap["arms"]["before"]["perplexity"]["value"]
    for arm in runs:
        found = cap["arms"][arm]["perplexity"]
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] < before, "trained on notes, it predicts others no better"


def test_gpu_throughput_on_a_cpu_and_without_one(tmp_path):
    out = tmp_path / "gpu.json"
    size = ["--sizes", "tiny", "--length", "64", "--steps", "1", "--warmup", "1", "--batches", "1", "--documents", "2"]
    switches = ["--compile", "off", "--checkpointing", "on", "--methods", "qlora"]
    done = run("gpu", "--device", "cpu", *size, *switches, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text("utf-8"))["rows"]
    assert "failed" not in row, row
    assert row["tokens_per_second"] > 0
    assert row["timed_steps"] == 1

    done = run("gpu")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("no GPU is visible")


def test_utilisation_counts_four_operations_a_parameter(modules):
    gpu = modules[2]
    # NVIDIA's own LoRA table: Llama-3 8B at 12,473 tokens per second on an H100 is 402 TFLOP/s, 40.6 % of 989.
    found = gpu._utilisation({"parameters": 8.03e9, "tokens_per_second": 12473.0}, 989.0)
    assert found["tflops_4n"] == pytest.approx(402, rel=0.005)
    assert found["mfu_4n"] == pytest.approx(0.406, abs=0.002)
    assert found["mfu_6n"] == pytest.approx(1.5 * found["mfu_4n"], abs=1e-3)


@pytest.mark.parametrize("nf4", [False, True])
def test_a_model_made_on_a_device_is_whole_and_trains_only_its_adapter(modules, nf4):
    import torch

    from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count

    network = modules[1].make_model("tiny", device="cpu", nf4=nf4, attention="sdpa", positions=64)
    assert not any(value.is_meta for value in [*network.parameters(), *network.buffers()])
    assert network.lm_head.weight is network.model.embed_tokens.weight
    kinds = {type(module).__name__ for path, module in network.named_modules() if path.endswith("_proj")}
    assert kinds == {"Linear4bit" if nf4 else "Linear"}
    assert trainable_count(network)[1] == sum(size.numel() for size in _sizes(modules[1]))
    network = apply_strategy(network, StrategyConfig(name="qlora" if nf4 else "lora", rank=4), seed=0)
    ids = torch.arange(3, 35)[None]
    network(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, value in network.named_parameters() if value.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def _sizes(random_llama):
    import torch

    config = random_llama.llama_config("tiny")
    return [torch.Size(size) for _, size in random_llama._weights(config)]


def test_a_written_model_loads_whole(modules, tmp_path):
    from clinical_nlp.models.loading import load_base

    folder = modules[1].write_model(tmp_path / "model", "tiny", shards=2)
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert load_base(str(folder), kind="causal").network.config.hidden_size == 64


def test_peak_sees_memory_that_is_gone_again(modules):
    """In a process of its own, as the benchmark measures: this one may hold freed memory that a block is cut from."""
    measuring = modules[0]
    if not measuring.unreclaimable():
        pytest.skip("this system does not say what a process holds")
    script = """
import time
import measuring
with measuring.Peak() as peak:
    block = bytearray(64 * measuring.MIB)
    block[::4096] = b"x" * len(block[::4096])
    until = time.monotonic() + 30
    while peak.bytes - peak.before < 60 * measuring.MIB and time.monotonic() < until:
        time.sleep(0.001)  # the watching thread needs a turn while the block is there
    del block
    after = measuring.settled()
print(peak.bytes - peak.before, peak.bytes - after)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    above_start, above_end = (int(value) for value in done.stdout.split())
    assert above_start >= 60 * measuring.MIB
    assert above_end >= 60 * measuring.MIB
