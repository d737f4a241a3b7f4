"""Fine-tuning a base model to tell a label of notes, under any objective: the slow tier of `cross_institution`.

The package's own trainer and strategies, one run directory a training; of each the test scores are kept and the weights
are not, so that a study of hundreds of trainings fits a disk and goes on where it was stopped.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.config import Config
from clinical_nlp.errors import ConfigError, TooFewPatientsError
from clinical_nlp.eval._discrimination import FEWEST_SEEDS
from clinical_nlp.invariance.attachment import MarkedExamples, attach_objective
from clinical_nlp.invariance.norm_adaptation import adapt_norms
from clinical_nlp.invariance.objectives import NEEDS, ObjectiveConfig, Unlabelled, check_objective
from clinical_nlp.models.loading import BaseModel, load_base
from clinical_nlp.models.resolve import resolve_model
from clinical_nlp.runs import Run, write_atomic
from clinical_nlp.tasks.ner import most_tokens
from clinical_nlp.training.trainer import TrainingConfig, train

if TYPE_CHECKING:
    import torch

Asked = Literal["dann", "cdan", "mmd", "coral", "irm", "vrex", "group_dro"]
_UNKNOWN = 0.2
"""Share of training notes, drawn anew each epoch, that are read without the token of their institution."""


class FineTuningConfig(Config):
    """A base model fine-tuned by every method of the table, beside the frozen features."""

    base_model: str | None = None
    """Hub id, local folder or run that is fine-tuned; default none: frozen features alone. `builtin:tiny` is there."""
    strategy: StrategyConfig = StrategyConfig(name="lora")
    """What may move, any but head. The row lp_ft moves all weights, the head first."""
    objectives: list[Asked] | None = None
    """Objectives to compare with erm; default those of the suite. Their penalty weights are those that source patients
    chose on frozen features."""
    n_seeds: int = Field(default=FEWEST_SEEDS, ge=1)
    """Trainings of each method; fewer than six support no claim about methods."""
    max_tokens: int = Field(default=512, ge=16)
    """Tokens of a note that are read; notes that are cut are counted."""
    training: TrainingConfig = TrainingConfig(epochs=3, batch_size=16)
    """How the weights are moved."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of a training, if its epochs have more."""


class ArmConfig(FineTuningConfig):
    """One training, as its manifest has it."""

    name: str
    objective: ObjectiveConfig = ObjectiveConfig()
    token: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Texts:
    """Notes with what is known of each: n texts, (n,) institution, patient and label (`Unlabelled` where not known)."""

    texts: Sequence[str] = field(repr=False)
    institution: np.ndarray
    patient: np.ndarray
    label: np.ndarray

    def without_labels(self) -> Texts:
        """Return them as notes without gold."""
        return Texts(self.texts, self.institution, self.patient, np.full(len(self.label), Unlabelled))

    def with_labels(self, label: np.ndarray) -> Texts:
        """Return those that a label is given for (others have `Unlabelled`), with it."""
        rows = np.flatnonzero(label != Unlabelled)
        texts = [self.texts[row] for row in rows.tolist()]
        return Texts(texts, self.institution[rows], self.patient[rows], label[rows])

    def and_also(self, other: Texts) -> Texts:
        """Return both."""
        return Texts(
            [*self.texts, *other.texts],
            np.concatenate([self.institution, other.institution]),
            np.concatenate([self.patient, other.patient]),
            np.concatenate([self.label, other.label]),
        )


