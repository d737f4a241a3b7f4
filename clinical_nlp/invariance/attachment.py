"""From a training to its objective: who wrote each example, which states are aligned, and the loss term.

The representation is read by a hook on the task head, whose input is the last thing that the backbone says: after its
final norm, after every adapter, and whatever the base is quantised to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.invariance.objectives import (
    NEEDS,
    ObjectiveConfig,
    Task,
    Unlabelled,
    build_objective,
    is_conditional,
)
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.progress import say

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 512
"""Tokens of a batch that are aligned at level token; more are drawn from, anew each step."""


class MarkedExamples:
    """Training examples with the institution and the patient that each comes from.

    Parameters
    ----------
    examples : of a task, indexable.
    institutions, patients : names, one each an example. Patients are told apart within their institution.

    Attributes
    ----------
    names : institutions, in sorted order.
    n_patients : of each.
    institution, patient : number of each example.
    """

    def __init__(self, examples: Any, institutions: Sequence[str], patients: Sequence[str]) -> None:
        if not len(examples) == len(institutions) == len(patients):
            raise InputError(
                f"{len(examples)} examples of {len(institutions)} institutions and {len(patients)} patients"
            )
        self._examples = examples
        self.names = sorted(set(institutions))
        place = {name: index for index, name in enumerate(self.names)}
        people = sorted(set(zip(institutions, patients, strict=True)))
        number = {person: index for index, person in enumerate(people)}
        self.n_patients = [sum(name == institution for institution, _ in people) for name in self.names]
        self.institution = [place[name] for name in institutions]
        self.patient = [number[person] for person in zip(institutions, patients, strict=True)]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        return self._examples[index], self.institution[index], self.patient[index]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is read next, where the examples differ by epoch."""
        if hasattr(self._examples, "set_epoch"):
            self._examples.set_epoch(epoch)

    @staticmethod
    def collate(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that adds `institution` and `patient`, (n,) int64, to what the task's own gives."""

        def marked(items: list[tuple[Any, int, int]]) -> dict[str, Any]:
            import torch

            batch = collate([example for example, _, _ in items])
            about = {"institution": [item[1] for item in items], "patient": [item[2] for item in items]}
            return batch | {key: torch.tensor(value) for key, value in about.items()}

        return marked


@dataclass(frozen=True, slots=True)
class TargetNote:
    """A note without gold, of an institution that is aligned with the training ones."""

    institution: str
    patient: str
    note_id: str
    text: str


def read_target(config: ObjectiveConfig, held_out: Collection[str]) -> list[TargetNote]:
    """Read the notes of `objective.target`, without those of held-out patients.

    Raises
    ------
    InputError : no note is left.
    """
    if config.target is None:
        return []
    corpus = load_corpus(config.target.name, config.target.path, **config.target.options)
    columns = [corpus.notes[name].to_pylist() for name in ("institution", "patient_id", "note_id", "text")]
    notes = [TargetNote(*row) for row in zip(*columns, strict=True) if row[1] not in held_out]
    if not notes:
        raise InputError(
            f"objective.target: corpus {config.target.name!r} has no note of a patient outside the development and "
            "test parts; name notes of other patients"
        )
    left = corpus.notes.num_rows - len(notes)
    say(
        f"{len(notes)} notes without gold of {len({(note.institution, note.patient) for note in notes})} patients of "
        f"{corpus.card.name} are aligned" + (f"; {left} of held-out patients are not read" if left else "")
    )
    return notes


@dataclass(frozen=True, slots=True)
class Attached:
    """An objective on a model: the module, its loss term, and the institutions to balance batches by (None: not)."""

    module: Any
    term: Callable[[Any, dict[str, Any]], Any]
    balance: Sequence[int] | None


def attach_objective(
    model: Any,
    config: ObjectiveConfig,
    examples: MarkedExamples,
    *,
    task: Task,
    batch_size: int,
    seed: int,
) -> Attached:
    """Build the objective of a task model and the loss term that reads its representation.

    Parameters
    ----------
    model : of the task: a backbone `network`, a `head` on its states (classification: on the mean state of a note),
        `n_classes`, and `losses`.
    config : an active objective; `check_objective` has passed it.
    examples : what is trained on, target notes included.
    batch_size : examples a forward pass of one process; every institution must have two in it.

    Raises
    ------
    TooFewPatientsError : fewer than two institutions.
    ConfigError : batches are too small to compare institutions in.
    """
    if len(examples.names) >= 2 and batch_size < 2 * len(examples.names):
        raise ConfigError(
            f"training.batch_size {batch_size} is too small for objective {config.name!r}: it compares "
            f"{len(examples.names)} institutions within a batch; set at least {2 * len(examples.names)}"
        )
    if config.target is not None and len(examples.names) < 2:
        raise TooFewPatientsError("objective.target is of the same institution as the training notes; name another one")
    n_classes = model.n_classes
    module = build_objective(
        config,
        institutions=examples.names,
        patients=examples.n_patients,
        width=model.network.config.hidden_size,
        n_classes=n_classes,
        conditional=is_conditional(config, task),
        several_labels=task == "coding",
        seed=seed,
    )
    read = {"ner": _read_words, "coding": _read_documents, "classification": _read_notes}[task]
    seen: list[Any] = []

    def watch(head: Any, given: tuple[Any, ...], found: Any) -> None:
        if head.training:
            seen.append((given, found))

    model.head.register_forward_hook(watch)

    def term(network: Any, inputs: dict[str, Any]) -> Any:
        given, found = seen.pop()
        seen.clear()
        rows = read(model, config, given, found, inputs, seed)
        return module.penalty(step=inputs["step"], **rows)

    return Attached(module, term, examples.institution if config.balanced else None)


def _read_words(
    model: Any, config: ObjectiveConfig, given: Any, found: Any, inputs: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Return states and predictions of words, or of windows (level pooled)."""
    hidden, labels, mask = given[0], inputs["labels"], inputs["attention_mask"].bool()
    if NEEDS[config.name].works_on == "representation" and config.level == "pooled":
        return {
            "representation": _pooled(hidden, mask),
            "institution": inputs["institution"],
            "label": None,
            "patient": inputs["patient"],
        }
    chosen = labels != Unlabelled
    if NEEDS[config.name].works_on != "risk":
        without_gold = ~chosen.any(1, keepdim=True)
        chosen = thinned(chosen | (mask & without_gold), inputs, seed)
    label = labels[chosen]

    def losses(logits: torch.Tensor) -> torch.Tensor:
        each: torch.Tensor = model.losses(logits, label)
        return each

    return {
        "representation": hidden[chosen],
        "institution": inputs["institution"].unsqueeze(1).expand_as(labels)[chosen],
        "label": label,
        "patient": inputs["patient"].unsqueeze(1).expand_as(labels)[chosen],
        "logits": found[chosen],
        "losses": losses,
    }


def _read_documents(
    model: Any, config: ObjectiveConfig, given: Any, found: Any, inputs: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Return mean states and predictions of documents, or states of their tokens (level token)."""
    states, mask = given
    states = states * states.shape[-1] ** 0.5  # the head has them at unit length
    if config.level == "token":
        chosen = thinned(mask, inputs, seed)
        return {
            "representation": states[chosen],
            "institution": inputs["institution"].unsqueeze(1).expand_as(mask)[chosen],
            "label": None,
            "patient": inputs["patient"].unsqueeze(1).expand_as(mask)[chosen],
        }
    labels = inputs["labels"]

    def losses(logits: torch.Tensor) -> torch.Tensor:
        each: torch.Tensor = model.losses(logits, labels)
        return each

    return {
        "representation": _pooled(states, mask),
        "institution": inputs["institution"],
        "label": labels,
        "patient": inputs["patient"],
        "logits": found[0],
        "losses": losses,
    }


def _read_notes(
    model: Any, config: ObjectiveConfig, given: Any, found: Any, inputs: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Return mean states and predictions of notes that have one label each."""
    labels = inputs["labels"]

    def losses(logits: torch.Tensor) -> torch.Tensor:
        each: torch.Tensor = model.losses(logits, labels)
        return each

    return {
        "representation": given[0],
        "institution": inputs["institution"],
        "label": labels,
        "patient": inputs["patient"],
        "logits": found,
        "losses": losses,
    }


def _pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def thinned(chosen: torch.Tensor, inputs: dict[str, Any], seed: int) -> torch.Tensor:
    """Keep at most `MOST_TOKENS` of (n, t) bool, as many of each example as it goes; drawn from seed and step alone."""
    import torch

    total = int(chosen.sum())
    if total <= MOST_TOKENS:
        return chosen
    generator = torch.Generator().manual_seed(seed * 1_000_003 + int(inputs["step"]))
    draw = torch.rand(chosen.shape, generator=generator).to(chosen.device).masked_fill(~chosen, 2.0)
    most = max(1, MOST_TOKENS // len(chosen))
    kept = draw.argsort(1).argsort(1) < most
    return chosen & kept
