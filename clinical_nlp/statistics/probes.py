"""Probes: what of the institution can still be read in note vectors, by whom, and after how many patients.

A probe is fresh, trained on patients that no eraser and no objective has seen, and scored on others again. Linear
guardedness says nothing about other probes, so the kinds stand beside each other. Every patient weighs 1, institutions
weigh the same, and the figure is the area under the ROC curve over pairs of patients: 0.5 at chance, whatever the
mix. It comes with an interval over patients of the scored part and with p-values of relabelled patients.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from clinical_nlp.errors import InputError, TooFewPatientsError, UsageError, nearest
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.text_measures import tokens_of

Scorer = Callable[[Any], np.ndarray]
"""From contents of n notes to (n, k) scores, one a label."""

_COMPONENTS = 32
_NEIGHBOURS = (5, 15, 45)
_PENALTIES = tuple(10.0**power for power in range(-4, 3))
FLAT = 0.02
"""A curve is on its plateau where doubling the patients certainly gains less AUC than this."""


@dataclass(frozen=True, eq=False)
class ProbedNotes:
    """Notes with what a probe is to read in them.

    `contents` is (n, d) vectors, or n texts for the probe `words`. `labels` are n names (of institutions, mostly).
    `strata`, if given, is a label of the patient that must not count as a way to tell: only patients of one stratum
    are compared, and training gives every label the same mix of strata.
    """

    contents: Any = field(repr=False)
    labels: Sequence[str] = field(repr=False)
    patients: Sequence[str] = field(repr=False)
    strata: Sequence[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.contents), len(self.labels), len(self.patients)}
        sizes |= set() if self.strata is None else {len(self.strata)}
        if len(sizes) > 1:
            raise UsageError(f"contents, labels, patients and strata must be of one length (got {sorted(sizes)})")
        if isinstance(self.contents, np.ndarray) and not np.isfinite(self.contents).all():
            bad = int((~np.isfinite(self.contents)).any(1).sum())
            raise InputError(f"{bad} of {len(self.contents)} vectors hold values that are not finite; leave them out")

    @cached_property
    def people(self) -> np.ndarray:
        """(n_patients,) sorted ids."""
        return np.unique(np.asarray(self.patients, dtype=str))

    @cached_property
    def row(self) -> np.ndarray:
        """(n,) row of each note's patient in `people`."""
        return np.searchsorted(self.people, np.asarray(self.patients, dtype=str))

    @cached_property
    def weight(self) -> np.ndarray:
        """(n,) one over the number of notes of the patient."""
        return 1.0 / np.bincount(self.row)[self.row]

    @cached_property
    def stratum(self) -> np.ndarray:
        """(n,) int."""
        if self.strata is None:
            return np.zeros(len(self.row), dtype=int)
        return np.unique(np.asarray(self.strata, dtype=str), return_inverse=True)[1]

    def of_patient(self, values: np.ndarray) -> np.ndarray | None:
        """One value a patient, or None where notes of a patient differ in it."""
        found = np.empty(len(self.people), dtype=values.dtype)
        found[self.row] = values
        return found if (found[self.row] == values).all() else None

    def select(self, rows: np.ndarray) -> ProbedNotes:
        """Return some notes; `rows` is a mask or row numbers."""
        places = (np.flatnonzero(rows) if rows.dtype == bool else rows).tolist()
        contents = (
            self.contents[places] if isinstance(self.contents, np.ndarray) else [self.contents[i] for i in places]
        )
        strata = None if self.strata is None else [self.strata[i] for i in places]
        return ProbedNotes(contents, [self.labels[i] for i in places], [self.patients[i] for i in places], strata)


# The area under the curve, over pairs of patients ---------------------------------------------------------------------


