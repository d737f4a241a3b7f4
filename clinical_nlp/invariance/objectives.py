"""Objectives: what training asks of the representation, beside the task, so that the institution counts for less.

One call for all: `penalty(representation, institution, label, step)` is a scalar that is added to the task loss. With
weight 0 it is exactly 0 and so are its gradients: training is then the same as without it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.config import CorpusConfig, NamedConfig
from clinical_nlp.errors import ConfigError, ModelError, TooFewPatientsError
from clinical_nlp.invariance import losses

if TYPE_CHECKING:
    import torch

ObjectiveName = Literal["erm", "dann", "cdan", "mmd", "coral", "irm", "vrex", "group_dro", "mcd", "self_training"]
ELSEWHERE = {
    "adda": "adda moves a second copy of the backbone once the first has learned, which no single training does; the "
    "suite cross_institution has it on frozen features. With objective.target use dann, cdan, mmd, coral or mcd",
    "tent": "tent moves the norm layers of a finished model on the notes it is to read: in Python "
    "clinical_nlp.invariance.norm_adaptation.adapt_norms, and a row of the suite cross_institution with "
    "fine_tuning.base_model. While training use self_training with objective.target",
}
"""What is asked for here and lives elsewhere: name -> where, and what to take instead."""
Unlabelled = -100
"""Label of a note that has none: of the target institution, say."""


class ObjectiveConfig(NamedConfig):
    """What is asked of the representation. See `clinical-nlp list objectives`."""

    name: ObjectiveName = "erm"
    """erm, dann, cdan, mmd, coral, irm, vrex, group_dro, mcd or self_training."""
    weight: float | None = Field(default=None, ge=0)
    """Weight of the penalty; default 1, vrex 10, irm 100. 0 is erm, exactly."""
    level: Literal["pooled", "token"] = "pooled"
    """dann, cdan, mmd, coral, mcd: what is aligned, the mean state of each text that the model reads at once, or the
    states of its tokens (ner: of its words)."""
    conditional: bool | None = None
    """dann, mmd, coral: align within each label, so that a difference in prevalence is no reason to forget the label.
    Default wherever examples have one label each: ner with level token. cdan is conditional on the model's own
    predictions."""
    target: CorpusConfig | None = None
    """dann, cdan, mmd, coral: notes of one more institution that are aligned with the others and need no gold; mcd and
    self_training learn from nothing else. Patients of the test part are left out of them."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """mmd, coral, irm, vrex, self_training: share of the steps over which the weight rises from 0; with a jump Adam's
    moments are for another loss. dann, cdan and mcd follow the schedule of the dann paper, group_dro starts from equal
    weights."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """dann, cdan: of the discriminator, mcd: of its two heads; about ten times that of a backbone that moves as a
    whole."""
    share: float = Field(default=0.5, gt=0, le=1)
    """self_training: of the target's notes (ner: words) in a batch, the surest share of each label is learned. A
    share of each keeps the rarer ones: with one limit for all the commonest label takes every place."""
    hidden: int = Field(default=128, ge=1)
    """dann, cdan: width of the discriminator."""
    adaptation_rate: float = Field(default=0.01, gt=0)
    """group_dro: how fast the weights of institutions follow their risks."""
    adjustment: float = Field(default=0.0, ge=0)
    """group_dro: C of the term C / sqrt(training patients) that is added to the risk of an institution."""
    balanced: bool = True
    """Whether every institution gives as many examples to a step; small ones are repeated. erm draws all notes alike,
    and so does a penalty of weight 0."""

    @field_validator("name", mode="before")
    @classmethod
    def _lives_here(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ELSEWHERE:
            raise ValueError(ELSEWHERE[value])
        return value

    @property
    def strength(self) -> float:
        """The weight, or the default of this objective."""
        return {"irm": 100.0, "vrex": 10.0}.get(self.name, 1.0) if self.weight is None else self.weight

    @property
    def is_active(self) -> bool:
        """Whether anything is asked beyond the task."""
        return self.name != "erm" and self.strength > 0


Task = Literal["ner", "coding", "classification", "pretraining", "report"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective works on: `representation` (it moves the backbone), `risk` (losses of institutions) or
    `prediction` (what the model itself says of notes without gold). `target`: whether it can use such notes.
    """

    works_on: Literal["representation", "risk", "prediction"]
    target: bool
    conditional: bool


