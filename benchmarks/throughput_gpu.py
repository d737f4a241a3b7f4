"""Throughput and peak memory of adapter training on Llama-shaped models with random weights: `training.py gpu`.

MFU follows the 4N convention: with a frozen base a token costs 2N operations forward and 2N backward (no weight
gradients), N being all parameters of the base, a tied embedding counted once. Attention, the adapter and what gradient
checkpointing computes again are not counted. 6N is what is often quoted, and 1.5 times as much.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from measuring import MIB, Counter, Peak, Stopwatch, in_fresh_process, settled, write_result
from random_llama import SHAPES, make_model

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16 peak by a part of the GPU's name (NVIDIA's data sheets, SXM)."""
GOALS = {
    ("8b", "lora"): "MFU (4N) at least 45 %",
    ("8b", "qlora"): "MFU (4N) at least 35 %",
    "memory": "8b qlora at batch 1 x 2048 within 10 GB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `training.py gpu`."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["0.5b", "1.5b", "3b", "8b"])
    parser.add_argument("--methods", nargs="+", choices=["lora", "qlora"], default=["lora", "qlora"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row; there is no padding")
    parser.add_argument("--batches", nargs="+", type=int, default=[2], help="rows of a forward pass")
    parser.add_argument("--documents", nargs="+", type=int, default=[1], help="documents packed into a row")
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["on"], help="each decoder layer")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flash_attention_2", "flex_attention", "eager"])
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, on all linear layers")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, which compile")
    parser.add_argument("--memory-length", type=int, default=2048, help="row of the memory run (8b qlora, batch 1)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a GPU that the table does not have")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already and measure the rest")


def main(arguments: argparse.Namespace, script: str, work: str) -> None:
    """Measure every combination in its own process; the file is written after each."""
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch; use --device cpu --sizes tiny for a trial without one")
    peak = arguments.peak_tflops
    if arguments.device == "cuda" and peak is None:
        name = torch.cuda.get_device_name(0)
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    rows: list[dict[str, Any]] = []
    if arguments.resume and arguments.out and Path(arguments.out).is_file():
        kept = json.loads(Path(arguments.out).read_text("utf-8"))["rows"]
        rows = [row for row in kept if "failed" not in row]
    for setting in _settings(arguments):
        if any(all(row[key] == value for key, value in setting.items()) for row in rows):
            continue
        common = {"kind": "gpu", "device": arguments.device, "attention": arguments.attention, "rank": arguments.rank}
        specification = common | setting | {name: getattr(arguments, name) for name in ("steps", "warmup", "threads")}
        found = in_fresh_process(script, work, specification, cpu=arguments.device == "cpu")
        rows.append(setting | found | _utilisation(found, peak))
        result = {"peak_tflops": peak, "convention": (__doc__ or "").partition("\n\n")[2].replace("\n", " ").strip()}
        write_result(arguments.out, "gpu", arguments, result | {"summary": _summary(rows), "rows": rows})


def _settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    keys = ("size", "method", "batch", "documents", "checkpointing", "compile")
    values = (arguments.sizes, arguments.methods, arguments.batches, arguments.documents)
    switches = ([value == "on" for value in choice] for choice in (arguments.checkpointing, arguments.compile))
    found = [
        dict(zip(keys, combination, strict=True)) | {"length": arguments.length}
        for combination in itertools.product(*values, *switches)
    ]
    if "8b" in arguments.sizes and "qlora" in arguments.methods:
        least = {"size": "8b", "method": "qlora", "batch": 1, "documents": 1, "checkpointing": True, "compile": False}
        found.append(least | {"length": arguments.memory_length})
    return found