def _mass_below(scores: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """(n,) mass of lower scores and half of that of equal ones."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    total = np.concatenate([[0.0], np.cumsum(mass[order])])
    first = np.searchsorted(ranked, ranked, side="left")
    last = np.searchsorted(ranked, ranked, side="right")
    below = np.empty(len(scores))
    below[order] = (total[first] + total[last]) / 2
    return below


def patient_auc(
    scores: np.ndarray, is_target: np.ndarray, rows: np.ndarray, stratum: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Area under the ROC curve with every patient weighing 1, over pairs within a stratum.

    AUC = N / D with N the summed weight of (target, other) pairs of notes that the scores order rightly (half where
    they tie) and D that of all such pairs; a note weighs one over the notes of its patient.

    Parameters
    ----------
    scores, is_target : (n,) numbers and bool.
    rows : (n,) int, the patient of each note.
    stratum : (n,) int; default one.

    Returns
    -------
    The AUC, NaN where there is no pair; and each patient's influence on it, (n_patients,), which sum to zero and whose
    squares sum to the variance (with one label a patient, DeLong's; with several, Obuchowski's for clustered data).

    References
    ----------
    DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44. Obuchowski 1997, Biometrics 53.
    """
    n_patients = int(rows.max(initial=-1)) + 1
    weight = 1.0 / np.bincount(rows, minlength=n_patients)[rows]
    stratum = np.zeros(len(rows), dtype=int) if stratum is None else stratum
    right = pairs = 0.0
    won, met = np.zeros(len(rows)), np.zeros(len(rows))
    for one in np.unique(stratum):
        inside = np.flatnonzero(stratum == one)
        target, mass, values = is_target[inside], weight[inside], scores[inside]
        n_target, n_other = float(mass[target].sum()), float(mass[~target].sum())
        if not n_target or not n_other:
            continue
        beats = _mass_below(values, mass * ~target)
        beaten = n_target - _mass_below(values, mass * target)
        won[inside] = mass * np.where(target, beats, beaten)
        met[inside] = mass * np.where(target, n_other, n_target)
        right += float((mass * beats)[target].sum())
        pairs += n_target * n_other
    if not pairs:
        return math.nan, np.zeros(n_patients)
    auc = right / pairs
    return auc, np.bincount(rows, weights=(won - auc * met) / pairs, minlength=n_patients)


def _many_way(scores: np.ndarray, labels: np.ndarray, notes: ProbedNotes) -> tuple[float, np.ndarray]:
    """Mean over labels of the AUC of one against the rest."""
    if scores.shape[1] == 2:
        return patient_auc(scores[:, 1] - scores[:, 0], labels == 1, notes.row, notes.stratum)
    found = [patient_auc(scores[:, k], labels == k, notes.row, notes.stratum) for k in range(scores.shape[1])]
    return float(np.mean([auc for auc, _ in found])), np.mean([influence for _, influence in found], axis=0)


def _relabelled(scores: np.ndarray, labels: np.ndarray, notes: ProbedNotes, n: int, seed: int) -> np.ndarray | None:
    """(n,) the same AUC for patients relabelled within strata; None where a patient has several labels or strata.

    With one label a patient, the weight of rightly ordered pairs is t'a - n_t^2 / 2, where a sums each patient's mass
    below over everyone of the stratum: all relabellings are one product.
    """
    label, stratum = notes.of_patient(labels), notes.of_patient(notes.stratum)
    if label is None or stratum is None:
        return None
    drawn = np.repeat(label[:, None], n, axis=1)
    generator = np.random.default_rng([seed, 17])
    for one in np.unique(stratum):
        members = np.flatnonzero(stratum == one)
        drawn[members] = generator.permuted(drawn[members], axis=0)
    two = scores.shape[1] == 2
    columns = [scores[:, 1] - scores[:, 0]] if two else list(scores.T)
    values = np.zeros(n)
    for k, column in enumerate(columns):
        below = np.empty(len(column))
        for one in np.unique(notes.stratum):
            inside = notes.stratum == one
            below[inside] = _mass_below(column[inside], notes.weight[inside])
        mass = np.bincount(notes.row, weights=notes.weight * below, minlength=len(label))
        target = (drawn == (1 if two else k)).astype(np.float64)
        right, pairs = mass @ target, 0.0
        for one in np.unique(stratum):
            members = stratum == one
            n_target = float(target[members, 0].sum())
            right = right - n_target**2 / 2
            pairs += n_target * (members.sum() - n_target)
        values += right / pairs if pairs else math.nan
    return values / len(columns)


def _auc_estimate(auc: float, influence: np.ndarray, fewest: int, n_notes: int, part: str) -> Estimate:
    from scipy import stats

    n = len(influence)
    if math.isnan(auc):
        return Estimate(auc, math.nan, math.nan, n, n_notes, part, "undefined: no pair of patients to compare")
    if fewest < FEWEST_PATIENTS:
        note = f"fewer than {FEWEST_PATIENTS} patients in the smallest group"
        return Estimate(auc, math.nan, math.nan, n, n_notes, part, note)
    error = math.sqrt(n / (n - 1) * float((influence**2).sum()))
    inside = min(max(auc, 0.0), 1.0)
    slope = 2 * math.sqrt(inside * (1 - inside))
    if error < 1e-12 or slope < 1e-9:
        return Estimate(auc, math.nan, math.nan, n, n_notes, part, "every patient is told alike: no spread")
    # On the arcsine scale the spread hardly depends on the AUC, so that the interval holds up to 1.
    reach, angle = float(stats.t.ppf(0.975, fewest - 1)) * error / slope, math.asin(math.sqrt(inside))
    low, high = math.sin(max(angle - reach, 0.0)) ** 2, math.sin(min(angle + reach, math.pi / 2)) ** 2
    return Estimate(auc, low, high, n, n_notes, part)


# The probes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Training:
    """What a probe learns from: rows standardised, one-hot labels, weights with which all labels weigh the same."""

    x: Any
    y: np.ndarray
    w: np.ndarray
    row: np.ndarray
    seed: int

    @cached_property
    def check(self) -> np.ndarray:
        """(n,) True for the notes of a fifth of each label's patients, on which a probe chooses its strength."""
        people = int(self.row.max()) + 1
        label = np.zeros(people, dtype=int)
        label[self.row] = self.y.argmax(1)
        chosen = np.zeros(people, dtype=bool)
        generator = np.random.default_rng([self.seed, 5])
        for k in range(self.y.shape[1]):
            members = generator.permutation(np.flatnonzero(label == k))
            chosen[members[: len(members) // 5]] = True
        return chosen[self.row]

    def loss(self, scores: np.ndarray, rows: np.ndarray) -> float:
        return float(np.average(((scores - self.y[rows]) ** 2).sum(1), weights=self.w[rows]))


def _standardiser(x: np.ndarray, w: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    centre = np.average(x, axis=0, weights=w)
    scale = np.sqrt(np.average((x - centre) ** 2, axis=0, weights=w))
    varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
    factor = np.where(varies, 1 / np.where(varies, scale, 1.0), 0.0)
    return lambda new: (np.asarray(new, dtype=np.float64) - centre) * factor


def _components(x: np.ndarray, w: np.ndarray, *, whiten: bool) -> Callable[[np.ndarray], np.ndarray]:
    prepare = _standardiser(x, w)
    ready = prepare(x)
    values, axes = np.linalg.eigh(ready.T @ (ready * (w / w.sum())[:, None]))
    axes = axes[:, ::-1][:, :_COMPONENTS]
    root = np.sqrt(np.maximum(values[::-1][:_COMPONENTS], 0))
    kept = root > 1e-6 * max(float(root[0]), 1e-300)
    turn = axes[:, kept] / (root[kept] if whiten else 1.0)
    return lambda new: prepare(new) @ turn


def _ridge(data: _Training) -> Scorer:
    """Least squares on one-hot labels; the penalty is chosen on a fifth of the patients, then all are fitted."""

    def solve(rows: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
        x, w = data.x[rows], data.w[rows] / data.w[rows].sum()
        values, axes = np.linalg.eigh(x.T @ (x * w[:, None]))
        right = axes.T @ (x.T @ ((data.y[rows] - 1 / data.y.shape[1]) * w[:, None]))
        return [axes @ (right / (np.maximum(values, 0) + penalty)[:, None]) for penalty in penalties]

    everyone, penalty = np.arange(len(data.x)), 1.0
    if data.check.any() and not data.check.all():
        fit, check = np.flatnonzero(~data.check), np.flatnonzero(data.check)
        losses = [data.loss(data.x[check] @ b + 1 / data.y.shape[1], check) for b in solve(fit, _PENALTIES)]
        penalty = _PENALTIES[int(np.argmin(losses))]
    weights = solve(everyone, [penalty])[0]
    return lambda new: np.round(new @ weights, 9)  # identical notes must tie, whatever order the arithmetic took


def _linear(data: _Training) -> Scorer:
    prepare = _standardiser(data.x, data.w)
    score = _ridge(replace(data, x=prepare(data.x)))
    return lambda new: score(prepare(new))


def _quadratic(data: _Training) -> Scorer:
    """Ridge on the first 32 principal components, their squares and products: reads means and covariances."""
    turn = _components(data.x, data.w, whiten=True)

    def expand(x: np.ndarray) -> np.ndarray:
        z = turn(x)
        left, right = np.triu_indices(z.shape[1])
        return np.concatenate([z, z[:, left] * z[:, right]], axis=1)

    wide = expand(data.x)
    prepare = _standardiser(wide, data.w)
    score = _ridge(replace(data, x=prepare(wide)))
    return lambda new: score(prepare(expand(new)))


def _neighbours(data: _Training) -> Scorer:
    """Share of each label among the nearest notes of the first 32 principal components."""
    turn = _components(data.x, data.w, whiten=False)
    known = turn(data.x).astype(np.float32)

    def votes(new: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        there, many = known[rows], min(_NEIGHBOURS[-1], len(rows))
        squares, found = (there**2).sum(1), []
        for start in range(0, len(new), 512):
            block = squares - 2 * (new[start : start + 512] @ there.T)
            near = np.argpartition(block, many - 1, axis=1)[:, :many]
            order = np.argsort(np.take_along_axis(block, near, 1), axis=1, kind="stable")
            mass = (data.y * data.w[:, None])[rows[np.take_along_axis(near, order, 1)]]
            found.append(np.stack([mass[:, :k].sum(1) for k in _NEIGHBOURS]))
        all_votes = np.concatenate(found, axis=1)
        return list(all_votes / np.maximum(all_votes.sum(2, keepdims=True), 1e-300))

    best = 1
    if data.check.any() and not data.check.all():
        fit, check = np.flatnonzero(~data.check), np.flatnonzero(data.check)
        best = int(np.argmin([data.loss(share, check) for share in votes(known[check], fit)]))
    everyone = np.arange(len(known))
    return lambda new: votes(turn(new).astype(np.float32), everyone)[best]


def _mlp(data: _Training) -> Scorer:
    """One hidden layer of 64, trained until a fifth of the patients no longer gains; the best epoch counts."""
    import torch

    prepare = _standardiser(data.x, data.w)
    x = torch.tensor(prepare(data.x), dtype=torch.float32)
    y = torch.tensor(data.y.argmax(1))
    w = torch.tensor(data.w / data.w.mean(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(data.seed)
    hidden, labels = 64, data.y.shape[1]
    layers = torch.nn.Linear(x.shape[1], hidden), torch.nn.Linear(hidden, labels)
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    entropy = torch.nn.CrossEntropyLoss(reduction="none")
    check = torch.tensor(data.check)
    fit, left = torch.nonzero(~check)[:, 0], torch.nonzero(check)[:, 0]
    best, kept, waited = math.inf, [value.detach().clone() for value in net.parameters()], 0
    for _ in range(150):
        for rows in fit[torch.randperm(len(fit), generator=generator)].split(128):
            optimizer.zero_grad()
            (entropy(net(x[rows]), y[rows]) * w[rows]).mean().backward()
            optimizer.step()
        if not len(left):
            kept = [value.detach().clone() for value in net.parameters()]
            continue
        with torch.no_grad():
            loss = float((entropy(net(x[left]), y[left]) * w[left]).sum() / w[left].sum())
        if loss < best - 1e-4:
            best, kept, waited = loss, [value.detach().clone() for value in net.parameters()], 0
        elif (waited := waited + 1) >= 20:
            break
    with torch.no_grad():
        for value, good in zip(net.parameters(), kept, strict=True):
            value.copy_(good)

    def score(new: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = net(torch.tensor(prepare(new), dtype=torch.float32)).log_softmax(1)
        return np.asarray(found.numpy(), dtype=np.float64)

    return score


def _words(data: _Training) -> Scorer:
    """TF-IDF of words and word pairs with logistic regression: how far the text itself gives the institution away."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    made = TfidfVectorizer(tokenizer=tokens_of, token_pattern=None, lowercase=False, sublinear_tf=True,
                           ngram_range=(1, 2), min_df=2 if len(data.x) >= 50 else 1, dtype=np.float32)  # fmt: skip
    rows = made.fit_transform(data.x)
    model = LogisticRegression(C=10.0, max_iter=200, tol=1e-3)
    model.fit(rows, data.y.argmax(1), sample_weight=data.w / data.w.mean())

    def score(new: Any) -> np.ndarray:
        found = np.asarray(model.decision_function(made.transform(new)))
        return np.stack([-found, found], 1) / 2 if found.ndim == 1 else found

    return score


PROBES: dict[str, Callable[[_Training], Scorer]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "mlp": _mlp,
    "neighbours": _neighbours,
    "words": _words,
}
"""Probe -> how it is trained. `words` reads texts, the others vectors."""


def train_probe(kind: str, notes: ProbedNotes, *, seed: int = 0) -> tuple[Scorer, tuple[str, ...]]:
    """Train a probe; return what scores notes, and the labels of its columns.

    Raises
    ------
    UsageError : the kind is not known.
    TooFewPatientsError : there is one label only, or one with fewer than 2 patients.
    """
    if kind not in PROBES:
        raise UsageError(f"probe {kind!r} is not known{nearest(kind, PROBES)}")
    names, y = np.unique(np.asarray(notes.labels, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise TooFewPatientsError(f"a probe tells 2 institutions or more apart (got {len(names)})")
    people = [len(np.unique(notes.row[y == k])) for k in range(len(names))]
    if min(people) < 2:
        raise TooFewPatientsError(
            f"a probe needs at least 2 patients to train on in each group ({str(names[int(np.argmin(people))])!r} has "
            f"{min(people)})"
        )
    cells = notes.stratum * len(names) + y
    mass = np.bincount(cells, weights=notes.weight, minlength=(notes.stratum.max() + 1) * len(names))
    mass = mass.reshape(-1, len(names))
    # Every label weighs the same within a stratum; a stratum that a label lacks would tell, and is left out.
    full = np.asarray((mass > 0).all(axis=1))
    if not full.any():
        raise TooFewPatientsError("no stratum has patients of every institution: nothing can be compared given it")
    share = np.where(full[:, None], mass.sum(1, keepdims=True) / np.where(mass > 0, mass, 1), 0.0)
    weight = notes.weight * share.ravel()[cells]
    used = np.flatnonzero(weight > 0)
    kept = notes if len(used) == len(weight) else notes.select(used)
    contents = np.asarray(kept.contents, dtype=np.float64) if kind != "words" else list(kept.contents)
    data = _Training(contents, np.eye(len(names))[y[used]], weight[used], kept.row, seed)
    return PROBES[kind](data), tuple(names.tolist())


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """A probe trained on so many patients: its AUC on others, and what relabelled patients give.

    `p_value` is NaN, with `null_note`, where notes of a patient differ in the label, so that none can be relabelled.
    """

    n_train_patients: int
    auc: Estimate
    p_value: float
    null_mean: float
    null_sd: float
    n_permutations: int
    null_note: str = ""


Shape = Literal["plateau", "rising", "not shown"]


@dataclass(frozen=True, slots=True)
class ProbeCurve:
    """AUC over the number of patients a probe was trained on; `gain` is that of the last step, same patients scored.

    `shape` is plateau where the whole interval of the gain lies below 0.02, rising where it lies above 0, else not
    shown. A curve that still rises, or may, gives a lower bound of what can be read.
    """

    probe: str
    points: tuple[ProbePoint, ...]
    gain: Estimate
    shape: Shape

    @property
    def last(self) -> ProbePoint:
        """With all patients."""
        return self.points[-1]


def probe_curve(
    kind: str,
    train: ProbedNotes,
    test: ProbedNotes,
    *,
    sizes: Sequence[int] | None = None,
    n_permutations: int = 999,
    seed: int = 0,
    part: str = "probe test",
) -> ProbeCurve:
    """Train fresh probes on growing sets of patients and score each on the same other patients.

    Parameters
    ----------
    kind : a key of `PROBES`.
    train, test : notes of different patients.
    sizes : patients of each label; smaller sets lie inside larger ones. Default: all, a half, a quarter, ... down to
        10, at most six.
    n_permutations : relabellings of the scored patients; the probe stays as it was trained.

    Raises
    ------
    InputError : a patient is in both.
    UsageError, TooFewPatientsError : see `train_probe`.
    """
    if shared := len(np.intersect1d(train.people, test.people)):
        raise InputError(f"{shared} patients are both trained and scored on; split by patient")
    labels = np.asarray(train.labels, dtype=str)
    names = np.unique(labels)
    generator, order = np.random.default_rng([seed, 3]), {}
    for name in names.tolist():
        order[name] = generator.permutation(np.unique(train.row[labels == name]))
    most = max(map(len, order.values())) if order else 0
    if sizes is None:
        halves = [math.ceil(most / 2**step) for step in range(6)]
        sizes = [size for size in halves if size >= 10] or [most]
    points, influences = [], []
    for size in sorted(set(sizes)):
        chosen = np.zeros(len(train.people), dtype=bool)
        for members in order.values():
            chosen[members[:size]] = True
        small = train if chosen.all() else train.select(chosen[train.row])
        point, influence = _score_probe(kind, small, test, n_permutations, seed, part)
        points.append(point)
        influences.append(influence)
    return ProbeCurve(kind, tuple(points), *_last_step(points, influences))


def _score_probe(
    kind: str, train: ProbedNotes, test: ProbedNotes, n_permutations: int, seed: int, part: str
) -> tuple[ProbePoint, np.ndarray]:
    n, n_notes, people = len(train.people), len(test.row), len(test.people)
    nothing = Estimate(math.nan, math.nan, math.nan, people, n_notes, part, "the vectors do not vary")
    if kind != "words" and float(np.ptp(np.asarray(train.contents), axis=0).max(initial=0)) == 0:
        return ProbePoint(n, nothing, math.nan, math.nan, math.nan, 0, nothing.note), np.zeros(people)
    score, names = train_probe(kind, train, seed=seed)
    there = np.asarray(test.labels, dtype=str)
    place = {name: k for k, name in enumerate(names)}
    if unseen := sorted(set(there.tolist()) - place.keys()):
        raise InputError(
            f"the probe was not trained on {unseen[0]!r}, which it is scored on; split within institutions"
        )
    labels = np.array([place[name] for name in there.tolist()], dtype=int)
    scores = score(test.contents if kind == "words" else np.asarray(test.contents, dtype=np.float64))
    auc, influence = _many_way(scores, labels, test)
    fewest = min(len(np.unique(test.row[labels == k])) for k in range(len(names)))
    estimate = _auc_estimate(auc, influence, fewest, n_notes, part)
    null = _relabelled(scores, labels, test, n_permutations, seed)
    if null is None or math.isnan(auc):
        note = "no p-value: notes of a patient differ in the label"
        return ProbePoint(n, estimate, math.nan, math.nan, math.nan, 0, note), influence
    p_value = (1 + int((null >= auc - 1e-12).sum())) / (len(null) + 1)
    return ProbePoint(n, estimate, p_value, float(null.mean()), float(null.std()), len(null)), influence


def _last_step(points: Sequence[ProbePoint], influences: Sequence[np.ndarray]) -> tuple[Estimate, Shape]:
    from scipy import stats

    last = points[-1].auc
    blank = replace(last, value=math.nan, low=math.nan, high=math.nan)
    if len(points) < 2:
        return replace(blank, note="one size only: no curve"), "not shown"
    value = last.value - points[-2].auc.value
    if math.isnan(last.low):
        full = points[-2].auc.value > 1 - FLAT  # nothing is left to gain
        return replace(blank, value=value, note=last.note), "plateau" if full else "not shown"
    n = last.n_patients
    error = math.sqrt(n / (n - 1) * float(((influences[-1] - influences[-2]) ** 2).sum()))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    gain = replace(blank, value=value, low=value - reach, high=value + reach, note="")
    return gain, "plateau" if gain.high < FLAT else "rising" if gain.low > 0 else "not shown"


# The floor of LEACE ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Floor:
    """AUC of an ideal linear probe on new patients after LEACE was fitted on so many; what more patients would lower.

    `design_effect` is how many correlated notes say as much as one independent note; `n_effective` counts the latter.
    """

    auc: float
    dimensions: int
    n_patients: int
    n_notes: int
    icc: float
    design_effect: float
    n_effective: float


def leace_floor(dimensions: int, n_notes: float, notes_per_patient: float, icc: float) -> float:
    """AUC that a linear probe with unlimited patients reaches on new patients after LEACE; two equal institutions.

    The fitted direction misses the true one by the sampling error of a difference of means. In whitened coordinates
    that has squared length 4 d deff / n with deff = 1 + (m - 1) ICC, and a shift of that length separates with
    AUC = Phi(sqrt(2 d deff / n)).

    Parameters
    ----------
    dimensions : d.
    n_notes : n, on which LEACE was fitted, both institutions together.
    notes_per_patient : m.
    icc : intra-patient correlation of a whitened dimension.
    """
    from scipy import stats

    return float(stats.norm.cdf(math.sqrt(2 * dimensions * (1 + (notes_per_patient - 1) * icc) / n_notes)))


def intraclass_correlation(fitted: ProbedNotes) -> float:
    """Share of the variance within institutions that lies between patients, mean over whitened dimensions, in [0, 1].

    With W the covariance within patients and C that of patient means, the covariance between patients is
    B = C - mean(1 / m) W, and the share is tr((B + W)^-1 B) / d. 0 where no patient has two notes.
    """
    x = np.asarray(fitted.contents, dtype=np.float64)
    counts = np.bincount(fitted.row)
    spare = int((counts - 1).sum())
    if not spare:
        return 0.0
    means = np.zeros((len(counts), x.shape[1]))
    np.add.at(means, fitted.row, x * fitted.weight[:, None])
    inside = x - means[fitted.row]
    within = inside.T @ inside / spare
    label = fitted.of_patient(np.asarray(fitted.labels, dtype=str))
    if label is None:
        raise InputError("a patient stands in two institutions; give each patient to one of them")
    centred = means.copy()
    for name in np.unique(label):
        centred[label == name] -= means[label == name].mean(0)
    of_means = centred.T @ centred / max(1, len(counts) - len(np.unique(label)))
    between = of_means - (1 / counts).mean() * within
    whole = between + within
    whole += 1e-9 * np.trace(whole) / len(whole) * np.eye(len(whole))
    return float(np.clip(np.trace(np.linalg.solve(whole, between)) / len(whole), 0.0, 1.0))


def leace_floor_of(fitted: ProbedNotes) -> Floor:
    """The floor of a LEACE that was fitted on these notes: unequal institutions and notes a patient, mean over pairs.

    A mean of P patients with m_p notes has variance sum_p (ICC + (1 - ICC) / m_p) / P^2 of a note's; with equal
    patients and institutions this is `leace_floor`.
    """
    from scipy import stats

    icc = intraclass_correlation(fitted)
    d = int(np.asarray(fitted.contents).shape[1])
    counts = np.bincount(fitted.row)
    label = fitted.of_patient(np.asarray(fitted.labels, dtype=str))
    assert label is not None
    variances = []
    for name in np.unique(label):
        notes = counts[label == name]
        variances.append(float((icc + (1 - icc) / notes).sum() / len(notes) ** 2))
    pairs = [(a, b) for place, a in enumerate(variances) for b in variances[:place]]
    auc = float(np.mean([stats.norm.cdf(math.sqrt(d * (a + b) / 2)) for a, b in pairs])) if pairs else math.nan
    effective = sum(1 / value for value in variances)
    return Floor(auc, d, len(counts), len(fitted.row), icc, len(fitted.row) / effective, effective)


# Control labels -------------------------------------------------------------------------------------------------------


def control_labels(
    texts: Sequence[str], patients: Sequence[str], *, seed: int = 0, fewest_patients: int = 11
) -> tuple[list[str], int]:
    """Meaningless labels that a probe can learn: a random function of the template lines of a note.

    A line that recurs in at least `fewest_patients` patients gets a random sign, and a note the label of the larger
    half of their sums. The same lines stand in the notes that are trained and scored on, so that a probe with enough
    room reads the label; a random label a patient could not be read by any, and comparing with it says nothing.

    Returns
    -------
    n labels, and how many lines they rest on.

    Raises
    ------
    InputError : no line recurs, or all notes have the same ones.

    References
    ----------
    Hewitt and Liang 2019, Designing and Interpreting Probes with Control Tasks, EMNLP.
    """
    lines = [{" ".join(tokens_of(line)) for line in text.splitlines()} - {""} for text in texts]
    seen: dict[str, set[str]] = defaultdict(set)
    for found, patient in zip(lines, patients, strict=True):
        for line in found:
            seen[line].add(patient)
    sign = {
        line: 1
        - 2 * (hashlib.blake2b(f"{seed}\0{line}".encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % 2)
        for line, people in seen.items()
        if fewest_patients <= len(people) < len(set(patients))
    }
    sums = np.array([sum(sign.get(line, 0) for line in found) for found in lines], dtype=float)
    labels = sums > np.median(sums)
    if labels.all() or not labels.any():
        raise InputError(
            f"no line recurs in {fewest_patients} patients and misses in others: there are no templates to attach "
            "control labels to"
        )
    return ["heads" if label else "tails" for label in labels], len(sign)


def _coin(key: str) -> int:
    return 1 - 2 * (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % 2)


# Description length ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DescriptionLength:
    """Bits a patient to send the institutions, given the vectors; `compression` is `uniform_bits` / `bits`.

    1 where the vectors say nothing; below 1 where a probe was misled. `low` and `high` are the smallest and largest
    over orders of the patients: not a confidence interval.
    """

    bits: float
    uniform_bits: float
    compression: float
    low: float
    high: float
    n_patients: int
    n_notes: int
    n_orders: int


def description_length(notes: ProbedNotes, *, n_orders: int = 5, n_blocks: int = 6, seed: int = 0) -> DescriptionLength:
    """Online (prequential) code of the institutions: each block is coded by a probe trained on those before it.

    Blocks end at patient boundaries and double in size. The first is coded with the shares of the institutions,
    H(y) bits a patient rather than log2 k, which unequal institutions would beat without any vector. The probe is
    logistic regression, its strength chosen on a fifth of the patients before.

    Raises
    ------
    TooFewPatientsError : fewer than 20 patients, or one institution.

    References
    ----------
    Voita and Titov 2020, Information-Theoretic Probing with Minimum Description Length, EMNLP, section 2.2.2.
    """
    names, y = np.unique(np.asarray(notes.labels, dtype=str), return_inverse=True)
    people = len(notes.people)
    if len(names) < 2 or people < FEWEST_PATIENTS:
        raise TooFewPatientsError(
            f"an online code needs 2 institutions and {FEWEST_PATIENTS} patients (got {len(names)} and {people})"
        )
    share = np.bincount(y, weights=notes.weight) / people
    uniform = float(-(share * np.log2(share)).sum())
    x = np.asarray(notes.contents, dtype=np.float64)
    ends = sorted({max(10, math.ceil(people / 2**step)) for step in range(n_blocks)})
    bits = []
    for order in range(n_orders):
        place = np.random.default_rng([seed, 7, order]).permutation(people)[notes.row]
        total = uniform * ends[0]
        for begin, end in pairwise(ends):
            known, new = np.flatnonzero(place < begin), np.flatnonzero((place >= begin) & (place < end))
            chances = _logistic(x[known], y[known], notes.weight[known], place[known], x[new], share)
            total -= float((notes.weight[new] * np.log2(chances[np.arange(len(new)), y[new]])).sum())
        bits.append(total / people)
    found = uniform / np.array(bits)
    mean = float(np.mean(bits))
    return DescriptionLength(
        mean, uniform, uniform / mean, float(found.min()), float(found.max()), people, len(y), n_orders
    )


def _logistic(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, place: np.ndarray, new: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Probabilities of new rows; mixed with a thousandth of the shares, so that no note costs unlimited bits."""
    from sklearn.linear_model import LogisticRegression

    prepare = _standardiser(x, w)
    x, new = prepare(x), prepare(new)
    check = place % 5 == 0
    strengths = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def chances(rows: np.ndarray, to: np.ndarray, strength: float) -> np.ndarray:
        found = np.zeros((len(to), len(share)))
        kinds = np.unique(y[rows])
        if len(kinds) < 2:
            return np.tile(share, (len(to), 1))
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x[rows], y[rows], sample_weight=w[rows])
        found[:, kinds] = model.predict_proba(to)
        return 0.999 * found + 0.001 * share

    def cost(strength: float) -> float:
        guess = chances(np.flatnonzero(~check), x[check], strength)
        return float(-(w[check] * np.log(guess[np.arange(len(guess)), y[check]])).sum())

    best = min(strengths, key=cost) if check.any() and not check.all() else strengths[1]
    return chances(np.arange(len(x)), new, best)
