"""Training on frozen features: a small adapter and a head, under any objective, in about a second.

The network is the package's bottleneck adapter on vectors that do not move, f = x + up(gelu(down(x))), and a linear
head on f. It stands for fine-tuning where hundreds of trainings are needed: seeds, penalty weights, institutions left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config
from clinical_nlp.errors import InputError, TooFewPatientsError
from clinical_nlp.invariance.objectives import NEEDS, ObjectiveConfig, Unlabelled, build_objective, is_conditional


class FeatureConfig(Config):
    """Frozen features, and the training of what stands on them."""

    encoder: str = "tfidf"
    """tfidf: words and word pairs, weighted and reduced to their main components on the training notes; else a base
    model or run, whose mean last states are taken."""
    components: int = Field(default=64, ge=2)
    """tfidf: columns that are kept."""
    width: int = Field(default=32, ge=1)
    """Inner width of the adapter."""
    steps: int = Field(default=250, ge=1)
    """Optimiser steps of a training."""
    batch_size: int = Field(default=96, ge=4)
    """Notes a step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of adapter and head."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    frozen_share: float = Field(default=0.3, gt=0, lt=1)
    """lp_ft: share of the steps in which the head learns alone."""


@dataclass(frozen=True, eq=False)
class Notes:
    """Vectors of notes with what is known of each: (n, d) float32, (n,) institution, patient and label."""

    vectors: np.ndarray
    institution: np.ndarray
    patient: np.ndarray
    label: np.ndarray

    def at(self, rows: np.ndarray) -> Notes:
        """Return some of them."""
        return Notes(self.vectors[rows], self.institution[rows], self.patient[rows], self.label[rows])

    def without_labels(self) -> Notes:
        """Return them as notes without gold."""
        return Notes(self.vectors, self.institution, self.patient, np.full(len(self.label), Unlabelled))

    def and_also(self, other: Notes) -> Notes:
        """Return both."""
        return Notes(
            np.concatenate([self.vectors, other.vectors]),
            np.concatenate([self.institution, other.institution]),
            np.concatenate([self.patient, other.patient]),
            np.concatenate([self.label, other.label]),
        )