class FineTuner:
    """Trains and scores, each (name, seed) once.

    `n_trainings` counts those of this call; `most_cut` is the largest number of notes that one training and its scoring
    did not read to the end.

    Parameters
    ----------
    config : with a base model.
    folder : where each training has its run.
    resume : take up what is there.
    """

    def __init__(self, config: FineTuningConfig, folder: Path, *, resume: bool = False) -> None:
        if config.base_model is None:
            raise ConfigError("config key 'fine_tuning.base_model' is not set; name the base model to fine-tune")
        if config.strategy.name == "head":
            raise ConfigError("fine_tuning.strategy 'head' leaves the base as it is, as frozen features do; use lora")
        resolve_model(config.base_model)  # a wrong name is told before anything is trained
        self.config, self.folder, self._resume = config, folder, resume
        self.n_trainings = self.most_cut = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """What a reader of the scores must know."""
        config = self.config
        keys = ("base_model", "n_seeds", "max_tokens", "max_steps")
        found = {key: getattr(config, key) for key in keys} | {"strategy": config.strategy.name}
        return found | {"epochs": config.training.epochs, "notes_cut": self.most_cut}

    def scores(
        self,
        name: str,
        seed: int,
        notes: Texts,
        test: Texts,
        *,
        strategy: StrategyConfig | None = None,
        objective: ObjectiveConfig | None = None,
        token: bool = False,
        read_first: Sequence[str] = (),
    ) -> np.ndarray:
        """Fine-tune on notes and return the log-odds of the label for test notes, (n,) float64.

        Parameters
        ----------
        name, seed : of the training; with `resume`, scores that are there are taken.
        notes : what is trained on; those without a label are seen by the objective alone.
        strategy : default the config's.
        objective : default erm.
        token : write the institution before each note, as a word. One that training did not have gets none.
        read_first : texts on which the norm layers are moved before the test notes are scored (test-time adaptation).

        Raises
        ------
        TooFewPatientsError : the labelled notes are of one label, or the objective needs a second institution.
        """
        labelled = notes.label != Unlabelled
        if len(np.unique(notes.label[labelled])) < 2:
            raise TooFewPatientsError("the training notes are all of one label; there is nothing to tell apart")
        values = self.config.model_dump()
        if strategy is not None:
            values["strategy"] = strategy.model_dump()
        if objective is not None:
            # Within labels is not possible where some notes have none.
            loose = {} if labelled.all() or not NEEDS[objective.name].conditional else {"conditional": False}
            values["objective"] = objective.model_copy(update=loose).model_dump()
        arm = ArmConfig.model_validate({**values, "name": name, "token": token, "seed": seed})
        check_objective(arm.objective, arm.strategy, task="classification")
        folder = self.folder / f"{name}-{seed}"
        kept = folder / "scores.npy"
        if not (folder / "manifest.json").is_file():
            self.n_trainings += 1
            again = self._resume and folder.exists()
            with Run.open(folder, arm, recipe="fine_tuning", resume=again, contains_phi=False) as run:
                found = self._train(arm, run, notes, test, read_first, again)
                buffer = io.BytesIO()
                np.save(buffer, found, allow_pickle=False)
                write_atomic(kept, buffer.getvalue())
                shutil.rmtree(run.checkpoints, ignore_errors=True)
        self.most_cut = max(self.most_cut, Run.load(folder).manifest["notes_cut"])
        return np.asarray(np.load(kept, allow_pickle=False))

    def _train(
        self, arm: ArmConfig, run: Run, notes: Texts, test: Texts, read_first: Sequence[str], resume: bool
    ) -> np.ndarray:
        assert arm.base_model is not None
        base = load_base(arm.base_model, quantization=arm.strategy.quantization, bidirectional=True)
        network = apply_strategy(base.network, arm.strategy, seed=arm.seed)
        model = build_classifier(network, seed=arm.seed)
        known = sorted(set(notes.institution[notes.label != Unlabelled].tolist())) if arm.token else []
        most = min(arm.max_tokens, most_tokens(base.network) or arm.max_tokens)
        examples = NoteExamples(base, notes, known, max_tokens=most, seed=arm.seed)
        learned: Any = examples
        pad = base.tokenizer.pad_token_id or 0
        collate: Any = partial(collate_notes, pad_token_id=pad)
        attached = None
        if arm.objective.is_active:
            learned = MarkedExamples(examples, notes.institution.tolist(), notes.patient.tolist())
            attached = attach_objective(
                model, arm.objective, learned, task="classification", batch_size=arm.training.batch_size, seed=arm.seed
            )
            collate = MarkedExamples.collate(collate)
        outcome = train(
            model,
            learned,
            collate,
            config=arm.training,
            run=run,
            seed=arm.seed,
            lengths=examples.lengths,
            tokenizer=base.tokenizer,
            strategy=arm.strategy,
            head="head",
            max_steps=arm.max_steps,
            resume=resume,
            terms=[] if attached is None else [attached.term],
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
        )
        asked = NoteExamples(base, test, known, max_tokens=most, seed=None)
        if len(read_first):
            blind = Texts(read_first, *(np.full(len(read_first), Unlabelled) for _ in range(3)))
            first = NoteExamples(base, blind, [], max_tokens=most, seed=None)
            batches = [
                collate_notes([first[row] for row in range(begin, min(len(first), begin + 16))], pad_token_id=pad)
                for begin in range(0, len(first), 16)
            ]
            moved = adapt_norms(model, batches, partial(_logits, model))
            run.note(adaptation={"steps": moved.steps, "collapsed": moved.collapsed})
        run.note(training=outcome, notes_cut=examples.n_cut + asked.n_cut)
        return score_notes(model, asked, pad_token_id=pad)


