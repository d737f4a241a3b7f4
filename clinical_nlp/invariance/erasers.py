"""Erasers: closed-form maps that take the institution out of note vectors afterwards.

A fitter accumulates patient-weighted sums in float64, batch by batch, and no notes; `fit` turns them into a frozen
`Eraser`. What an eraser erased is told on other patients than it was fitted on, and the probe that tells it is trained
on others again (`statistics.probes`): on its own patients every eraser looks perfect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clinical_nlp.errors import InputError, ModelError, TooFewPatientsError, UsageError, nearest
from clinical_nlp.runs import write_atomic, write_json

EraserName = Literal["leace", "mean_centring", "inlp"]

_ROUNDING = 1e-10
"""Of the largest variance: a direction with less does not vary."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """r(x) = x - offset[institution] - left @ (right @ (x - centre)).

    leace and inlp need no institution to be applied; mean_centring has only offsets, and needs it.

    `left` is (d, r), `right` (r, d), `centre` (d,); `offsets` is (k, d), all zero but for mean_centring. `n_patients`
    and `n_notes` say what it was fitted on, `n_directions` how many dimensions it takes away, `shrinkage` how much of
    the covariance was replaced by a multiple of the identity.
    """

    name: EraserName
    institutions: tuple[str, ...]
    centre: np.ndarray = field(repr=False)
    left: np.ndarray = field(repr=False)
    right: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    n_patients: int
    n_notes: int
    shrinkage: float = 0.0
    note: str = ""

    @property
    def n_directions(self) -> int:
        """Dimensions that are taken away."""
        return int(self.left.shape[1])

    @property
    def needs_institution(self) -> bool:
        """Whether the map differs between institutions."""
        return self.name == "mean_centring"

    def __call__(self, vectors: Any, institutions: Sequence[str] | None = None) -> Any:
        """Erase.

        Parameters
        ----------
        vectors : (n, d) NumPy array or torch tensor; what comes back is of the same kind, type and device.
        institutions : n names; only mean_centring reads them.

        Raises
        ------
        UsageError : the shape does not fit, or mean_centring is given no institutions.
        InputError : mean_centring meets an institution that it was not fitted on; its mean is not known.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.centre):
            raise UsageError(
                f"vectors have shape {tuple(vectors.shape)}; {self.name} was fitted on (n, {len(self.centre)})"
            )
        rows = None
        if self.needs_institution:
            rows = self._rows(institutions, len(vectors))
        if isinstance(vectors, np.ndarray):
            values = vectors.astype(np.float64)
            erased = values - (values - self.centre) @ self.right.T @ self.left.T
            if rows is not None:
                erased -= self.offsets[rows]
            return erased.astype(vectors.dtype if vectors.dtype.kind == "f" else np.float64)
        import torch

        def there(array: np.ndarray) -> Any:
            return torch.from_numpy(array).to(vectors.device, torch.float64)

        values = vectors.to(torch.float64)
        erased = values - (values - there(self.centre)) @ there(self.right).T @ there(self.left).T
        if rows is not None:
            erased = erased - there(self.offsets[rows])
        return erased.to(vectors.dtype)

    def _rows(self, institutions: Sequence[str] | None, n: int) -> np.ndarray:
        if institutions is None or len(institutions) != n:
            given = "none" if institutions is None else len(institutions)
            raise UsageError(f"mean_centring needs the institution of each of {n} vectors (got {given})")
        place = {name: row for row, name in enumerate(self.institutions)}
        unseen = sorted({str(name) for name in institutions if name not in place})
        if unseen:
            raise InputError(
                f"mean_centring was not fitted on institution {unseen[0]!r} and does not know its mean; fit it with "
                "unlabelled notes from there, or use leace or inlp, which need no institution"
            )
        return np.array([place[name] for name in institutions], dtype=int)

    def save(self, folder: Path) -> None:
        """Write `NAME.safetensors` and `NAME.json` into a folder."""
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(getattr(self, key)) for key in ("centre", "left", "right", "offsets")}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{self.name}.safetensors", save(arrays))
        about = {"name": self.name, "institutions": list(self.institutions), "dimensions": len(self.centre)}
        fitted = {key: getattr(self, key) for key in ("n_patients", "n_notes", "n_directions", "shrinkage", "note")}
        write_json(folder / f"{self.name}.json", about | fitted)

    @classmethod
    def load(cls, folder: Path, name: str) -> Eraser:
        """Read what `save` wrote.

        Raises
        ------
        ModelError : a file is missing or damaged, or the two do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            about = json.loads((folder / f"{name}.json").read_text("utf-8"))
            arrays = load_file(folder / f"{name}.safetensors")
            made = cls(
                about["name"],
                tuple(about["institutions"]),
                arrays["centre"],
                arrays["left"],
                arrays["right"],
                arrays["offsets"],
                n_patients=about["n_patients"],
                n_notes=about["n_notes"],
                shrinkage=about["shrinkage"],
                note=about["note"],
            )
            fits = arrays["left"].shape == (about["dimensions"], about["n_directions"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise ModelError(f"eraser {name!r} in {folder} is missing or damaged; fit it again") from None
        if not fits or made.name != name:
            raise ModelError(f"{folder / name}.json and .safetensors do not belong together; fit the eraser again")
        return made


@dataclass
class _Sums:
    """Weighted sums about a fixed origin, so that they add up in any order and lose nothing to a far-off mean."""

    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def empty(cls, d: int) -> _Sums:
        return cls(np.zeros(0), np.zeros((0, d)), np.zeros((d, d)))

    def grow(self, k: int) -> None:
        self.weight = np.concatenate([self.weight, np.zeros(k - len(self.weight))])
        self.first = np.concatenate([self.first, np.zeros((k - len(self.first), self.first.shape[1]))])

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.weight + other.weight, self.first + other.first, self.second + other.second)

    def take(self, rows: np.ndarray) -> _Sums:
        return _Sums(self.weight[rows], self.first[rows], self.second)

    def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Shares (k,), mean (d,), covariance (d, d), and cross-covariance with the one-hot institution (d, k)."""
        total = self.weight.sum()
        share, mean = self.weight / total, self.first.sum(0) / total
        covariance = self.second / total - np.outer(mean, mean)
        cross = (self.first / total).T - np.outer(mean, share)
        return share, mean, (covariance + covariance.T) / 2, cross