NEEDS: dict[str, Needs] = {
    "dann": Needs("representation", target=True, conditional=True),
    "cdan": Needs("representation", target=True, conditional=False),
    "mmd": Needs("representation", target=True, conditional=True),
    "coral": Needs("representation", target=True, conditional=True),
    "irm": Needs("risk", target=False, conditional=False),
    "vrex": Needs("risk", target=False, conditional=False),
    "group_dro": Needs("risk", target=False, conditional=False),
    "mcd": Needs("representation", target=True, conditional=False),
    "self_training": Needs("prediction", target=True, conditional=False),
}
"""The one table of what goes with what; `check_objective` reads it and refuses the rest."""


def check_objective(config: ObjectiveConfig, strategy: StrategyConfig, *, task: Task, processes: int = 1) -> None:
    """Refuse what would do nothing, or something else than it says.

    Raises
    ------
    ConfigError : names the key and what to set instead.
    """
    if config.name == "erm":
        if config.target is not None:
            raise ConfigError("objective.target: erm makes nothing of notes without gold; use dann, cdan, mmd or coral")
        return
    needs, name = NEEDS[config.name], config.name
    if task in ("pretraining", "report"):
        _check_language(config, task)
    elif name in _ONLY_TARGET and config.target is None and task != "classification":
        raise ConfigError(
            f"objective {name!r} learns from notes of another institution without gold; name them with objective.target"
        )
    if config.target is not None and not needs.target:
        raise ConfigError(
            f"objective.target: {name} compares losses of institutions, and notes without gold have none; use dann, "
            "cdan, mmd or coral"
        )
    if needs.works_on == "representation" and strategy.name == "head" and task != "classification":
        raise ConfigError(
            f"objective {name!r} moves the representation, and strategy 'head' leaves it as it is; use another "
            "strategy, or irm, vrex or group_dro"
        )
    if config.conditional and not needs.conditional:
        raise ConfigError(f"objective.conditional is for dann, mmd and coral, not for {name}")
    if config.conditional and config.target is not None:
        raise ConfigError(
            "objective.conditional aligns within each label, and the notes of objective.target have none; use cdan, "
            "which takes the model's own predictions, or leave one of the two out"
        )
    if config.conditional and task == "coding":
        raise ConfigError("objective.conditional: a document has many codes, not one label; use cdan")
    if task == "ner" and needs.works_on == "representation" and config.level == "pooled":
        if config.conditional:
            raise ConfigError("objective.conditional: a window has a tag for each word; set objective.level=token")
        if name in _READS_PREDICTIONS:
            raise ConfigError(
                f"objective {name!r} reads predictions, which ner has for words; set objective.level=token"
            )
    if task == "coding" and name in (*_READS_PREDICTIONS, "self_training") and config.level == "token":
        raise ConfigError(f"objective {name!r} reads predictions, which coding has for documents; set level=pooled")
    if processes > 1 and name == "group_dro":
        raise ConfigError("objective 'group_dro' keeps one weight an institution, which processes would not share; use "
                          "one process, or vrex")  # fmt: skip
    if processes > 1 and name in ("dann", "cdan", "mcd") and strategy.name in ("lp_ft", "gradual"):
        raise ConfigError(
            f"objective {name!r} with strategy {strategy.name!r} runs in one process: looking for what is frozen at a "
            "step, the others would take the discriminator to be so too; use full, an adapter, or one process"
        )


_ONLY_TARGET = ("mcd", "self_training")
_READS_PREDICTIONS = ("cdan", "mcd")


def _check_language(config: ObjectiveConfig, task: str) -> None:
    """Refuse for language models what asks for a label of a note, or for notes without gold."""
    what = {"pretraining": "notes that are read", "report": "reports that are written"}[task]
    if config.name in ("cdan", *_ONLY_TARGET):
        raise ConfigError(
            f"objective {config.name!r} reads predictions of labels, and {what} have none; use dann, mmd, coral, irm, "
            "vrex or group_dro"
        )
    if config.conditional:
        raise ConfigError(f"objective.conditional: {what} have no label to align within; leave it out")
    if config.target is not None:
        instead = {
            "pretraining": "pretraining needs no gold: put the notes into the corpus",
            "report": "a source without its report cannot be learned from: put pairs into the corpus",
        }[task]
        raise ConfigError(f"objective.target: {instead}")


