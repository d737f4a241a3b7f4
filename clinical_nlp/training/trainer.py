"""One trainer for all tasks: transformers' Trainer and TRL's SFTTrainer with one order, checkpoints and progress."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import (
    Group,
    StrategyConfig,
    default_learning_rate,
    parameter_groups,
    trainable_count,
)
from clinical_nlp.config import Config
from clinical_nlp.errors import ConfigError, ModelError, RunError, TrainingError
from clinical_nlp.progress import is_main_process, progress, say
from clinical_nlp.runs import Run, write_json
from clinical_nlp.training import checkpoints

WEIGHTS = "trainable.safetensors"
LossTerm = Callable[[Any, dict[str, Any]], Any]
"""`term(model, inputs) -> scalar tensor`, added to the task loss of every micro-batch. Beside the inputs of the model
it is given what a batch says `ABOUT` its examples, and `step`, the optimiser steps taken so far."""
ABOUT = ("institution", "patient", "unit")
"""Keys of a batch that are for loss terms and not for the model; -1 where an example does not count."""


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
    """Examples (or packed rows) a forward pass, over all processes together."""
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
    curriculum: Literal["none", "length", "loss"] = "none"
    """Order of the first epoch: none is random; length goes from short to long; loss (pretraining only) from what the
    base model predicts best to what it predicts worst. Later epochs are random."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better score on the development part after which training ends and the best weights are taken;
    default none: all epochs are trained, the last weights are kept."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """DPO: how far the model may move from its reference (`beta`), and how much it also learns the preferred text.

    `sft_weight` is the weight of the mean negative log-likelihood of the preferred text, beside the DPO loss.
    """

    beta: float
    sft_weight: float = 0.0


class EpochBatches:
    """Batches of example indices: an order drawn from (seed, epoch), examples of similar length together.

    The order depends on nothing else, so a resumed run sees what the uninterrupted one would have seen. What one
    optimiser step sees (a window of `batch * accumulation` examples) is chosen before it is cut into forward passes and
    dealt out to processes, so neither changes what is learned.

    Parameters
    ----------
    lengths : tokens of each example.
    batch, accumulation : examples of a forward pass over all processes, and forward passes of a step.
    difficulty : of each example; if given, the first epoch goes from low to high.
    rank, world : which process this is, of how many.
    prepare : called with the epoch before its first example is fetched.
    balance : institution of each example, where every batch shall have as many of each. Small institutions are then
        repeated within an epoch and large ones not read to the end; an epoch is as long as without. It takes the place
        of an order by difficulty.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch: int,
        accumulation: int = 1,
        seed: int,
        difficulty: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        prepare: Callable[[int], None] | None = None,
        balance: Sequence[int] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._balance = None if balance is None else np.asarray(balance)
        self._batch, self._window, self._seed = batch, batch * accumulation, seed
        self._difficulty = None if difficulty is None else np.asarray(difficulty, dtype=np.float64)
        self._rank, self._world, self._prepare = rank, world, prepare
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self._epoch = int(epoch)
        if self._prepare is not None:
            self._prepare(self._epoch)

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self._batch)

    def windows(self) -> list[np.ndarray]:
        """Return the examples of each optimiser step of this epoch, longest first within a step."""
        rng = np.random.default_rng((self._seed, self._epoch))
        if self._balance is not None:
            return self._balanced_windows(rng, self._balance)
        order = rng.permutation(len(self._lengths))
        size = self._window
        if self._difficulty is not None and self._epoch == 0:
            order = order[np.argsort(self._difficulty[order], kind="stable")]
            windows = [order[begin : begin + size] for begin in range(0, len(order), size)]
            return [window[np.argsort(-self._lengths[window], kind="stable")] for window in windows]
        # A short window is drawn first and stays last: in the middle it would shift every later boundary.
        full = len(order) // size * size
        order, rest = order[:full], order[full:]
        # Sorted by nearly the length, so that batches have little padding and no two epochs have the same ones.
        nearly = self._lengths[order] * np.exp(rng.normal(scale=0.05, size=full))
        windows = np.split(order[np.argsort(-nearly, kind="stable")], range(size, full, size)) if full else []
        rng.shuffle(windows)
        windows = [*windows, rest] if len(rest) else windows
        return [window[np.argsort(-self._lengths[window], kind="stable")] for window in windows]

    def _balanced_windows(self, rng: np.random.Generator, groups: np.ndarray) -> list[np.ndarray]:
        """Draw windows whose batches have as many examples of each group; within a batch they stand group by group."""
        members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
        waiting: list[np.ndarray] = [np.zeros(0, dtype=np.int64) for _ in members]
        windows = []
        for begin in range(0, len(groups), self._window):
            size = min(self._window, len(groups) - begin)
            bounds = [*range(0, size, self._batch), size]
            turn = rng.permutation(len(members))  # who gives one more where it does not divide evenly
            shares = [
                size * (place + 1) // len(members) - size * place // len(members) for place in range(len(members))
            ]
            drawn: list[np.ndarray] = []
            for share, place in zip(shares, turn, strict=True):
                while len(waiting[place]) < share:
                    waiting[place] = np.concatenate([waiting[place], rng.permutation(members[place])])
                taken, waiting[place] = waiting[place][:share], waiting[place][share:]
                drawn.append(taken[np.argsort(-self._lengths[taken], kind="stable")])
            # Dealt out in turn, longest first, so that batches are alike in groups and nearly so in length.
            places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in drawn])
            dealt = np.concatenate(drawn)[np.argsort(places, kind="stable")]
            batches = [dealt[low:high] for low, high in itertools.pairwise(bounds)]
            windows.append(np.concatenate([part[np.argsort(groups[part], kind="stable")] for part in batches]))
        return windows

    def __iter__(self) -> Iterator[list[int]]:
        for window in self.windows():
            for begin in range(0, len(window), self._batch):
                batch = window[begin : begin + self._batch].tolist()
                # A process without an example runs along on one that does not count (-1 - index): see `_Indexed`.
                yield batch[self._rank :: self._world] or [-1 - batch[0]]


