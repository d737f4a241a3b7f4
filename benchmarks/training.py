"""Speed, memory and score of training: `python benchmarks/training.py padding|memory|ablation|gpu [--out FILE]`.

padding   stock transformers Trainer and stock TRL SFTTrainer against this package, same model, same notes, same tokens
memory    NF4 QLoRA against bf16 LoRA on a model of about 1 B parameters: memory that the kernel cannot drop
ablation  what each measure adds to the one before, in speed and memory
gpu       adapters on models of 0.5 B to 8 B parameters at 4096 tokens: throughput, MFU, peak memory
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import throughput_gpu
from measuring import MIB, Counter, Peak, Stopwatch, in_fresh_process, settled, unreclaimable, write_result
from random_llama import SHAPES, write_model

ARMS = ("trainer", "trl", "bucketed", "packed")
"""Stock transformers Trainer, stock TRL SFTTrainer, and this package with rows of similar length or packed rows."""
LADDER = ("baseline", "bucketing", "packing", "bf16", "checkpointing", "compile", "lora", "4-bit")
"""Each rung keeps the ones before it, but that packing takes the place of bucketing."""


class Notes:
    """Token rows of a corpus: notes to train on and notes of other patients to score on, cut at `length` tokens.

    Parameters
    ----------
    corpus : its name; `auto` is mtsamples where its data is found, else synthetic_hospitals.
    length : longer notes lose their end, for every trainer alike.
    train, test : how many notes are drawn; near duplicates are never on both sides.
    """

    def __init__(self, corpus: str, tokenizer: Any, *, length: int, train: int, test: int, seed: int) -> None:
        import numpy as np

        from clinical_nlp.config import SplitConfig
        from clinical_nlp.errors import MissingDataError
        from clinical_nlp.notes.corpus import load_corpus
        from clinical_nlp.notes.splitting import split_without_duplicates
        from clinical_nlp.tasks.pretraining import encode

        self.corpus = "mtsamples" if corpus == "auto" else corpus
        try:
            notes = load_corpus(self.corpus, None).notes
        except MissingDataError:
            if corpus != "auto":
                raise
            self.corpus = "synthetic_hospitals"
            notes = load_corpus(self.corpus, None).notes
        # Drawn before duplicates are looked for, which takes long on a whole corpus.
        drawn = np.random.default_rng(seed).permutation(notes.num_rows)[: 3 * (train + test)]
        notes = notes.take(np.sort(drawn))
        split, _ = split_without_duplicates(notes, SplitConfig(name="random", development=0.0, test=0.3), seed=seed)
        self.seed = seed
        rng = np.random.default_rng(seed)
        chosen = [rng.permutation(part)[:size] for part, size in ((split.train, train), (split.test, test))]
        texts = notes["text"].to_pylist()
        rows = [encode([texts[row] for row in part], tokenizer) for part in chosen]
        self.train, self.test = ([row[:length] for row in part] for part in rows)
        patients, places = notes["patient_id"].to_pylist(), notes["institution"].to_pylist()
        self.train_patients, self.test_patients = ([patients[row] for row in part] for part in chosen)
        self.train_institutions = [places[row] for row in chosen[0]]

    def short(self, count: int) -> Notes:
        """Return the same with the first 64 tokens of `count` notes to train on."""
        fewer = copy.copy(self)
        fewer.train = [row[:64] for row in self.train[:count]]
        return fewer

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(map(len, self.train))


def train_stock(
    kind: str, network: Any, tokenizer: Any, notes: Notes, folder: Path, *, batch: int, rate: float, max_steps: int = -1
) -> Counter:
    """Train one epoch with a library's own trainer, its defaults but the learning rate, in the order of `notes.seed`.

    Returns
    -------
    What its collator counted.
    """
    import datasets
    import transformers
    import trl

    transformers.utils.logging.set_verbosity_error()
    rows = datasets.Dataset.from_dict({"input_ids": notes.train})
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "seed": notes.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": not _gpu(),
    }
    if kind == "trainer":
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer: Any = transformers.Trainer(
            model=network, args=transformers.TrainingArguments(**common), train_dataset=rows, data_collator=collate
        )
    else:
        longest = max(map(len, notes.train))
        arguments = trl.SFTConfig(**common, max_length=longest)
        trainer = trl.SFTTrainer(model=network, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.data_collator = counter = Counter(trainer.data_collator, tokenizer.pad_token_id)
    trainer.train()
    return counter


def train_ours(
    batching: str,
    base: Any,
    network: Any,
    notes: Notes,
    folder: Path,
    *,
    length: int,
    batch: int,
    rate: float,
    strategy: str = "full",
    precision: str = "auto",
    checkpointing: bool = False,
    max_steps: int | None = None,
) -> Counter:
    """Train one epoch with this package, on rows of one note each or on packed rows.

    A packed batch has as many rows as make up the tokens of `batch` notes, so that every trainer takes the same number
    of steps over the same tokens.
    """
    from clinical_nlp.adaptation.strategies import StrategyConfig
    from clinical_nlp.runs import Run
    from clinical_nlp.tasks.pretraining import language_task
    from clinical_nlp.training.trainer import TrainingConfig, train

    task = language_task(base, length, batching=batching)  # type: ignore[arg-type]
    arranged = task.arrange(notes.train, notes.train_patients, notes.train_institutions)
    examples = task.examples([arranged], seed=notes.seed)
    lengths = [len(ids) for ids in examples["input_ids"]]
    if batching == "packed":
        batch = max(1, round(batch * len(lengths) / len(notes.train)))
    config = TrainingConfig(
        epochs=1,
        batch_size=batch,
        learning_rate=rate,
        warmup=0.0,  # as the stock trainers have it, so that only what is compared differs
        weight_decay=0.0,
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
        save_steps=10**6,
    )
    counter = Counter(task.collate, task.pad_token_id)
    with Run.open(folder, config, recipe="benchmark") as run:
        train(
            network,
            examples,
            counter,
            config=config,
            run=run,
            seed=notes.seed,
            lengths=lengths,
            tokenizer=base.tokenizer,
            strategy=StrategyConfig(name=strategy),  # type: ignore[arg-type]
            language_model=True,
            max_steps=max_steps,
        )
    return counter


def train_arm(arm: str, model: Path, notes: Notes, *, length: int, batch: int, rate: float) -> tuple[dict, Any]:
    """Load the model, train one epoch with one of `ARMS`, measure it; return the figures and the trained network."""
    from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
    from clinical_nlp.models.loading import load_base

    base = load_base(str(model), kind="causal")
    network = apply_strategy(base.network, StrategyConfig(name="full"), seed=notes.seed)
    settled()
    with tempfile.TemporaryDirectory() as folder, Peak() as peak, Stopwatch(network) as watch:
        options: dict[str, Any] = {"batch": batch, "rate": rate}
        if arm in ("trainer", "trl"):
            counter = train_stock(arm, network, base.tokenizer, notes, Path(folder), **options)
        else:
            counter = train_ours(arm, base, network, notes, Path(folder) / "run", length=length, **options)
    if counter.real != notes.tokens:
        raise SystemExit(f"{arm} trained on {counter.real} tokens and not on {notes.tokens}: it is not comparable")
    return {
        "arm": arm,
        "seed": notes.seed,
        "tokens": counter.real,
        "padded_tokens": counter.padded,
        "steps": watch.steps,
        "seconds": round(watch.seconds, 2),
        "processor_seconds": round(watch.processor_seconds, 2),
        "peak_mib_above_model": round((peak.bytes - peak.before) / MIB, 1),
    }, network


def padding(arguments: argparse.Namespace, work: Path) -> None:
    """Compare trainers that pad random batches with ours, turn about, and score what each has learned."""
    import torch

    from clinical_nlp.models.loading import load_base

    torch.set_num_threads(arguments.threads)
    model = _model(arguments.model, work)
    caps: list[dict[str, Any]] = []
    for length, count in zip(arguments.lengths, _each(arguments.notes, arguments.lengths), strict=True):
        base = load_base(str(model), kind="causal")
        notes = Notes(
            arguments.corpus, base.tokenizer, length=length, train=count, test=arguments.test_notes, seed=arguments.seed
        )
        common: dict[str, Any] = {"length": length, "batch": arguments.batch, "rate": arguments.learning_rate}
        runs: list[dict[str, Any]] = []
        losses = {"before": _losses(base.network, notes, length)}
        for arm in arguments.arms:  # what is slow only the first time is not measured
            train_arm(arm, model, notes.short(2 * arguments.batch), **common)
        for repeat in range(arguments.repeats):
            # Turned round each time, so that a machine that warms up or slows down favours nobody.
            for arm in arguments.arms if repeat % 2 == 0 else arguments.arms[::-1]:
                figures, network = train_arm(arm, model, notes, **common)
                runs.append({"repeat": repeat} | figures)
                if arm not in losses:
                    losses[arm] = _losses(network, notes, length)
                print(f"cap {length} repeat {repeat} {arm}: {figures['processor_seconds']} s", file=sys.stderr)
        caps.append({"cap": length, "corpus": notes.corpus, "notes": count, **_compare(runs, losses, notes)})
        caps[-1]["runs"] = runs
        facts = {"model": arguments.model, "parameters": sum(value.numel() for value in base.network.parameters())}
        write_result(arguments.out, "padding", arguments, facts | {"what": _PADDING, "caps": caps})


_PADDING = (
    "One epoch over the same notes, every weight trained in fp32 (TRL's defaults are bf16 and gradient checkpointing), "
    "the same learning rate, batches of the same number of tokens. tokens_per_second counts tokens that are not "
    "padding, over processor time, the median of the repeats; wall time is beside it. ceiling: tokens of the stock "
    "Trainer's batches with padding over those without. share_of_ceiling: speed over the stock Trainer's, divided by "
    "the ceiling; above 1 where also attention over padding is saved. perplexity: of held-out notes, 95 % interval "
    "over patients; perplexity_ratio: to the stock Trainer on the same patients."
)


def _compare(runs: list[dict[str, Any]], losses: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Summarise the runs of one cap: speed, share of the padding ceiling, perplexity with its interval."""
    import numpy as np

    from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
    from clinical_nlp.tasks.pretraining import perplexity

    by_arm = {arm: [run for run in runs if run["arm"] == arm] for arm in dict.fromkeys(run["arm"] for run in runs)}
    reference = by_arm.get("trainer")
    ceiling = None if reference is None else reference[0]["padded_tokens"] / notes.tokens
    arms: dict[str, Any] = {}
    for arm, own in by_arm.items():
        found: dict[str, Any] = {
            "tokens_per_second": round(statistics.median(run["tokens"] / run["processor_seconds"] for run in own), 1),
            "tokens_per_second_wall": round(statistics.median(run["tokens"] / run["seconds"] for run in own), 1),
            "padded_per_token": round(statistics.mean(run["padded_tokens"] / run["tokens"] for run in own), 3),
            "steps": own[0]["steps"],
            "peak_mib_above_model": max(run["peak_mib_above_model"] for run in own),
        }
        if reference is not None and ceiling is not None:
            for key, suffix in (("processor_seconds", ""), ("seconds", "_wall")):
                pairs = [before[key] / after[key] for before, after in zip(reference, own, strict=True)]
                found[f"speedup{suffix}"] = round(statistics.median(pairs), 3)
                found[f"share_of_ceiling{suffix}"] = round(statistics.median(pairs) / ceiling, 3)
            found["speedup_of_each_repeat"] = [
                round(before["processor_seconds"] / after["processor_seconds"], 3)
                for before, after in zip(reference, own, strict=True)
            ]
        arms[arm] = found
    for arm, counts in losses.items():
        both = by_patient(notes.test_patients, np.concatenate([losses.get("trainer", counts), counts], axis=1))
        common: dict[str, Any] = {"n_notes": len(notes.test), "seed": notes.seed}
        own = arms.setdefault(arm, {})
        own["perplexity"] = _estimate(patient_bootstrap(both, lambda c: perplexity(c[..., 2:]), **common))
        if arm not in ("before", "trainer") and "trainer" in losses:
            ratio = patient_bootstrap(both, lambda c: perplexity(c[..., 2:]) / perplexity(c[..., :2]), **common)
            own["perplexity_ratio"] = _estimate(ratio)
    return {"tokens": notes.tokens, "ceiling": None if ceiling is None else round(ceiling, 3), "arms": arms}