class EraserFitter:
    """Accumulates what the three erasers need, in memory that does not grow with the notes: 2 d^2 + k d numbers.

    Every patient weighs 1, whatever the number of their notes; so all notes of a patient come in one batch.
    Institutions are names, and are one-hot encoded here: as integers in one column, three institutions would lose one
    direction of the two that tell them apart.
    """

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._patient: dict[str, str] = {}
        self._origin: np.ndarray | None = None
        self._parts: list[_Sums] = []
        self._n_notes = 0
        self._people: dict[str, int] = {}

    @property
    def patients(self) -> frozenset[str]:
        """Patients that were taken in; none of them may be probed."""
        return frozenset(self._patient)

    def update(self, vectors: np.ndarray, institutions: Sequence[str], patients: Sequence[str]) -> EraserFitter:
        """Take in notes.

        Parameters
        ----------
        vectors : (n, d).
        institutions, patients : n names each.

        Raises
        ------
        UsageError : shapes do not fit.
        InputError : a value is not finite, a patient stands in two institutions, or was in an earlier batch.
        """
        values = np.asarray(vectors, dtype=np.float64)
        if values.ndim != 2 or not len(values) == len(institutions) == len(patients):
            raise UsageError(
                f"an eraser needs one institution and one patient for each vector (got vectors {values.shape}, "
                f"{len(institutions)} institutions, {len(patients)} patients)"
            )
        if self._origin is not None and values.shape[1] != len(self._origin):
            raise UsageError(f"vectors have {values.shape[1]} dimensions, those before had {len(self._origin)}")
        if not len(values):
            return self
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(1).sum())
            raise InputError(f"{bad} of {len(values)} vectors hold values that are not finite; leave those notes out")
        people, rows = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        names, columns = np.unique(np.asarray(institutions, dtype=str), return_inverse=True)
        stands = np.full(len(people), -1)
        stands[rows] = columns
        if (stands[rows] != columns).any():
            raise InputError(
                f"{len(np.unique(rows[stands[rows] != columns]))} patients have notes in two institutions; give each "
                "to one of them or leave them out"
            )
        if again := sum(person in self._patient for person in people.tolist()):
            raise InputError(f"{again} patients were in an earlier batch; a patient's notes must come in one batch")
        if self._origin is None:
            self._origin = values.mean(0)
            self._parts = [_Sums.empty(values.shape[1]) for _ in range(2)]
        for name in names.tolist():
            self._names.setdefault(name, len(self._names))
        for part in self._parts:
            part.grow(len(self._names))
        weight = 1.0 / np.bincount(rows)[rows]
        place = np.array([self._names[name] for name in names.tolist()])[columns]
        values = values - self._origin
        checks = np.array([_kept_for_checking(person) for person in people.tolist()])[rows]
        for part, inside in zip(self._parts, (~checks, checks), strict=True):
            if inside.any():
                weighted = values[inside] * weight[inside, None]
                part.second += weighted.T @ values[inside]
                np.add.at(part.first, place[inside], weighted)
                np.add.at(part.weight, place[inside], weight[inside])
        for person, column in zip(people.tolist(), stands.tolist(), strict=True):
            self._patient[person] = str(names[column])
            self._people[str(names[column])] = self._people.get(str(names[column]), 0) + 1
        self._n_notes += len(values)
        return self

    def fit(self, name: str, *, shrinkage: bool = True, n_directions: int | None = None) -> Eraser:
        """Return the eraser of what was taken in.

        Parameters
        ----------
        name : leace, mean_centring or inlp.
        shrinkage : leace: shrink the covariance towards a multiple of the identity, by as much as the number of
            patients asks for (OAS). The institution is linearly gone on the fitted notes with and without; shrinkage
            governs what else is moved, where there are few patients for so many dimensions.
        n_directions : inlp: take away that many dimensions, whether they still tell anything or not; default: until
            nothing is left that a held-out fifth of the patients confirms.

        Raises
        ------
        UsageError : the name is not known.
        TooFewPatientsError : one institution only, or one with a single patient.
        InputError : the vectors do not vary.
        """
        builders = {
            "leace": lambda: self._leace(shrinkage),
            "mean_centring": self._mean_centring,
            "inlp": lambda: self._inlp(n_directions),
        }
        if name not in builders:
            raise UsageError(f"eraser {name!r} is not known{nearest(name, builders)}")
        if n_directions is not None and (name != "inlp" or n_directions < 1):
            raise UsageError(f"n_directions is for inlp, and at least 1 (got {n_directions} for {name})")
        self._check()
        return builders[name]()

    def _check(self) -> None:
        if len(self._people) < 2:
            raise TooFewPatientsError(
                f"an eraser needs notes of at least 2 institutions (got {len(self._people)}): with one there is "
                "nothing to tell apart"
            )
        least = min(self._people, key=lambda name: (self._people[name], name))
        if self._people[least] < 2:
            raise TooFewPatientsError(
                f"institution {least!r} has a single patient: what is that patient's and what the institution's cannot "
                "be told; leave it out or bring more patients"
            )
        whole = self._parts[0] + self._parts[1]
        _, _, covariance, _ = whole.moments()
        assert self._origin is not None
        if np.trace(covariance) <= 1e-14 * max(1e-300, float(self._origin @ self._origin) + np.trace(whole.second)):
            raise InputError("the vectors do not vary: all notes look alike to this model, there is nothing to erase")

    def _made(self, name: EraserName, mean: np.ndarray, left: np.ndarray, right: np.ndarray, **more: Any) -> Eraser:
        assert self._origin is not None
        names = sorted(self._names)
        offsets = more.pop("offsets", np.zeros((len(names), len(mean))))
        return Eraser(
            name, tuple(names), mean + self._origin, left, right, offsets, len(self._patient), self._n_notes, **more
        )

    def _leace(self, shrink: bool) -> Eraser:
        """x - W^+ P W (x - mean), W = S^(-1/2), P onto the span of W times the cross-covariance.

        References
        ----------
        Belrose et al. 2023, LEACE: Perfect linear concept erasure in closed form, NeurIPS, theorem 4.3.
        Chen, Wiesel, Eldar and Hero 2010, Shrinkage Algorithms for MMSE Covariance Estimation, IEEE TSP 58, eq. 23.
        """
        _, mean, covariance, cross = (self._parts[0] + self._parts[1]).moments()
        d = len(mean)
        amount = _oas(covariance, len(self._patient)) if shrink else 0.0
        covariance = (1 - amount) * covariance + amount * np.trace(covariance) / d * np.eye(d)
        values, axes = np.linalg.eigh(covariance)
        kept = values > _ROUNDING * values[-1]
        axes, root = axes[:, kept], np.sqrt(values[kept])
        whitened = (axes / root).T @ cross  # in the eigenbasis: (kept, k)
        directions, sizes, _ = np.linalg.svd(whitened, full_matrices=False)
        directions = directions[:, sizes > _ROUNDING * max(1.0, float(sizes[0]))]
        left, right = (axes * root) @ directions, directions.T @ (axes / root).T
        return self._made("leace", mean, left, right, shrinkage=amount)

    def _mean_centring(self) -> Eraser:
        """Move the mean of every institution to that of all patients."""
        whole = self._parts[0] + self._parts[1]
        _, mean, _, _ = whole.moments()
        means = whole.first / whole.weight[:, None] - mean
        order = [self._names[name] for name in sorted(self._names)]
        none = np.zeros((len(mean), 0))
        return self._made("mean_centring", mean, none, none.T, offsets=means[order])

    def _inlp(self, n_directions: int | None) -> Eraser:
        """Iterated null-space projection with a ridge regression onto the one-hot institution.

        Each step fits the regression to what is left, and projects its directions out, orthogonally. It needs only
        second moments, so that no step reads the notes again. Four fifths of the patients fit and a fifth checks: it
        stops when the regression explains nothing of the institutions of that fifth.

        References
        ----------
        Ravfogel et al. 2020, Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection, ACL.
        """
        fit, check = self._parts
        whole = fit + check
        _, mean, covariance, cross = whole.moments()
        d = len(mean)
        checked = n_directions is None
        if checked and (min(fit.weight) < 2 or min(check.weight) < 2):
            raise TooFewPatientsError(
                "inlp keeps a fifth of the patients to know when to stop, and an institution has fewer than 2 among "
                "them; bring more patients, or give n_directions"
            )
        if checked:
            _, _, covariance, cross = fit.moments()
        ridge = np.trace(covariance) / len(self._patient)  # d / n of the mean variance
        found, projector, note = np.zeros((d, 0)), np.eye(d), "stopped when every direction was gone"
        wanted = d - 1 if n_directions is None else min(n_directions, d - 1)
        while found.shape[1] < wanted:
            inside, with_names = projector @ covariance @ projector, projector @ cross
            weights = projector @ np.linalg.solve(inside + ridge * np.eye(d), with_names)
            if checked and _explained(check, weights, projector) <= 0:
                note = "stopped when the regression explained nothing of the institutions of a held-out fifth"
                break
            steps, sizes, _ = np.linalg.svd(weights, full_matrices=False)
            steps = steps[:, sizes > 1e-9 * max(float(sizes[0]), 1e-300)]
            if not steps.shape[1] or sizes[0] <= 1e-12:
                break
            found = np.linalg.qr(np.concatenate([found, steps], 1))[0][:, :wanted]
            projector = np.eye(d) - found @ found.T
        if not checked:
            note = f"{found.shape[1]} directions were asked for"
        _, mean, _, _ = whole.moments()
        return self._made("inlp", mean, found, found.T.copy(), note=note)


