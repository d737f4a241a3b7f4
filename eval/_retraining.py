"""The same recipe again from other beginnings and with fewer patients, each training once, in a folder of its own."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinical_nlp.errors import ClinicalNlpError, InputError, RunError
from clinical_nlp.eval._finished import Subject, note_counts, without_dapt
from clinical_nlp.models.loading import load_tokenizer
from clinical_nlp.models.resolve import resolve_model
from clinical_nlp.notes.splitting import Split
from clinical_nlp.progress import say
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.runs import Run, write_atomic
from clinical_nlp.statistics.intervals import by_patient
from clinical_nlp.tasks import ner

if TYPE_CHECKING:
    from clinical_nlp.eval.transfer import TransferConfig


@dataclass(frozen=True)
class Arm:
    """One training: the recipe's config, and the share of the training patients in the order of a seed."""

    config: Any
    share: float = 1.0
    order: int = 0


class Arms:
    """The trainings that the parts need, each done once; `reference` stands for the run itself."""

    def __init__(self, config: TransferConfig, subject: Subject, run: Run, resume: bool) -> None:
        self._config, self._subject, self._run, self._resume = config, subject, run, resume
        self._arms: dict[str, Arm] = {}
        self.trained: dict[str, Run] = {}
        self.failed: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.candidates: dict[str, str] = {}

    @property
    def random_model(self) -> str:
        """Folder of the randomly initialised model."""
        return str((self._run.path / "random_model").resolve())

    @property
    def _limits(self) -> dict[str, Any]:
        given = {"max_steps": self._config.max_steps, "max_minutes": self._config.max_minutes}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def _as_the_run(self) -> bool:
        return all(getattr(self._subject.config, key) == value for key, value in self._limits.items())

    @property
    def limits_in_words(self) -> str:
        """Say how long each training was."""
        if self._as_the_run:
            return "every training as long as the run's own"
        limits = ", ".join(f"{key} {value:g}" for key, value in self._limits.items())
        return f"every training limited to {limits}, the run's own repeated under the same limit"

    def plan(self, parts: Sequence[str]) -> None:
        """List the trainings, and say how many there are before the first one begins.

        Raises
        ------
        MissingDataError, ModelError : a candidate that was named is not there.
        """
        subject, config = self._subject, self._config
        unprompted = {"baseline_notes": 0} if hasattr(subject.config, "baseline_notes") else {}
        again: Any = subject.config.model_copy(update={**self._limits, **unprompted, "base_model": subject.base})
        retrains = {"negative_transfer", "learning_curve", "ranking"} & set(parts)
        if retrains and not self._as_the_run:
            self._arms["reference"] = Arm(again)
        below = without_dapt(subject.base)
        if "negative_transfer" in parts:
            if below != subject.base:
                self._arms["without_dapt"] = Arm(again.model_copy(update={"base_model": below}))
            else:
                self.reasons["without_dapt"] = "the run's base model is no dapt run, so there is nothing to leave out"
            if again.strategy.name != "head":
                self._arms["head"] = Arm(_head_only(again))
            else:
                self.reasons["head"] = "the run itself trained the head alone"
            self._arms["random"] = Arm(_from(again, self.random_model))
        if "learning_curve" in parts:
            for seed in range(config.n_seeds):
                for share in sorted(config.shares):
                    if share < 1 or seed > 0:
                        later = again.model_copy(update={"seed": again.seed + seed})
                        self._arms[curve_arm(share, seed)] = Arm(later, share, again.seed + seed)
        if "ranking" in parts:
            self._plan_ranking(again, below)
        if not self._arms:
            return
        seconds = subject.run.manifest.get("duration_seconds")
        each = ""
        if seconds and self._as_the_run:
            each = f", at most {seconds / 60:.0f} minutes" if seconds > 120 else f", at most {seconds:.0f} seconds"
            each += " or so each, as the run took"
        say(f"{len(self._arms)} trainings{each}: {', '.join(self._arms)}")

    def _plan_ranking(self, again: Any, below: str) -> None:
        """Map each candidate to the training that shows its worth; trainings of other parts serve where they can."""
        config, subject = self._config, self._subject
        named = [self.random_model if name == "random" else name for name in config.candidates]
        names = named or [subject.base, below, self.random_model]
        names = list(dict.fromkeys(str(Path(name).resolve()) if Path(name).is_dir() else name for name in names))
        for name in names:
            if name != self.random_model:
                resolve_model(name)
        suffix = "_head" if config.truth == "head" and again.strategy.name != "head" else ""
        known = {below: "without_dapt", subject.base: "reference", self.random_model: "random"}
        for number, name in enumerate(names):
            arm = known.get(name, f"candidate_{number}")
            arm = "head" if suffix and arm == "reference" else arm + suffix
            self.candidates[name] = arm
            if arm in self._arms or arm == "reference":
                continue
            trained = _head_only(again) if suffix else again
            self._arms[arm] = Arm(_from(trained, name))

    def train(self) -> None:
        """Do the trainings; one that cannot be done is kept with its reason."""
        recipe = find_recipe(self._subject.recipe) if self._arms else None
        if any(arm.config.base_model == self.random_model for arm in self._arms.values()):
            write_random_model(self._subject.base, Path(self.random_model), seed=self._config.seed)
        for number, (name, arm) in enumerate(self._arms.items(), 1):
            assert recipe is not None
            say(f"training {number} of {len(self._arms)}: {name}")
            settings = arm.config
            if name.startswith("curve_"):
                settings = _equal_steps(settings, self._reference(), arm.share)
            split = fewer_patients(self._subject.split, self._subject.patients, arm.share, seed=arm.order)
            try:
                with this_split(recipe.load(), self._subject, split):
                    done = execute(recipe, settings, output=self._run.path / name, resume=self._resume)
            except RunError:  # it was stopped, or the folder is not ours
                raise
            except ClinicalNlpError as error:
                self.failed[name] = str(error)
                say(f"{name} is left out: {error}")
                continue
            self.trained[name] = done

    def _reference(self) -> Run:
        return self.trained.get("reference", self._subject.run)

    def n_patients(self, name: str) -> int:
        """Return how many training patients a training read."""
        arm = self._arms.get(name)
        split, patients = self._subject.split, self._subject.patients
        if arm is not None:
            split = fewer_patients(split, patients, arm.share, seed=arm.order)
        return len({patients[row] for row in split.train})

    def counts(self, name: str) -> np.ndarray:
        """Return (patients, 3) matches, predicted and gold spans on the reported part; kept in the run's folder.

        Raises
        ------
        InputError : there is no such training; the message is the reason.
        """
        if name in self.failed or (name not in self.trained and name != "reference"):
            raise InputError(self.failed.get(name) or self.reasons.get(name) or "it was not trained")
        file = self._run.path / "counts" / f"{name}.npy"
        rows = self._subject.split.test
        if file.is_file():
            per_note = np.load(file, allow_pickle=False)
        else:
            finished = self._reference() if name == "reference" else self.trained[name]
            per_note = note_counts(self._subject, ner.NerPredictor.load(finished.path), rows)
            buffer = io.BytesIO()
            np.save(buffer, per_note, allow_pickle=False)
            write_atomic(file, buffer.getvalue())
        return by_patient([self._subject.patients[row] for row in rows], per_note)

    def account(self) -> list[dict[str, Any]]:
        """Return one entry a training: where it is, from what, with how many patients, and what became of it."""
        return [
            {
                "name": name,
                "base_model": arm.config.base_model,
                "strategy": arm.config.strategy.name,
                "seed": arm.config.seed,
                "n_training_patients": self.n_patients(name),
                "steps": (self.trained[name].manifest.get("training") or {}).get("steps")
                if name in self.trained
                else None,
                "reason": self.failed.get(name, ""),
            }
            for name, arm in self._arms.items()
        ]