def memory(arguments: argparse.Namespace, work: Path) -> None:
    """Train models of about 1 B parameters with bf16 LoRA and with NF4 QLoRA, each in its own process."""
    shapes: dict[str, Any] = {}
    for shape in arguments.shapes:
        model = write_model(work / shape, shape, shards=arguments.shards)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        shapes[shape] = found = {"checkpoint_mib": round(size / MIB)}
        for method in ("lora", "qlora"):
            specification = {"kind": "memory", "model": str(model), "method": method, "threads": arguments.threads}
            for name in ("length", "steps", "checkpointing", "precision", "rank"):
                specification[name] = getattr(arguments, name)
            found[method] = in_fresh_process(str(Path(__file__).resolve()), str(work), specification, cpu=True)
            print(f"{shape} {method}: {json.dumps(found[method])}", file=sys.stderr)
        shutil.rmtree(model)
        if not any("failed" in found[method] for method in ("lora", "qlora")):
            for name in ("training_peak", "training_peak_above_libraries"):
                found[f"qlora_share_of_{name}"] = round(found["qlora"][f"{name}_mib"] / found["lora"][f"{name}_mib"], 3)
        goal = "qlora_share_of_training_peak at most 0.60"
        write_result(arguments.out, "memory", arguments, {"what": _MEMORY, "goal": goal, "shapes": shapes})


