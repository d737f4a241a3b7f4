"""One trainer for all tasks: transformers' Trainer and TRL's SFTTrainer with one order, checkpoints and progress."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import default_learning_rate, trainable_count
from clinical_nlp.config import Config
from clinical_nlp.errors import ModelError, RunError
from clinical_nlp.progress import progress, say
from clinical_nlp.runs import Run
from clinical_nlp.training import checkpoints

WEIGHTS = "trainable.safetensors"
LossTerm = Callable[[Any, dict[str, Any]], Any]
"""`term(model, inputs) -> scalar tensor`, added to the task loss of every micro-batch."""


class TrainingConfig(Config):
    """How the weights are moved."""

    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training patients' notes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the base or its adapter; default by strategy and size of the model: adapters 1e-3, full
    2e-4, and a tenth to a fifth of that above 200 M parameters."""
    head_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the task head, which starts from nothing."""
    batch_size: int = Field(default=16, ge=1)
    """Examples (or packed rows) a forward pass, per process."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes an optimiser step."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay of matrices."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    save_steps: int = Field(default=200, ge=1)
    """Optimiser steps between checkpoints."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""


class EpochSampler:
    """Order of examples: a permutation drawn from (seed, epoch), in batches of similar length.

    The order depends on nothing else, so a resumed run sees what the uninterrupted one would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch, self._seed, self._epoch = batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self._seed, self._epoch))
        order = rng.permutation(len(self._lengths))
        # Sorted within pools, so that a small corpus does not see the same batches in every epoch.
        pool = self._batch * min(50, max(4, len(order) // (8 * self._batch)))
        batches = []
        for begin in range(0, len(order), pool):
            part = order[begin : begin + pool]
            part = part[np.argsort(-self._lengths[part], kind="stable")]
            batches += [part[index : index + self._batch] for index in range(0, len(part), self._batch)]
        # A short batch stays last: in the middle it would shift every later batch boundary.
        last = batches.pop() if batches and len(batches[-1]) < self._batch else None
        rng.shuffle(batches)
        for batch in [*batches, *([] if last is None else [last])]:
            yield from batch.tolist()


def train(
    model: Any,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    config: TrainingConfig,
    run: Run,
    seed: int,
    lengths: Sequence[int],
    tokenizer: Any,
    strategy: str,
    language_model: bool = False,
    head: str | None = None,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    resume: bool = False,
    terms: Sequence[LossTerm] = (),
) -> dict[str, float]:
    """Train what is trainable in `model`, with checkpoints in the run.

    Parameters
    ----------
    model : module whose forward takes the collated batch and returns a loss.
    dataset : indexable examples (a `datasets.Dataset` of packed rows for a language model).
    collate : examples -> batch of tensors.
    lengths : tokens of each example, for batches of similar length.
    strategy : its name, for the learning rate where the config has none.
    language_model : train through TRL's SFTTrainer instead of transformers' Trainer.
    head : name of the task head inside `model`, which has its own learning rate.
    max_steps, max_minutes : earlier ends.
    resume : continue from the newest checkpoint that verifies.
    terms : further loss terms.

    Returns
    -------
    `steps`, `train_loss`, `tokens` (trained on, without padding) and `seconds` of this call.

    Raises
    ------
    RunError : the run was asked to stop (SIGTERM) and has saved a checkpoint to resume from.
    ModelError : the loss is not finite.
    """
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    steps_an_epoch = max(1, math.ceil(math.ceil(len(lengths) / config.batch_size) / config.accumulation))
    planned = min(max_steps or 10**9, max(1, round(steps_an_epoch * config.epochs)))
    options: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "max_steps": planned,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate or default_learning_rate(strategy, trainable_count(model)[1]),
        "lr_scheduler_type": "linear",
        "warmup_steps": round(config.warmup * planned),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,  # else a loss that is not finite is shown as the average of the ones before
        "logging_steps": max(1, min(10, planned // 10)),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not gpu,
        "bf16": bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "eval_strategy": "no",
    }
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer_class, arguments = _trainer_class(language_model, options)
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not rows:
        raise ModelError("nothing to train: the strategy freezes every weight and this task has no head")
    stop = _Stop(max_minutes)
    shown = _shown(run, planned)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[stop, shown],
        **({"processing_class": tokenizer} if language_model else {}),
    )
    for row in rows:  # SFTTrainer casts adapters on a 4-bit base to bf16, where small updates vanish
        row.data = row.data.float() if row.dtype == torch.bfloat16 and not bf16 else row.data
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = True
    trainer.sampler = EpochSampler(lengths, config.batch_size, seed)
    trainer.terms = list(terms)
    trainer.head, trainer.head_learning_rate = head, config.head_learning_rate
    newest = checkpoints.newest(run.checkpoints) if resume else None
    if resume:
        say(f"resuming from {newest.name}" if newest else "no whole checkpoint yet; starting from the beginning")
    began = time.monotonic()
    try:
        before = int(newest.name.rpartition("-")[2]) if newest else 0
        with stop.listening(), progress("train", planned, unit="steps", done=before) as bar:
            shown.bar = bar
            outcome = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        shown.bar = None
    if stop.signalled:
        raise RunError(
            f"stopped by a signal after step {outcome.global_step}, checkpoint saved; finish it with --resume"
        )
    if not math.isfinite(outcome.training_loss):
        raise ModelError("training diverged: the loss is not finite; lower training.learning_rate")
    trained = sum(lengths) * trainer.state.epoch if trainer.state.epoch else 0
    return {
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss,
        "tokens": round(trained),
        "seconds": round(time.monotonic() - began, 1),
    }


class LossTerms:
    """The one mixin over the trainers: extra loss terms, own order, and checkpoints of what trains and nothing else."""

    sampler: EpochSampler
    terms: list[LossTerm]
    head: str | None
    head_learning_rate: float
    optimizer: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the task loss plus the terms; a term counts once an optimiser step, whatever the accumulation."""
        # Asked for outputs only when somebody wants them: SFTTrainer then runs the model a second time.
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = result if return_outputs else (result, None)
        for term in self.terms:
            loss = loss + term(model, inputs) / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Build AdamW with the head in its own group and no decay on vectors."""
        import torch

        if getattr(self, "optimizer", None) is not None:
            return self.optimizer
        args = self.args  # type: ignore[attr-defined]
        network = self.model if model is None else model  # type: ignore[attr-defined]
        groups: dict[tuple[float, float], list[Any]] = {}
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            in_head = self.head is not None and f"{self.head}." in f"{name}."
            rate = self.head_learning_rate if in_head else args.learning_rate
            groups.setdefault((rate, args.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": rows, "lr": rate, "weight_decay": decay} for (rate, decay), rows in groups.items()],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_file

        if not self.args.should_save:  # type: ignore[attr-defined]
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        save_file(trainable_state(model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        target = self.accelerator.unwrap_model(self.model if model is None else model)  # type: ignore[attr-defined]
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        parameters = {name: value for name, value in target.named_parameters() if value.requires_grad}
        if set(state) - set(parameters) or len(state) != len(trainable_state(target)):
            raise RunError("the checkpoint does not fit the model of this config; start again in a new directory")
        import torch

        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write none: TRL's card is for the hub, the run writes its own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            checkpoints.seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")  # type: ignore[attr-defined]


def trainable_state(model: Any) -> dict[str, Any]:
    """Return the trainable weights by name, each storage once (tied weights are one)."""
    seen: set[int] = set()
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            state[name] = parameter.detach().cpu().contiguous()
    return state


def _trainer_class(language_model: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    if language_model:
        from trl import SFTConfig, SFTTrainer

        sft: dict[str, Any] = {"packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return type("LanguageTrainer", (LossTerms, SFTTrainer), {}), SFTConfig(**options, **sft)
    from transformers import Trainer, TrainingArguments

    return type("TaskTrainer", (LossTerms, Trainer), {}), TrainingArguments(**options)


def _Stop(max_minutes: float | None) -> Any:
    """Make the callback that ends training at a time limit or on SIGTERM, with a checkpoint."""
    import contextlib

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        signalled = False
        began = time.monotonic()

        @contextlib.contextmanager
        def listening(self) -> Iterator[None]:
            def note_signal(number: int, frame: Any) -> None:
                self.signalled = True

            try:
                before = signal.signal(signal.SIGTERM, note_signal)
            except ValueError:  # not the main thread: signals are somebody else's
                yield
                return
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, before)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            late = max_minutes is not None and time.monotonic() - self.began > 60 * max_minutes
            if self.signalled or late:
                control.should_save = control.should_training_stop = True

    return Stop()


def _shown(run: Run, planned: int) -> Any:
    """Make the callback that shows progress and writes `metrics.jsonl`."""
    from transformers import TrainerCallback

    class Shown(TrainerCallback):
        bar: Any = None
        loss = float("nan")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None and state.is_world_process_zero:
                self.bar.advance(1, **({} if math.isnan(self.loss) else {"loss": self.loss}))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs and state.is_world_process_zero:
                self.loss = float(logs["loss"])
                kept = ("loss", "grad_norm", "learning_rate", "epoch")
                run.log(step=state.global_step, **{key: float(logs[key]) for key in kept if key in logs})

    return Shown()