class _Indexed:
    """A dataset that marks whether an example counts; a negative index -1 - i is example i, without its targets."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return (self._dataset[index], True) if index >= 0 else (self._dataset[-1 - index], False)


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
    strategy: StrategyConfig,
    language_model: bool = False,
    preference: PreferenceLoss | None = None,
    head: str | None = None,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    resume: bool = False,
    terms: Sequence[LossTerm] = (),
    objective: Any = None,
    balance: Sequence[int] | None = None,
    validate: Callable[[], float] | None = None,
    difficulty: Sequence[float] | None = None,
) -> dict[str, float]:
    """Train what is trainable in `model`, with checkpoints in the run.

    Parameters
    ----------
    model : module whose forward takes the collated batch and returns a loss.
    dataset : indexable examples (a `datasets.Dataset` of packed rows for a language model). Where it has `set_epoch`,
        that is called before each epoch: what is random about an example is drawn there from (seed, epoch, example),
        never while collating, or a resumed run would be another one.
    collate : examples -> batch of tensors, with `labels` that are -100 where nothing is to be predicted.
    lengths : tokens of each example, for batches of similar length.
    strategy : says which parameters learn, at which rate, from which step.
    language_model : train through TRL's SFTTrainer instead of transformers' Trainer.
    preference : train through TRL's DPOTrainer on pairs whose batches hold the log-likelihoods of the reference
        (`tasks.report.collate_preferences`), so that no second model is kept.
    head : name of the task head inside `model`, which has its own learning rate.
    max_steps, max_minutes : earlier ends.
    resume : continue from the newest checkpoint that verifies.
    terms : further loss terms.
    objective : module of `invariance.objectives` whose term is among them; it becomes part of the model as `objective`,
        so that its parameters are optimised at its own rates, saved and resumed.
    balance : institution of each example, for batches with as many of each; see `EpochBatches`.
    validate : score of the model as it stands, higher is better; for early stopping (`config.patience`).
    difficulty : of each example, for `config.curriculum` loss.

    Returns
    -------
    `steps`, `train_loss`, `tokens` (trained on, without padding), `seconds` of this call and `processes`; with early
    stopping also `best_epoch` and `best_score`.

    Raises
    ------
    ConfigError : the strategy, the curriculum or early stopping asks for what this task does not have.
    RunError : the run was asked to stop (SIGTERM) and has saved a checkpoint to resume from; or the weights are divided
        among processes (FSDP, DeepSpeed), and one process has to finish the run.
    ModelError : the loss is not finite; the last checkpoint from before that is kept.
    """
    import torch
    import transformers

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("nothing to train: the strategy freezes every weight and this task has no head")
    if config.curriculum == "loss" and difficulty is None:
        raise ConfigError("training.curriculum 'loss' needs a base model that does the task already; use length")
    if config.patience is not None and validate is None:
        raise ConfigError("training.patience needs a score on a development part, which this task does not have")
    # DPOTrainer takes a peft model to be one of its own, with an adapter named default and another for the reference.
    model = model.get_base_model() if preference is not None and hasattr(model, "get_base_model") else model
    gpu = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    steps_an_epoch = max(1, math.ceil(math.ceil(len(lengths) / config.batch_size) / config.accumulation))
    planned = min(max_steps or 10**9, max(1, round(steps_an_epoch * config.epochs)))
    groups = parameter_groups(
        model,
        strategy,
        head=head,
        learning_rate=config.learning_rate or default_learning_rate(strategy.name, trainable_count(model)[1]),
        head_learning_rate=config.head_learning_rate,
    )
    rate = groups[-1].learning_rate
    if objective is not None:
        model.add_module("objective", objective)
        objective.n_steps = planned
        own = {f"objective.{name}": value for name, value in objective.learning_rates.items()}
        groups += [
            Group(tuple(name for name in own if own[name] == value), value) for value in dict.fromkeys(own.values())
        ]
    options: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "max_steps": planned,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": rate,
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
        "ddp_find_unused_parameters": any(group.start > 0 for group in groups),
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
        trainer_class, arguments = _trainer_class(language_model, options, preference)
    stop = _Stop(max_minutes)
    shown = _shown(run, planned)
    stages = _Stages({name: round(group.start * planned) for group in groups for name in group.names})
    early = _Early(run, validate, config.patience) if config.patience is not None and validate is not None else None
    with _adapters_known(model) if preference is not None else contextlib.nullcontext():
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=getattr(dataset, "rows", dataset),  # SFTTrainer takes none but a `datasets.Dataset`
            data_collator=collate,
            callbacks=[stop, shown, stages, *([] if early is None else [early])],
            **({"processing_class": tokenizer} if language_model or preference is not None else {}),
        )
    trainer.train_dataset = dataset
    for parameter in model.parameters():  # SFTTrainer casts adapters on a 4-bit base to bf16: small updates vanish
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    if language_model:
        from clinical_nlp.training.linear_cross_entropy import use_linear_cross_entropy

        use_linear_cross_entropy(model)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = preference is None
    trainer.batches = EpochBatches(
        lengths,
        batch=config.batch_size,
        accumulation=config.accumulation,
        seed=seed,
        difficulty={"none": None, "length": lengths, "loss": difficulty}[config.curriculum],
        rank=arguments.process_index,
        world=arguments.world_size,
        prepare=getattr(dataset, "set_epoch", None),
        balance=balance,
    )
    trainer.terms = list(terms)
    trainer.groups, trainer.warmup, trainer.decay = groups, config.warmup, config.weight_decay
    newest = checkpoints.newest(run.checkpoints) if resume else None
    if resume:
        say(f"resuming from {newest.name}" if newest else "no whole checkpoint yet; starting from the beginning")
    began = time.monotonic()
    before = int(newest.name.rpartition("-")[2]) if newest else 0
    stages.model = model
    if early is not None:
        early.begin(model, before)
    if newest is not None and before >= planned:  # trained to the end; the Trainer would take one step more
        restore(model, newest / WEIGHTS, trainer.names)
        trainer.state = transformers.TrainerState.load_from_json(str(newest / "trainer_state.json"))
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        steps, loss = before, float(np.mean(logged)) if logged else math.nan
    else:
        with stop.listening(), progress("train", planned, unit="steps", done=before) as bar:
            shown.bar = bar
            outcome = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            shown.bar = None
        steps, loss = outcome.global_step, outcome.training_loss
    if stop.signalled:
        raise RunError(f"stopped by a signal after step {steps}, checkpoint saved; finish it with --resume")
    trainer._stop_if_diverged()
    if sharded():
        raise RunError(
            f"trained on {arguments.world_size} processes, none of which holds the whole model, and saved; the same "
            "command with --resume and without accelerate launch scores it and finishes the run"
        )
    trained = sum(lengths) * trainer.state.epoch if trainer.state.epoch else 0
    return {
        "steps": steps,
        "train_loss": loss,
        "tokens": round(trained),
        "seconds": round(time.monotonic() - began, 1),
        "processes": arguments.world_size,
        **({} if early is None else early.take_best()),
    }


class LossTerms:
    """The one mixin over the trainers: extra loss terms, own order, and checkpoints of what trains and nothing else."""

    own_loss = False
    """Whether the trainer's own loss is taken (DPO), a mean over pairs, and not that of the model's forward."""
    batches: EpochBatches
    terms: list[LossTerm]
    groups: list[Group]
    warmup: float
    decay: float
    optimizer: Any
    lr_scheduler: Any
    _starts: list[float]
    _finite: Any = None

    def get_train_dataloader(self) -> Any:
        """Return the batches of this process; accelerate would deal them out itself and repeat examples to fill up."""
        import torch

        class Loader(torch.utils.data.DataLoader[Any]):
            def set_epoch(self, epoch: int) -> None:
                self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

        collate = self.data_collator  # type: ignore[attr-defined]

        def collate_counted(items: list[tuple[Any, bool]]) -> Any:
            batch = collate([example for example, _ in items])
            if not items[0][1]:
                for key in batch.keys() & {"labels", "shift_labels"}:
                    batch[key] = torch.full_like(batch[key], -100)
                for key in batch.keys() & set(ABOUT):
                    batch[key] = torch.full_like(batch[key], -1)
                if "completion_mask" in batch:
                    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
            return batch

        return Loader(
            _Indexed(self.train_dataset),  # type: ignore[attr-defined, arg-type]
            batch_sampler=self.batches,  # type: ignore[arg-type]
            collate_fn=collate_counted,
            pin_memory=torch.cuda.is_available(),
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the task loss plus the terms; a term counts once an optimiser step, whatever the accumulation."""
        import transformers

        about = {key: inputs.pop(key) for key in ABOUT if key in inputs}
        about["step"] = self.state.global_step  # type: ignore[attr-defined]
        common: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.own_loss:  # what comes back is divided by the accumulation, terms and all
            result, share = super().compute_loss(model, inputs, **common), 1  # type: ignore[misc]
        else:
            # Not SFTTrainer's own, which works the logits out twice for metrics that nobody reads here.
            result = transformers.Trainer.compute_loss(self, model, inputs, **common)  # type: ignore[arg-type]
            share = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        loss, outputs = result if return_outputs else (result, None)
        for term in self.terms:
            loss = loss + term(model, {**inputs, **about}) / share
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Build AdamW with each group's own rate, and no decay on vectors."""
        import torch

        if getattr(self, "optimizer", None) is not None:
            return self.optimizer
        args = self.args  # type: ignore[attr-defined]
        network = self.model if model is None else model  # type: ignore[attr-defined]
        parameters = {_plain(name): value for name, value in network.named_parameters() if value.requires_grad}
        rows: list[dict[str, Any]] = []
        self._starts = []
        for group in self.groups:
            for is_matrix in (True, False):
                chosen = [parameters[name] for name in group.names if (parameters[name].ndim > 1) == is_matrix]
                if chosen:
                    decay = self.decay if is_matrix else 0.0
                    rows.append({"params": chosen, "lr": group.learning_rate, "weight_decay": decay})
                    self._starts.append(group.start)
        self.optimizer = torch.optim.AdamW(
            rows, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule: each group rises over its warm-up from the step at which it begins, then falls to 0."""
        import torch

        def factor(start: float) -> Callable[[int], float]:
            first = round(start * num_training_steps)
            rise = round(self.warmup * (num_training_steps - first))

            def at(step: int) -> float:
                if step < first:
                    return 0.0
                if step < first + rise:
                    return (step - first) / rise
                return max(0.0, (num_training_steps - step) / max(1, num_training_steps - first - rise))

            return at

        if self.lr_scheduler is None:
            target = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, [factor(start) for start in self._starts])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_file

        if not self.args.should_save:  # type: ignore[attr-defined]
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:  # gathered from several processes, none of which holds the whole
            state = {_plain(name): value.contiguous() for name, value in state_dict.items()}
            save_file({name: state[name] for name in self.names if name in state}, folder / WEIGHTS)
            return
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        save_file(trainable_state(model, self.names), folder / WEIGHTS)

    @property
    def names(self) -> list[str]:
        """Names of all parameters that learn at some step."""
        return [name for group in self.groups for name in group.names]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)  # type: ignore[attr-defined]
        restore(target, Path(resume_from_checkpoint) / WEIGHTS, self.names)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write none: TRL's card is for the hub, the run writes its own."""

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Run one forward and backward pass, and remember whether every loss so far was finite."""
        import torch

        loss = super().training_step(*arguments, **options)  # type: ignore[misc]
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of an objective's own network apart: neither they nor the task's shorten the other's."""
        parameters = [(_plain(name), value) for name, value in model.named_parameters()]
        own = [value for name, value in parameters if name.startswith("objective.")]
        if not own:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        clip, most = self.accelerator.clip_grad_norm_, self.args.max_grad_norm  # type: ignore[attr-defined]
        clip(own, most)
        return clip([value for name, value in parameters if not name.startswith("objective.")], most)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, unless the loss is not finite: later checkpoints would push out the last good one."""
        self._stop_if_diverged()
        super().log(logs, *arguments, **options)  # type: ignore[misc]

    def _stop_if_diverged(self) -> None:
        diverged = self._finite is not None and not bool(self._finite)
        if _any_process(diverged, self.args.world_size):  # type: ignore[attr-defined]
            raise TrainingError(
                f"training diverged by step {self.state.global_step}: the loss is not finite; "  # type: ignore[attr-defined]
                "lower training.learning_rate (checkpoints from before that are kept)"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._stop_if_diverged()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            checkpoints.seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")  # type: ignore[attr-defined]


def sharded() -> bool:
    """Say whether the weights are divided among processes (FSDP, DeepSpeed), as `accelerate launch` was told."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def trainable_state(model: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the trainable weights (or those named) by name, each storage once (tied weights are one)."""
    wanted = None if names is None else set(names)
    seen: set[int] = set()
    state = {}
    for name, parameter in model.named_parameters():
        chosen = parameter.requires_grad if wanted is None else name in wanted
        if chosen and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            state[name] = parameter.detach().cpu().contiguous()
    return state


def restore(model: Any, path: Path, names: Sequence[str]) -> None:
    """Put the saved trainable weights back.

    Raises
    ------
    RunError : they are not those of this model.
    """
    import torch
    from safetensors.torch import load_file

    state = load_file(path)
    parameters = dict(model.named_parameters())
    if state.keys() != trainable_state(model, names).keys():
        raise RunError("the checkpoint does not fit the model of this config; start again in a new directory")
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _plain(name: str) -> str:
    """Return a parameter's name without what wrapping for several processes puts before it."""
    return name.removeprefix("module.")


@contextlib.contextmanager
def _adapters_known(model: Any) -> Iterator[None]:
    """Tell the Trainer, which else refuses to train a 4-bit model, that its layers carry adapters."""
    missing = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if missing:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if missing:
            model._hf_peft_config_loaded = False


def _trainer_class(language_model: bool, options: dict[str, Any], preference: PreferenceLoss | None) -> tuple[Any, Any]:
    if preference is not None:
        from trl import DPOConfig, DPOTrainer

        def as_it_is(self: Any, dataset: Any, *arguments: Any) -> Any:
            """Leave the rows alone: they are tokens already, with the log-likelihoods of the reference."""
            return dataset

        losses: dict[str, Any] = {"loss_type": ["sigmoid"]}
        if preference.sft_weight:
            losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, preference.sft_weight]}
        dpo: dict[str, Any] = {"beta": preference.beta, "max_length": None, "precompute_ref_log_probs": True, **losses}
        own = {"own_loss": True, "_prepare_dataset": as_it_is, "_precompute_ref_logps": as_it_is}
        return type("PreferenceTrainer", (LossTerms, DPOTrainer), own), DPOConfig(**options, **dpo)
    if language_model:
        from trl import SFTConfig, SFTTrainer

        sft: dict[str, Any] = {"packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return type("LanguageTrainer", (LossTerms, SFTTrainer), {}), SFTConfig(**options, **sft)
    from transformers import Trainer, TrainingArguments

    return type("TaskTrainer", (LossTerms, Trainer), {}), TrainingArguments(**options)


def _Stop(max_minutes: float | None) -> Any:
    """Make the callback that ends training at a time limit or on SIGTERM, with a checkpoint."""
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
            if _any_process(self.signalled or late, args.world_size):
                control.should_save = control.should_training_stop = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.signalled = _any_process(self.signalled, args.world_size)

    return Stop()


def _any_process(value: bool, world: int) -> bool:
    """Say whether it holds in any process: all must stop after the same step."""
    if world == 1:
        return value
    import torch

    flag = torch.tensor(float(value), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _Stages(starts: dict[str, int]) -> Any:
    """Make the callback that freezes each parameter until the step at which it begins to learn."""
    from transformers import TrainerCallback

    class Stages(TrainerCallback):
        model: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if any(starts.values()):
                for name, parameter in self.model.named_parameters():
                    if name in starts:
                        parameter.requires_grad_(state.global_step >= starts[name])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in self.model.named_parameters():
                if name in starts:
                    parameter.requires_grad_(True)

    return Stages()


def _Early(run: Run, validate: Callable[[], float], patience: int) -> Any:
    """Make the callback that scores the model after each epoch, keeps the best weights and ends training.

    The scores are in a file of the run with the step at which they were taken: a resumed run forgets those after its
    checkpoint. The two best so far are kept, since the second best may be the best of what a resumed run has seen.
    """
    import json

    from safetensors.torch import save_file
    from transformers import TrainerCallback

    history = run.checkpoints / "validation.json"

    class Early(TrainerCallback):
        def begin(self, model: Any, step: int) -> None:
            self.model: Any = model
            self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            found = json.loads(history.read_text("utf-8")) if step and history.is_file() else []
            self.scores: list[dict[str, float]] = [entry for entry in found if entry["step"] <= step]

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if any(entry["step"] == state.global_step for entry in self.scores):
                return
            training = self.model.training
            score = validate()
            self.model.train(training)
            ranked = sorted(self.scores, key=lambda entry: -entry["score"])
            best = ranked[0]["score"] if ranked else -math.inf
            self.scores.append({"step": state.global_step, "epoch": round(state.epoch or 0, 3), "score": score})
            if is_main_process():
                run.log(step=state.global_step, development=score)
                if score > best:
                    save_file(trainable_state(self.model, self.names), self._file(state.global_step))
                    for entry in ranked[1:]:
                        self._file(entry["step"]).unlink(missing_ok=True)
                write_json(history, self.scores)
            since = len(self.scores) - 1 - max(range(len(self.scores)), key=lambda i: self.scores[i]["score"])
            control.should_training_stop = control.should_training_stop or since >= patience

        def take_best(self) -> dict[str, float]:
            if not self.scores:  # ended by max_steps or max_minutes within the first epoch
                return {}
            best = max(self.scores, key=lambda entry: entry["score"])
            restore(self.model, self._file(best["step"]), self.names)
            say(f"best on the development part: epoch {best['epoch']:g}")
            return {"best_epoch": best["epoch"], "best_score": best["score"]}

        def _file(self, step: float) -> Path:
            return run.checkpoints / f"best-{int(step)}.safetensors"

    return Early()


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
                kept = ("loss", "grad_norm", "learning_rate", "epoch", "rewards/accuracies", "rewards/margins")
                run.log(step=state.global_step, **{key: float(logs[key]) for key in kept if key in logs})

    return Shown()