_MEMORY = (
    "Unreclaimable memory of the process (RssAnon + RssShmem, which no file mapping is part of), looked up every 4 ms: "
    "after the libraries are imported, at its highest while the model is loaded, at rest after that, and at its "
    "highest during training. Batch 1; the base of both is bf16 but for what QLoRA has in 4 bits."
)


def measure_memory(specification: dict[str, Any], work: Path) -> dict[str, Any]:
    """Load, adapt and train one model in this process; return what it held at each stage, in MiB."""
    import torch

    torch.set_num_threads(specification["threads"])
    from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
    from clinical_nlp.models.loading import load_base
    from clinical_nlp.runs import Run
    from clinical_nlp.tasks.pretraining import language_task
    from clinical_nlp.training.trainer import TrainingConfig, train

    for name in ("bitsandbytes", "peft", "trl.trainer.sft_trainer"):
        importlib.import_module(name)  # so that neither stage is charged for a library
    libraries = settled()
    strategy = StrategyConfig(name=specification["method"], rank=specification["rank"], alpha=2 * specification["rank"])
    with Peak() as loading:
        base = load_base(specification["model"], kind="causal", quantization=strategy.quantization, dtype="bf16")
    # What the allocator keeps for later is unreclaimable too, so it is seen before it is given back.
    kept, resting = unreclaimable(), settled()
    network = apply_strategy(base.network, strategy, seed=0)
    length = specification["length"]
    task = language_task(base, length, batching="packed")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (specification["steps"], length), generator=generator).tolist()
    examples = task.examples([task.arrange(ids, ["patient"] * len(ids), ["institution"] * len(ids))], seed=0)
    config = TrainingConfig(
        epochs=1,
        batch_size=1,
        precision=specification["precision"],
        gradient_checkpointing=specification["checkpointing"],
        save_steps=10**6,
    )
    with (
        Run.open(work / specification["method"], config, recipe="benchmark") as run,
        Peak() as training,
        Stopwatch(network, skip=1) as watch,
    ):
        outcome = train(
            network,
            examples,
            task.collate,
            config=config,
            run=run,
            seed=0,
            lengths=[length] * len(examples),
            tokenizer=base.tokenizer,
            strategy=strategy,
            language_model=True,
        )
    mib = {
        "libraries": libraries,
        "load_peak": loading.bytes,
        "after_load": kept,
        "resting": resting,
        "training_peak": training.bytes,
        "training_peak_above_libraries": training.bytes - libraries,
    }
    return {
        "parameters": trainable_count(network)[1],
        "trainable_parameters": trainable_count(network)[0],
        **{f"{name}_mib": round(value / MIB) for name, value in mib.items()},
        "tokens_per_second": round(watch.steps * length / watch.seconds, 1),
        "steps": outcome["steps"],
        "train_loss": round(outcome["train_loss"], 3),
    }