def _kept_for_checking(patient: str) -> bool:
    """Whether a patient is of the fifth on which inlp decides to stop; by id, so that the order does not matter."""
    return hashlib.blake2b(patient.encode("utf-8", "surrogatepass"), digest_size=4).digest()[0] % 5 == 0


def _explained(sums: _Sums, weights: np.ndarray, projector: np.ndarray) -> float:
    """Share of the variance of the one-hot institution that a regression explains on the patients of `sums`.

    Patients are centred on their own means: the intercept is free, which is in favour of the regression.
    """
    share, _, covariance, cross = sums.moments()
    variance = float((share * (1 - share)).sum())
    guess = projector @ weights
    return float((2 * np.sum(guess * cross) - np.sum(guess * (covariance @ guess))) / variance)


def _oas(covariance: np.ndarray, n: int) -> float:
    """Oracle-approximating share of shrinkage for n independent rows (patients) and a covariance divided by n."""
    d = len(covariance)
    square, trace = float((covariance**2).sum()), float(np.trace(covariance))
    below = (n + 1 - 2 / d) * (square - trace**2 / d)
    if below <= 0 or d == 1:
        return 1.0 if d > 1 else 0.0
    return min(1.0, max(0.0, ((1 - 2 / d) * square + trace**2) / below))


def fit_erasers(
    vectors: np.ndarray, institutions: Sequence[str], patients: Sequence[str], names: Sequence[str]
) -> dict[str, Eraser]:
    """Fit erasers on vectors that are in memory; see `EraserFitter`."""
    fitter = EraserFitter().update(vectors, institutions, patients)
    return {name: fitter.fit(name) for name in names}