class NoteExamples:
    """Notes as tokens with their label; with a seed, an institution's token is left out of some, by epoch.

    Parameters
    ----------
    known : institutions that have a token; none for a model without.
    seed : of what is left out; None leaves no token out (scoring).
    """

    def __init__(
        self, base: BaseModel, notes: Texts, known: Sequence[str], *, max_tokens: int, seed: int | None
    ) -> None:
        self._known, self._seed, self._notes = set(known), seed, notes
        self._plain = self._encode(base, notes.texts, max_tokens)
        self._named = self._plain
        if known:
            named = [
                f"Institution: {name}\n{text}" if name in self._known else text
                for name, text in zip(notes.institution.tolist(), notes.texts, strict=True)
            ]
            self._named = self._encode(base, named, max_tokens)
        self.n_cut = sum(cut for _, cut in self._named)
        self.lengths = [len(ids) for ids, _ in self._named]
        self.set_epoch(0)

    @staticmethod
    def _encode(base: BaseModel, texts: Sequence[str], most: int) -> list[tuple[list[int], bool]]:
        whole = base.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
        cut = base.tokenizer(list(texts), add_special_tokens=True, truncation=True, max_length=most)["input_ids"]
        return [(ids or [base.tokenizer.pad_token_id or 0], len(ids) < len(full))
                for ids, full in zip(cut, whole, strict=True)]  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        """Choose which notes are read without their institution's token in this epoch."""
        self._hidden = np.zeros(len(self._plain), dtype=bool)
        if self._known and self._seed is not None:
            self._hidden = np.random.default_rng((self._seed, epoch)).random(len(self._plain)) < _UNKNOWN

    def __len__(self) -> int:
        return len(self._plain)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        rows = self._plain if self._hidden[index] else self._named
        return rows[index][0], int(self._notes.label[index])


def collate_notes(examples: Sequence[tuple[list[int], int]], *, pad_token_id: int) -> dict[str, Any]:
    """Pad notes to one width; `labels` (n,) int64, -100 where there is none."""
    import torch

    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), pad_token_id)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, (tokens, _) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, : len(tokens)] = 1
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "shift_labels": labels}


def build_classifier(network: Any, *, seed: int) -> Any:
    """Put a head of two classes on the mean state of a note's tokens; the head is float32 and always trains."""
    import torch

    torch.manual_seed(seed)
    functional, width = torch.nn.functional, network.config.hidden_size

    class Head(torch.nn.Linear):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return super().forward(functional.layer_norm(state, (width,)))

    class NoteClassifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.head, self.n_classes = network, Head(width, 2), 2
            torch.nn.init.normal_(self.head.weight, std=0.02)
            torch.nn.init.zeros_(self.head.bias)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
        ) -> dict[str, Any]:
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            with torch.autocast(hidden.device.type, enabled=False):
                weight = attention_mask.unsqueeze(-1).float()
                logits = self.head((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1))
            if labels is None:
                return {"logits": logits}
            count = num_items_in_batch if num_items_in_batch is not None else (labels != Unlabelled).sum()
            loss = self.losses(logits, labels).sum() / torch.as_tensor(count, device=logits.device).clamp(min=1)
            return {"loss": loss, "logits": logits}

        def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            """Loss of each note, (n, 2) and (n,) -> (n,); 0 where there is no label."""
            return functional.cross_entropy(logits, labels, ignore_index=Unlabelled, reduction="none")

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            self.network.gradient_checkpointing_enable(**options)
            self.network.enable_input_require_grads()

    return NoteClassifier().to(next(network.parameters()).device)


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    device = next(model.parameters()).device
    found = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
    return found["logits"]


def score_notes(model: Any, examples: NoteExamples, *, pad_token_id: int, batch_size: int = 32) -> np.ndarray:
    """Log-odds of the label, (n,) float64, notes of similar length read together."""
    import torch

    model.eval()
    order = sorted(range(len(examples)), key=lambda row: (examples.lengths[row], row))
    found = np.zeros(len(order))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            logits = _logits(model, collate_notes([examples[row] for row in rows], pad_token_id=pad_token_id))
            found[rows] = (logits[:, 1] - logits[:, 0]).double().cpu().numpy()
    return found