def is_conditional(config: ObjectiveConfig, task: Task) -> bool:
    """Say whether the alignment is within labels: as the config says, else wherever examples have one label each."""
    if config.name == "erm" or not NEEDS[config.name].conditional:
        return False
    if config.conditional is not None:
        return config.conditional
    return config.target is None and (task == "classification" or (task == "ner" and config.level == "token"))


def build_objective(
    config: ObjectiveConfig,
    *,
    institutions: Sequence[str],
    patients: Sequence[int],
    width: int,
    n_classes: int,
    conditional: bool = False,
    several_labels: bool = False,
    seed: int = 0,
) -> Any:
    """Make the module whose `penalty` is added to the task loss.

    Parameters
    ----------
    config : with a name other than erm.
    institutions : names of the training institutions, and of the target if there is one; examples give their index.
    patients : training patients of each.
    width, n_classes : of the representation and of the logits.
    conditional : align within labels (dann, mmd, coral).
    several_labels : an example may have several classes at once (coding), so that predictions are sigmoids.
    seed : of the first weights of a discriminator, and of the random projections of cdan.

    Returns
    -------
    torch module with `penalty(representation, institution, label, step, *, patient, logits, losses) -> scalar`, its
    schedule over `n_steps`, and `learning_rates` of its own parameters. `penalty` leaves out examples whose institution
    is below 0. Its arguments:

    representation : (n, d).
    institution : (n,) int.
    label : (n,) int, -100 where there is none; not used unless the objective is conditional.
    step : optimiser steps taken so far.
    patient : (n,) int; default every example is a patient.
    logits : (n, n_classes), for cdan, irm, vrex and group_dro.
    losses : logits -> loss of each example (n,), for irm, vrex and group_dro.

    Raises
    ------
    TooFewPatientsError : there are fewer than two institutions, or one without patients.
    """
    import torch

    if config.name == "erm":
        raise ConfigError("objective 'erm' has no penalty to build")
    if len(institutions) < 2:
        raise TooFewPatientsError(
            f"objective {config.name!r} compares institutions, and the training part has "
            f"{len(institutions)} ({', '.join(map(repr, institutions))}); add notes of another one, give "
            "objective.target, or use erm"
        )
    if empty := [name for name, count in zip(institutions, patients, strict=True) if count < 1]:
        raise TooFewPatientsError(f"objective {config.name!r}: institution {empty[0]!r} has no training patient")

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.institutions, self.n_steps = config.name, tuple(institutions), 1
            self.learning_rates: dict[str, float] = {}

        def progress(self, step: int) -> float:
            return min(1.0, step / max(1, self.n_steps))

        def rising(self, step: int) -> float:
            return min(1.0, self.progress(step) / config.warmup) if config.warmup else 1.0

        def penalty(
            self,
            representation: torch.Tensor,
            institution: torch.Tensor,
            label: torch.Tensor | None,
            step: int,
            *,
            patient: torch.Tensor | None = None,
            logits: torch.Tensor | None = None,
            losses: Callable[[torch.Tensor], torch.Tensor] | None = None,
        ) -> torch.Tensor:
            with torch.autocast(representation.device.type, enabled=False):
                patient = torch.arange(len(institution), device=institution.device) if patient is None else patient
                there = institution >= 0
                if label is not None and (conditional or NEEDS[config.name].works_on == "risk") and label.ndim == 1:
                    there = there & (label != Unlabelled)
                if not bool(there.any()):
                    return representation.float().sum() * 0.0
                if int(institution.max()) >= len(institutions):
                    raise ModelError(
                        f"objective {config.name!r} knows {len(institutions)} institutions; an example is of number "
                        f"{int(institution.max())}"
                    )
                rows = _Rows(
                    representation[there].float(),
                    institution[there],
                    None if label is None else label[there],
                    patient[there],
                    None if logits is None else logits[there].float(),
                    None if losses is None else _on(losses, there, logits),
                )
                return config.strength * self.raw(rows, step)

        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            raise NotImplementedError

    class Adversary(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.outer = config.name == "cdan"
            size = width * n_classes if self.outer else width
            generator = torch.Generator().manual_seed(seed)
            if self.outer and size > LARGEST_OUTER:
                size = RANDOMISED
                self.register_buffer("of_state", torch.randn(width, size, generator=generator), persistent=False)
                self.register_buffer("of_class", torch.randn(n_classes, size, generator=generator), persistent=False)
            else:
                self.of_state = self.of_class = None
            nn = torch.nn
            # No norm in front: it would hide a signal that the other axes merely outgrow, and leave it to a probe.
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.discriminator = nn.Sequential(
                    nn.Linear(size, config.hidden), nn.LayerNorm(config.hidden), nn.GELU(),
                    nn.Linear(config.hidden, config.hidden), nn.LayerNorm(config.hidden), nn.GELU(),
                    nn.Linear(config.hidden, len(institutions)),
                )  # fmt: skip
            self.learning_rates = {name: config.learning_rate for name, _ in self.named_parameters()}

        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            strength = losses.reversal_strength(self.progress(step))
            seen = losses.reverse_gradient(rows.representation, strength)
            within = rows.label if conditional else None
            weights = losses.balanced_weights(rows.institution, within)
            if self.outer:
                assert rows.logits is not None
                classes = rows.logits.detach()
                classes = torch.sigmoid(classes) if several_labels else torch.softmax(classes, -1)
                weights = weights * _certainty(classes, several_labels)
                weights = weights * (len(weights) / weights.sum().clamp(min=1e-12))
                seen = self.joined(seen, classes)
            each = torch.nn.functional.cross_entropy(self.discriminator(seen), rows.institution, reduction="none")
            return (weights * each).mean() / _log(len(institutions))

        def joined(self, state: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            if self.of_state is None:
                return (state.unsqueeze(2) * classes.unsqueeze(1)).flatten(1)
            return (state @ self.of_state) * (classes @ self.of_class) / RANDOMISED**0.5

    class Alignment(Objective):
        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            state, people = rows.representation, rows.patient
            kinds = rows.label if conditional and rows.label is not None else torch.zeros_like(rows.institution)
            squared_width = losses.squared_median_width(state) if config.name == "mmd" else None
            found = []
            for kind in torch.unique(kinds):
                names = torch.unique(rows.institution[kinds == kind]).tolist()
                parts = [(kinds == kind) & (rows.institution == name) for name in names]
                parts = [part for part in parts if len(torch.unique(people[part])) > 1]
                for place, one in enumerate(parts):
                    for other in parts[:place]:
                        if config.name == "coral":
                            found.append(losses.coral_loss(state[one], state[other]))
                        else:
                            pair = (people[one], people[other])
                            found.append(
                                losses.mmd_loss(state[one], state[other], patients=pair, squared_width=squared_width)
                            )
            return self.rising(step) * (torch.stack(found).mean() if found else state.sum() * 0.0)

    class Risk(Objective):
        log_share: torch.nn.Parameter

        def __init__(self) -> None:
            super().__init__()
            if config.name == "group_dro":
                start = torch.full((len(institutions),), -_log(len(institutions)))
                # A parameter, so that checkpoints carry it; its gradient is 0 and its learning rate too.
                self.log_share = torch.nn.Parameter(start)
                self.learning_rates = {"log_share": 0.0}
            counts = torch.tensor(list(patients), dtype=torch.float32)
            self.register_buffer("margin", config.adjustment / counts.sqrt(), persistent=False)

        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            assert rows.logits is not None
            assert rows.losses is not None
            if config.name == "irm":
                penalty = losses.irm_penalty(rows.logits, rows.losses, rows.institution, rows.patient)
                return self.rising(step) * penalty
            each = rows.losses(rows.logits)
            names, risk = losses.risks(each, rows.institution)
            if config.name == "vrex":
                return self.rising(step) * losses.vrex_penalty(risk)
            risk = risk + self.margin[names]  # type: ignore[index]
            with torch.no_grad():
                if self.training:
                    self.log_share[names] += config.adaptation_rate * risk
                    self.log_share.sub_(torch.logsumexp(self.log_share, 0))
                share = torch.softmax(self.log_share[names], 0)
            # The task loss takes the mean over all; with weight 1 what is left of the sum is the weighted risk.
            return (share * risk).sum() - each.mean() + 0.0 * self.log_share.sum()

    class TwoHeads(Objective):
        """Two more heads that may disagree on the target as the source allows; the backbone leaves them no room.

        One step of reversed gradients takes the place of the three alternating ones of the paper.
        """

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.first, self.second = (torch.nn.Linear(width, n_classes) for _ in range(2))
            self.learning_rates = {name: config.learning_rate for name, _ in self.named_parameters()}

        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            assert rows.label is not None
            known = _is_known(rows.label)
            seen = losses.reverse_gradient(rows.representation[~known], losses.reversal_strength(self.progress(step)))
            found = rows.representation.sum() * 0.0
            if bool(known.any()):
                state, label = rows.representation[known], rows.label[known]
                found = found + sum(_cost(head(state), label, several_labels).mean() for head in self.heads)
            if len(seen):
                one, other = (_chances(head(seen), several_labels) for head in self.heads)
                found = found - (one - other).abs().mean()
            return found

        @property
        def heads(self) -> tuple[Any, Any]:
            return self.first, self.second

    class SelfTraining(Objective):
        """What the model is surest of in notes without gold is learned as if it were gold, a share of each label."""

        def raw(self, rows: _Rows, step: int) -> torch.Tensor:
            assert rows.logits is not None
            assert rows.label is not None
            logits = rows.logits[~_is_known(rows.label)]
            chances = _chances(logits.detach(), several_labels)
            label = chances.round() if several_labels else chances.argmax(1)
            sure = (chances - 0.5).abs() if several_labels else chances.amax(1)
            kept = torch.zeros_like(sure, dtype=torch.bool)
            for kind in torch.unique(label):
                here = label == kind
                kept |= here & (sure >= torch.quantile(sure[here].flatten(), 1 - config.share))
            if not bool(kept.any()):
                return rows.representation.sum() * 0.0
            return self.rising(step) * _cost(logits, label, several_labels)[kept].mean()

    kinds = {"dann": Adversary, "cdan": Adversary, "mcd": TwoHeads, "self_training": SelfTraining}
    plain = Alignment if NEEDS[config.name].works_on == "representation" else Risk
    return kinds.get(config.name, plain)()


LARGEST_OUTER = 4096
"""Above so many columns the outer product of cdan is replaced by a product of random projections."""
RANDOMISED = 1024
"""Columns of those projections."""


@dataclass(frozen=True, slots=True)
class _Rows:
    representation: torch.Tensor
    institution: torch.Tensor
    label: torch.Tensor | None
    patient: torch.Tensor
    logits: torch.Tensor | None
    losses: Callable[[torch.Tensor], torch.Tensor] | None


def _is_known(label: torch.Tensor) -> torch.Tensor:
    """Which examples have gold, (n,) bool, of (n,) or (n, n_classes) labels."""
    return (label if label.ndim == 1 else label[:, 0]) != Unlabelled


def _chances(logits: torch.Tensor, several_labels: bool) -> torch.Tensor:
    import torch

    return torch.sigmoid(logits) if several_labels else torch.softmax(logits, -1)


def _cost(logits: torch.Tensor, label: torch.Tensor, several_labels: bool) -> torch.Tensor:
    """Cross-entropy of each example, or of each of its several labels."""
    import torch

    if several_labels:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
    return torch.nn.functional.cross_entropy(logits, label.long(), reduction="none")


def _on(
    losses: Callable[[torch.Tensor], torch.Tensor], there: torch.Tensor, logits: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Losses of the chosen rows alone, from their logits."""

    def of(chosen: torch.Tensor) -> torch.Tensor:
        assert logits is not None
        whole = logits.detach().float().clone()
        return losses(whole.index_put((there.nonzero()[:, 0],), chosen))[there]

    return of


def _certainty(classes: torch.Tensor, several_labels: bool) -> torch.Tensor:
    """1 + exp(-H) of each row of probabilities; of several labels H is the mean over them.

    References
    ----------
    Long et al. 2018, Conditional Adversarial Domain Adaptation, section 3.3.
    """
    import torch

    if several_labels:
        entropy = torch.special.entr(classes) + torch.special.entr(1 - classes)
        return 1.0 + torch.exp(-entropy.mean(1))
    return 1.0 + torch.exp(-torch.special.entr(classes).sum(1))


def _log(count: int) -> float:
    import math

    return math.log(count)