class TermFeatures:
    """TF-IDF of words and word pairs, reduced to main components; fitted on some notes, applied to others."""

    def __init__(self, texts: Sequence[str], components: int) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._terms = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2), max_features=20_000)
        try:
            table = self._terms.fit_transform(texts)
        except ValueError:
            raise InputError(f"{len(texts)} training notes share no word to make features of") from None
        self._components = TruncatedSVD(min(components, min(table.shape) - 1), random_state=0)
        found = self._components.fit_transform(table)
        self._mean, self._spread = found.mean(0), np.maximum(found.std(0), 1e-9)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, components) float32, centred and scaled as the notes it was fitted on."""
        found = self._components.transform(self._terms.transform(texts))
        return np.asarray((found - self._mean) / self._spread, dtype=np.float32)


class Classifier:
    """A trained network; `score` is the log-odds of the label."""

    def __init__(self, network: Any, tokens: np.ndarray | None) -> None:
        self._network, self._tokens = network, tokens

    def score(self, notes: Notes) -> np.ndarray:
        """Return log-odds (n,) float64; an institution that training did not have gets no token."""
        import torch

        with torch.inference_mode():
            logits = self._network(torch.from_numpy(_with_tokens(notes, self._tokens)))[1].double().numpy()
        return np.asarray(logits[:, 1] - logits[:, 0])


_UNKNOWN = 0.2
"""Share of training notes that are shown without the token of their institution, as those of a new one will be."""


def train_classifier(
    notes: Notes,
    config: FeatureConfig,
    *,
    objective: ObjectiveConfig | None = None,
    strategy: Literal["full", "lp_ft"] = "full",
    token: bool = False,
    seed: int = 0,
) -> Classifier:
    """Train adapter and head.

    Parameters
    ----------
    notes : with labels 0 or 1; `Unlabelled` for notes that only the objective sees.
    objective : default erm.
    strategy : lp_ft trains the head alone at first.
    token : add the institution as features.
    seed : of weights, batches and tokens left out.

    Raises
    ------
    TooFewPatientsError : the labelled notes have one label only, or the objective needs a second institution.
    InputError : a vector is not finite.
    """
    import torch

    if not np.isfinite(notes.vectors).all():
        raise InputError("the features hold values that are not finite; is the encoder damaged?")
    labelled = notes.label != Unlabelled
    if len(np.unique(notes.label[labelled])) < 2:
        raise TooFewPatientsError("the training notes are all of one label; there is nothing to tell apart")
    names, institution = np.unique(notes.institution, return_inverse=True)
    patient = np.unique(notes.patient, return_inverse=True)[1]
    random = np.random.default_rng(seed)
    vectors = _with_tokens(notes, names if token else None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _network(vectors.shape[1], config.width)
    active = objective is not None and objective.is_active
    module: Any = None
    if objective is not None and active:
        module = build_objective(
            objective,
            institutions=[str(name) for name in names],
            patients=[len(np.unique(patient[institution == place])) for place in range(len(names))],
            width=vectors.shape[1],
            n_classes=2,
            conditional=is_conditional(
                objective if labelled.all() else objective.model_copy(update={"conditional": False}), "classification"
            ),
            seed=seed,
        )
        module.n_steps = config.steps
    groups = [
        {"params": [*network.down.parameters(), *network.up.parameters()], "lr": config.learning_rate},
        {"params": list(network.head.parameters()), "lr": config.learning_rate},
    ]
    if module is not None:
        groups += [{"params": [value], "lr": module.learning_rates[name]} for name, value in module.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    first = round(config.frozen_share * config.steps) if strategy == "lp_ft" else 0
    peaks = [group["lr"] for group in optimizer.param_groups]
    tensors = {"x": torch.from_numpy(vectors), "y": torch.from_numpy(notes.label.astype(np.int64))}
    tensors |= {"institution": torch.from_numpy(institution), "patient": torch.from_numpy(patient)}
    balanced = objective.balanced if objective is not None and active else False
    for step, rows in enumerate(_batches(institution, config, balanced=balanced, random=random)):
        for place, (group, peak) in enumerate(zip(optimizer.param_groups, peaks, strict=True)):
            group["lr"] = peak * (1 - step / config.steps) * (place > 0 or step >= first)
        x, label = tensors["x"][rows], tensors["y"][rows]
        if token:
            hidden = torch.from_numpy(random.random(len(rows)) < _UNKNOWN)
            x = x.clone()
            x[hidden, -len(names) :] = 0.0
        state, logits = network(x)
        loss = torch.nn.functional.cross_entropy(logits, label, ignore_index=Unlabelled, reduction="sum")
        loss = loss / (label != Unlabelled).sum().clamp(min=1)
        if module is not None:
            risk = NEEDS[objective.name].works_on == "risk" if objective is not None else False

            def each(given: Any, wanted: Any = label) -> Any:
                return torch.nn.functional.cross_entropy(given, wanted, ignore_index=Unlabelled, reduction="none")

            loss = loss + module.penalty(
                state,
                tensors["institution"][rows],
                label,
                step,
                patient=tensors["patient"][rows],
                logits=logits,
                losses=each if risk else None,
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return Classifier(network.eval(), names if token else None)


def self_train(notes: Notes, target: Notes, config: FeatureConfig, *, share: float = 0.5, seed: int = 0) -> Classifier:
    """Learn the target's notes with the labels that two models agree on, the surest share of each label.

    Quantiles by label keep the rarer one: with one threshold for both the commoner label takes all the places.
    """
    scores = [train_classifier(notes, config, seed=2 * seed + 1_000 + place).score(target) for place in (0, 1)]
    label = agreed_labels(*scores, share=share)
    kept = np.flatnonzero(label != Unlabelled)
    taught = Notes(target.vectors, target.institution, target.patient, label).at(kept)
    return train_classifier(notes.and_also(taught), config, seed=seed)


def agreed_labels(first: np.ndarray, second: np.ndarray, *, share: float = 0.5) -> np.ndarray:
    """Label the notes on which two models agree, the surest share of each label; the others are `Unlabelled`.

    Parameters
    ----------
    first, second : (n,) log-odds of the two models.
    """
    label = (first + second > 0).astype(np.int64)
    sure = np.minimum(np.abs(first), np.abs(second)) * ((first > 0) == (second > 0))
    kept = np.zeros(len(label), dtype=bool)
    for kind in (0, 1):
        here = (label == kind) & (sure > 0)
        if here.any():
            kept |= here & (sure >= np.quantile(sure[here], 1 - share))
    return np.where(kept, label, Unlabelled)


def align_discriminatively(notes: Notes, target: Notes, config: FeatureConfig, *, seed: int = 0) -> Classifier:
    """Learn the source, then move a copy of the adapter until a discriminator takes target states for source states.

    The head and the source's adapter stay as they were. With an adversary whose labels are inverted there is no
    schedule; half the steps and a third of the rate keep the copy near where it began.

    References
    ----------
    Tzeng et al. 2017, Adversarial Discriminative Domain Adaptation, section 4.
    """
    import copy

    import torch

    fixed = train_classifier(notes, config, seed=seed)._network
    moved = copy.deepcopy(fixed).train()
    random = np.random.default_rng(seed)
    size = notes.vectors.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        discriminator = torch.nn.Sequential(
            torch.nn.Linear(size, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 2)
        )
    adapter = [*moved.down.parameters(), *moved.up.parameters()]
    rate = config.learning_rate / 3
    chase, flee = torch.optim.AdamW(discriminator.parameters(), lr=rate), torch.optim.AdamW(adapter, lr=rate)
    cross_entropy, half = torch.nn.functional.cross_entropy, config.batch_size // 2
    for _ in range(config.steps // 2):
        ours, theirs = (torch.from_numpy(_drawn(one.vectors, half, random)) for one in (notes, target))
        with torch.no_grad():
            known = fixed(ours)[0]
        state = moved(theirs)[0]
        side = torch.cat([torch.zeros(len(known)), torch.ones(len(state))]).long()
        told = cross_entropy(discriminator(torch.cat([known, state.detach()])), side)
        chase.zero_grad()
        told.backward()
        chase.step()
        fooled = cross_entropy(discriminator(state), torch.zeros(len(state), dtype=torch.long))
        flee.zero_grad()
        fooled.backward()
        flee.step()
    return Classifier(moved.eval(), None)


def minimise_discrepancy(notes: Notes, target: Notes, config: FeatureConfig, *, seed: int = 0) -> Classifier:
    """Let two heads disagree on the target as much as the source allows, and move the adapter until they do not.

    References
    ----------
    Saito et al. 2018, Maximum Classifier Discrepancy for Unsupervised Domain Adaptation, section 3.3 (n = 2).
    """
    import torch

    functional = torch.nn.functional
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _network(notes.vectors.shape[1], config.width)
        other = torch.nn.Linear(notes.vectors.shape[1], 2)
    adapter = [*network.down.parameters(), *network.up.parameters()]
    heads = [*network.head.parameters(), *other.parameters()]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    of_adapter, of_heads = torch.optim.AdamW(adapter, **options), torch.optim.AdamW(heads, **options)
    random = np.random.default_rng(seed)

    def gap(x: Any) -> Any:
        state = network(x)[0]
        first, second = functional.softmax(network.head(state), -1), functional.softmax(other(state), -1)
        return (first - second).abs().mean()

    for step in range(config.steps):
        for group in (*of_adapter.param_groups, *of_heads.param_groups):
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        rows = random.integers(0, len(notes.label), config.batch_size)
        x, label = torch.from_numpy(notes.vectors[rows]), torch.from_numpy(notes.label[rows].astype(np.int64))
        there = torch.from_numpy(_drawn(target.vectors, config.batch_size, random))

        def learned(x: Any = x, label: Any = label) -> Any:
            state, logits = network(x)
            return functional.cross_entropy(logits, label) + functional.cross_entropy(other(state), label)

        def moves(loss: Any, *optimizers: Any) -> None:
            for optimizer in (of_adapter, of_heads):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        moves(learned(), of_adapter, of_heads)
        moves(learned() - gap(there), of_heads)
        for _ in range(2):
            moves(gap(there), of_adapter)
    with torch.no_grad():  # the score is that of both heads together
        network.head.weight.copy_((network.head.weight + other.weight) / 2)
        network.head.bias.copy_((network.head.bias + other.bias) / 2)
    return Classifier(network.eval(), None)


def _drawn(vectors: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    return np.asarray(vectors[random.integers(0, len(vectors), size)])


def _network(size: int, width: int) -> Any:
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.head = (
                torch.nn.Linear(size, width),
                torch.nn.Linear(width, size, bias=False),
                torch.nn.Linear(size, 2),
            )
            torch.nn.init.zeros_(self.up.weight)
            torch.nn.init.zeros_(self.head.bias)
            torch.nn.init.normal_(self.head.weight, std=0.02)

        def forward(self, x: Any) -> tuple[Any, Any]:
            state = x + self.up(torch.nn.functional.gelu(self.down(x)))
            return state, self.head(state)

    return Network()


def _with_tokens(notes: Notes, names: np.ndarray | None) -> np.ndarray:
    if names is None:
        return notes.vectors
    tokens = np.asarray(notes.institution)[:, None] == names[None, :]
    return np.concatenate([notes.vectors, tokens.astype(np.float32)], axis=1)


def _batches(institution: np.ndarray, config: FeatureConfig, *, balanced: bool, random: np.random.Generator) -> Any:
    """Yield the rows of each step: all notes alike, or as many of each institution."""
    members = [np.flatnonzero(institution == name) for name in np.unique(institution)]
    if not balanced:
        members = [np.arange(len(institution))]
    share = max(2, config.batch_size // len(members))
    waiting = [np.zeros(0, dtype=np.int64) for _ in members]
    for _ in range(config.steps):
        drawn = []
        for place, rows in enumerate(members):
            while len(waiting[place]) < share:
                waiting[place] = np.concatenate([waiting[place], random.permutation(rows)])
            drawn.append(waiting[place][:share])
            waiting[place] = waiting[place][share:]
        yield np.concatenate(drawn)