def ablation(arguments: argparse.Namespace, work: Path) -> None:
    """Add one measure after the other, each rung in its own process."""
    model = str(_model(arguments.model, work))
    rungs = [rung for rung in LADDER if rung != "compile" or arguments.compile]
    rows: list[dict[str, Any]] = []
    for position, rung in enumerate(rungs):
        specification = {"kind": "ablation", "model": model, "rungs": rungs[: position + 1]}
        for name in ("corpus", "length", "batch", "notes", "seed", "learning_rate", "threads"):
            specification[name] = getattr(arguments, name)
        found = in_fresh_process(str(Path(__file__).resolve()), str(work), specification)
        label = "stock Trainer" if rung == "baseline" else f"+ {rung}"
        if "tokens_per_second" in found and rows and "tokens_per_second" in rows[-1]:
            found["change"] = round(found["tokens_per_second"] / rows[-1]["tokens_per_second"] - 1, 3)
        rows.append({"row": label} | found)
        print(f"{label}: {json.dumps(found)}", file=sys.stderr)
        what = "Cumulative: each row keeps what the rows above it added, but that packing replaces bucketing."
        write_result(arguments.out, "ablation", arguments, {"what": what, "rows": rows})


def measure_rungs(specification: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train one epoch with every measure of `rungs` in this process; a few steps before it are not measured."""
    import torch

    from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
    from clinical_nlp.models.blocks import blocks_of
    from clinical_nlp.models.loading import load_base

    torch.set_num_threads(specification["threads"])
    rungs = set(specification["rungs"])
    strategy = StrategyConfig(name="qlora" if "4-bit" in rungs else "lora" if "lora" in rungs else "full")
    base = load_base(
        specification["model"],
        kind="causal",
        quantization=strategy.quantization,
        dtype="auto" if strategy.name == "full" else "bf16",
    )
    length, seed = specification["length"], specification["seed"]
    notes = Notes(
        specification["corpus"], base.tokenizer, length=length, train=specification["notes"], test=1, seed=seed
    )
    network = apply_strategy(base.network, strategy, seed=seed)
    if "compile" in rungs:
        for layer in network.get_submodule(blocks_of(network)[0]):
            layer.compile(dynamic=True)
    common: dict[str, Any] = {"batch": specification["batch"], "rate": specification["learning_rate"]}
    train: Callable[..., Counter]
    if rungs == {"baseline"}:
        train = partial(train_stock, "trainer", network, base.tokenizer, notes, **common)
    else:
        train = partial(
            train_ours,
            "packed" if "packing" in rungs else "bucketed",
            base,
            network,
            notes,
            length=length,
            strategy=strategy.name,
            precision="bf16" if "bf16" in rungs else "fp32",
            checkpointing="checkpointing" in rungs,
            **common,
        )
    folder = work / "-".join(specification["rungs"])
    train(folder=folder / "warmup", max_steps=2)
    settled()
    if _gpu():
        torch.cuda.reset_peak_memory_stats()
    with Peak() as peak, Stopwatch(network) as watch:
        counter = train(folder=folder / "run")
    found = {
        "tokens": counter.real,
        "padded_tokens": counter.padded,
        "steps": watch.steps,
        "tokens_per_second": round(counter.real / (watch.seconds if _gpu() else watch.processor_seconds), 1),
        "tokens_per_second_wall": round(counter.real / watch.seconds, 1),
        "peak_unreclaimable_mib": round(peak.bytes / MIB),
        "trainable_parameters": trainable_count(network)[0],
    }
    if _gpu():
        found["peak_allocated_mib"] = round(torch.cuda.max_memory_allocated() / MIB)
    return found


def child(work: str) -> None:
    """Measure what the specification on standard input asks for, and print the figures as the last line."""
    specification = json.load(sys.stdin)
    measure = {"memory": measure_memory, "ablation": measure_rungs, "gpu": throughput_gpu.measure}[
        specification["kind"]
    ]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        print(json.dumps(measure(specification, Path(folder))))


def _model(name: str, work: Path) -> Path:
    """Return the folder of a model with at least 4096 positions: a random one of `SHAPES`, or a copy of builtin:tiny.

    Rotary positions have no weights, so more of them need only another number in the config.
    """
    from clinical_nlp.models.resolve import resolve_model

    if name in SHAPES:
        return write_model(work / "model", name, dtype="float32")
    folder = shutil.copytree(resolve_model(name).folder, work / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = max(4096, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Path(folder)


def _losses(network: Any, notes: Notes, length: int) -> Any:
    from clinical_nlp.tasks.pretraining import note_losses

    return note_losses(network, notes.test, length=length, pad_token_id=0)


def _estimate(estimate: Any) -> dict[str, Any]:
    found = {name: getattr(estimate, name) for name in ("value", "low", "high", "n_patients", "n_notes")}
    return {name: None if value != value else round(value, 4) for name, value in found.items()}


def _each(values: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return one value for each of the others; one alone stands for all."""
    if len(values) not in (1, len(others)):
        raise SystemExit(f"--notes has {len(values)} values for {len(others)} lengths; give one, or one for each")
    return list(values) * len(others) if len(values) == 1 else list(values)


def _gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", help="JSON file; default: standard output")
    common.add_argument("--threads", type=int, default=1, help="of torch")
    common.add_argument("--seed", type=int, default=0)
    notes = argparse.ArgumentParser(add_help=False)
    notes.add_argument("--corpus", default="auto", help="auto: mtsamples where it is found, else synthetic_hospitals")
    notes.add_argument("--batch", type=int, default=8, help="notes of a batch")
    notes.add_argument("--learning-rate", type=float, default=1e-3, help="of every trainer")

    verb = verbs.add_parser("padding", parents=[common, notes])
    verb.add_argument("--model", default="1m", choices=[*SHAPES, "builtin:tiny"])
    verb.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 4096], help="notes are cut there")
    verb.add_argument("--notes", nargs="+", type=int, default=[256], help="to train on; one number, or one a length")
    verb.add_argument("--test-notes", type=int, default=64)
    verb.add_argument("--repeats", type=int, default=2)
    verb.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    verb.set_defaults(run=padding)

    verb = verbs.add_parser("memory", parents=[common])
    verb.add_argument("--shapes", nargs="+", default=["1.1b", "1b"], choices=list(SHAPES))
    verb.add_argument("--shards", type=int, default=4)
    verb.add_argument("--length", type=int, default=256)
    verb.add_argument("--steps", type=int, default=3)
    verb.add_argument("--rank", type=int, default=16)
    verb.add_argument("--checkpointing", action="store_true", help="for both")
    verb.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of the arithmetic, for both")
    verb.set_defaults(run=memory)

    verb = verbs.add_parser("ablation", parents=[common, notes])
    verb.add_argument("--model", default="30m", choices=[*SHAPES, "builtin:tiny"])
    verb.add_argument("--length", type=int, default=1024)
    verb.add_argument("--notes", type=int, default=64)
    verb.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: only on a GPU")
    verb.set_defaults(run=ablation)

    verb = verbs.add_parser("gpu", parents=[common])
    throughput_gpu.add_arguments(verb)
    verb.set_defaults(run=lambda given, work: throughput_gpu.main(given, str(Path(__file__).resolve()), str(work)))

    verbs.add_parser("child").add_argument("work")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the benchmarks."""
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.verb == "child":
        child(given.work)
        return
    if given.verb == "ablation" and given.compile is None:
        given.compile = _gpu()
    with tempfile.TemporaryDirectory() as work:
        given.run(given, Path(work))


if __name__ == "__main__":
    main()