def _from(settings: Any, base_model: str) -> Any:
    """Return the settings from another base; a penalty that holds on to the old one goes with it."""
    update: dict[str, Any] = {"base_model": base_model}
    if "forgetting" in type(settings).model_fields:
        update["forgetting"] = type(settings.forgetting)()
    if getattr(settings, "head", None) == "continue":
        update["head"] = "auto"
    return settings.model_copy(update=update)


def _head_only(settings: Any) -> Any:
    strategy = type(settings.strategy)(name="head")
    return _from(settings, settings.base_model).model_copy(update={"strategy": strategy})


def _equal_steps(settings: Any, reference: Run, share: float) -> Any:
    """Give a training of fewer patients as many steps as the full one, so that the curve shows labels and not time."""
    steps = max(1, int(reference.manifest["training"]["steps"]))
    update: dict[str, Any] = {"epochs": float(steps)}
    if getattr(settings.training, "patience", None):  # counted in epochs, which are shorter now
        update["patience"] = max(1, round(settings.training.patience / share))
    return settings.model_copy(update={"max_steps": steps, "training": settings.training.model_copy(update=update)})


def curve_arm(share: float, seed: int) -> str:
    """Name the training of a point of the learning curve; the full one of the first seed is the run's own."""
    return "reference" if share == 1 and seed == 0 else f"curve_{100 * share:g}_{seed}"


def fewer_patients(split: Split, patients: Sequence[str], share: float, *, seed: int) -> Split:
    """Keep a share of the training patients (at least one): those with the lowest keyed hash, so that shares nest."""
    if share >= 1:
        return split
    people = sorted({patients[row] for row in split.train})

    def rank(patient: str) -> bytes:
        text = patient.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, key=f"learning curve {seed}".encode(), digest_size=8).digest()

    kept = set(sorted(people, key=rank)[: max(1, round(share * len(people)))])
    rows = np.array([row for row in split.train if patients[row] in kept], dtype=np.int64)
    remark = f"learning curve: {len(kept)} of {len(people)} training patients"
    return replace(split, train=rows, patients=(len(kept), *split.patients[1:]), remarks=(*split.remarks, remark))


@contextmanager
def this_split(recipe: Any, subject: Subject, split: Split) -> Iterator[None]:
    """Let the recipe train on this split: its config knows neither a share of the patients nor a seed of the split.

    Other notes that the recipe divides (a corpus to replay) are divided as usual.
    """
    usual = recipe.split_patients
    own = subject.corpus.notes["text_sha256"]

    def split_patients(notes: Any, *arguments: Any, **options: Any) -> Split:
        if notes["text_sha256"].equals(own):
            return split
        divided: Split = usual(notes, *arguments, **options)
        return divided

    recipe.split_patients = split_patients
    try:
        yield
    finally:
        recipe.split_patients = usual


def write_random_model(base: str, folder: Path, *, seed: int) -> None:
    """Write a randomly initialised backbone with the architecture and the tokenizer of a base model."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel

    transformers.utils.logging.disable_progress_bar()
    if folder.is_dir():
        return
    resolved = resolve_model(base)
    config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=False, local_files_only=not resolved.is_hub)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(seed)
    begun = folder.with_name(f".{folder.name}")  # a crash leaves no half of a model under the final name
    shutil.rmtree(begun, ignore_errors=True)
    AutoModel.from_config(config).save_pretrained(begun)
    load_tokenizer(resolved).save_pretrained(begun)
    begun.rename(folder)