def _utilisation(found: dict[str, Any], peak: float | None) -> dict[str, Any]:
    if "failed" in found:
        return {}
    rate = found["parameters"] * found["tokens_per_second"] / 1e12
    shares = {} if peak is None else {"mfu_4n": round(4 * rate / peak, 4), "mfu_6n": round(6 * rate / peak, 4)}
    return {"tflops_4n": round(4 * rate, 3), **shares}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest setting of each size and method, and the smallest memory that 8b qlora was run in."""
    summary: dict[str, Any] = {}
    whole = [row for row in rows if "failed" not in row]
    for size, method in dict.fromkeys((row["size"], row["method"]) for row in whole):
        best = max(
            (row for row in whole if (row["size"], row["method"]) == (size, method)),
            key=lambda row: row["tokens_per_second"],
        )
        kept = ("tokens_per_second", "mfu_4n", "mfu_6n", "peak_allocated_gib", "peak_unreclaimable_mib")
        settings = ("batch", "length", "documents", "checkpointing", "compile")
        summary[f"{size} {method}"] = {key: best[key] for key in (*kept, *settings) if key in best}
        if goal := GOALS.get((size, method)):
            summary[f"{size} {method}"]["goal"] = goal
    least = [row for row in whole if (row["size"], row["method"], row["batch"]) == ("8b", "qlora", 1)]
    if least and "peak_reserved_gib" in least[-1]:
        gigabytes = {name: round(least[-1][f"peak_{name}_gib"] * 1.073741824, 2) for name in ("allocated", "reserved")}
        summary["8b qlora memory"] = {"gigabytes": gigabytes, "length": least[-1]["length"], "goal": GOALS["memory"]}
    return summary


def measure(specification: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train one model for a few steps through the package's own strategy and trainer (runs in a fresh process).

    Returns
    -------
    Tokens per second over the timed steps, parameters, and peak memory of making the model and of training it.
    """
    import datasets
    import torch

    from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
    from clinical_nlp.models.blocks import blocks_of
    from clinical_nlp.models.loading import load_tokenizer
    from clinical_nlp.models.resolve import resolve_model
    from clinical_nlp.runs import Run
    from clinical_nlp.tasks.pretraining import collate_packed
    from clinical_nlp.training.trainer import TrainingConfig, train

    device, nf4 = specification["device"], specification["method"] == "qlora"
    length, batch, documents = specification["length"], specification["batch"], specification["documents"]
    gpu = device == "cuda"
    with Peak() as made:
        network = make_model(
            specification["size"], device=device, nf4=nf4, attention=specification["attention"], positions=length
        )
    made_gpu = torch.cuda.max_memory_allocated() if gpu else 0
    parameters = trainable_count(network)[1]
    strategy = StrategyConfig(name=specification["method"], rank=specification["rank"], alpha=2 * specification["rank"])
    network = apply_strategy(network, strategy, seed=0)
    if specification["compile"]:
        for layer in network.get_submodule(blocks_of(network)[0]):
            layer.compile(dynamic=False)
    steps = specification["warmup"] + specification["steps"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, network.config.vocab_size, (steps * batch, length), generator=generator).tolist()
    cuts = [length * place // documents for place in range(documents + 1)]
    sizes = [after - before for before, after in itertools.pairwise(cuts)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "seq_lengths": [sizes] * len(ids)})
    collate = Counter(lambda examples: collate_packed(examples, 0), 0)
    config = TrainingConfig(
        epochs=1,
        batch_size=batch,
        precision="bf16",
        gradient_checkpointing=specification["checkpointing"],
        save_steps=10**6,
    )
    settled()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with (
        Run.open(work / "run", config, recipe="benchmark") as run,
        Peak() as peak,
        Stopwatch(network, skip=specification["warmup"]) as watch,
    ):
        train(
            network,
            rows,
            collate,
            config=config,
            run=run,
            seed=0,
            lengths=[length] * len(rows),
            tokenizer=load_tokenizer(resolve_model("builtin:tiny")),
            strategy=strategy,
            language_model=True,
        )
    found: dict[str, Any] = {
        "parameters": parameters,
        "trainable_parameters": trainable_count(network)[0],
        "tokens_per_second": round(watch.steps * batch * length / watch.seconds, 1),
        "seconds_per_step": round(watch.seconds / watch.steps, 4),
        "timed_steps": watch.steps,
        "peak_unreclaimable_mib": round(peak.bytes / MIB),
        "peak_making_mib": round(max(made.bytes, made_gpu) / MIB),
    }
    if gpu:
        found["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return found
