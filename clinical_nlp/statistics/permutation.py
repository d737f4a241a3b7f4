"""Who may be exchanged with whom: whole patients, between two institutions, within strata of patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from clinical_nlp.errors import InputError, TooFewPatientsError, UsageError


@dataclass(frozen=True, eq=False)
class PermutationPlan:
    """One set of relabelled patients, shared by every test of a comparison.

    Notes of one patient resemble each other, so permuting notes finds "drift" between identical institutions almost
    always; here every patient moves with all of their notes.

    What moves is a row: the notes of one patient at one institution. A patient seen in both institutions is refused,
    unless the plan is `paired`: then they have two rows, which are only ever swapped with each other, while patients
    of one institution are exchanged among themselves. Statistics leave pairs of one patient out.

    Parameters
    ----------
    patient_ids, institutions : one entry a note; exactly two institutions.
    reference : the institution that is compared against; default the first in sorted order.
    strata : one label a note, the same for all notes of a patient; patients are exchanged only within a stratum.
    n_permutations : relabellings besides the observed one.
    seed : of the relabellings.
    paired : swap the two sides of a patient who has notes in both institutions.

    Raises
    ------
    InputError : a note has no patient or no institution, or a patient has notes in both institutions (unless
        `paired`) or in two strata.
    TooFewPatientsError : fewer than two patients in an institution.
    UsageError : the arguments do not fit together.
    """

    patient_ids: Sequence[str] = field(repr=False)
    institutions: Sequence[str] = field(repr=False)
    reference: str | None = None
    strata: Sequence[object] | None = field(default=None, repr=False)
    n_permutations: int = 999
    seed: int = 0
    paired: bool = False

    def __post_init__(self) -> None:
        if len(self.patient_ids) != len(self.institutions):
            raise UsageError(f"{len(self.patient_ids)} patient ids for {len(self.institutions)} institutions")
        if self.n_permutations < 1:
            raise UsageError(f"n_permutations must be at least 1 (got {self.n_permutations})")
        _refuse_missing(self.patient_ids, "patient id")
        _refuse_missing(self.institutions, "institution")
        names = sorted(set(self.institutions))
        if len(names) != 2:
            raise UsageError(f"a two-sample test compares exactly 2 institutions (got {len(names)})")
        if self.reference is not None and self.reference not in names:
            raise UsageError(f"reference {self.reference!r} is not one of {names[0]!r} and {names[1]!r}")
        both = int(np.count_nonzero(np.bincount(self.row_person) > 1))
        if both and not self.paired:
            raise InputError(
                f"{both} of {self.n_people} patients have notes in both institutions, and a patient can stand on one "
                "side only: leave them out (patient_in_two=drop), count each where most of their notes are "
                "(patient_in_two=majority), or swap their two sides within them (a plan with paired=True)"
            )
        if min(self.n_patients) < 2:
            raise TooFewPatientsError(
                f"a two-sample test needs at least 2 patients in each institution (got {self.n_patients[0]} and "
                f"{self.n_patients[1]})"
            )
        if self.strata is not None:
            _, rows = np.unique(np.asarray(self.strata, dtype=str), return_inverse=True)
            if len(rows) != len(self.patient_ids):
                raise UsageError(f"{len(rows)} strata for {len(self.patient_ids)} notes")
            if np.any(rows != self.patient_stratum[self.note_patient]):
                raise InputError("a stratum must be the same for all notes of a patient")

    @cached_property
    def names(self) -> tuple[str, str]:
        """Reference and the other institution."""
        names = sorted(set(self.institutions))
        reference = names[0] if self.reference is None else self.reference
        return reference, next(name for name in names if name != reference)

    @cached_property
    def _people(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(np.asarray(self.patient_ids, dtype=str), return_inverse=True)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """2 x person + side of each row, and each note's row."""
        side = np.asarray(self.institutions, dtype=str) == self.names[1]
        return np.unique(2 * self._people[1] + side, return_inverse=True)

    @cached_property
    def patients(self) -> np.ndarray:
        """(n_rows,) the id of each row's patient, sorted; in a paired plan a patient may be there twice in a row."""
        return np.asarray(self._people[0][self.row_person])

    @cached_property
    def row_person(self) -> np.ndarray:
        """(n_rows,) number of each row's patient, 0 ... n_people - 1."""
        return self._rows[0] // 2

    @cached_property
    def n_people(self) -> int:
        """Patients, each counted once."""
        return len(self._people[0])

    @cached_property
    def twins(self) -> np.ndarray:
        """(n_pairs, 2) rows of each patient seen in both institutions: at the reference, at the other."""
        first = np.flatnonzero(self.row_person[1:] == self.row_person[:-1])
        return np.column_stack([first, first + 1])

    @cached_property
    def note_patient(self) -> np.ndarray:
        """(n_notes,) row of each note in `patients`."""
        return self._rows[1]

    @cached_property
    def notes_per_patient(self) -> np.ndarray:
        """(n_rows,) number of notes."""
        return np.bincount(self.note_patient)

    @cached_property
    def note_weight(self) -> np.ndarray:
        """(n_notes,) one over the number of notes of its row: every patient weighs 1 at an institution."""
        return 1.0 / self.notes_per_patient[self.note_patient]

    @cached_property
    def is_target(self) -> np.ndarray:
        """(n_rows,) bool, True where the row is of the other institution."""
        return np.asarray(self._rows[0] % 2 == 1)

    @cached_property
    def n_patients(self) -> tuple[int, int]:
        """Patients of the reference and of the other institution."""
        return int((~self.is_target).sum()), int(self.is_target.sum())

    @cached_property
    def patient_stratum(self) -> np.ndarray:
        """(n_rows,) int."""
        found = np.zeros(len(self.patients), dtype=int)
        if self.strata is not None:
            found[self.note_patient] = np.unique(np.asarray(self.strata, dtype=str), return_inverse=True)[1]
        return found

    @cached_property
    def membership(self) -> np.ndarray:
        """(n_rows, 1 + n_permutations) bool, True where a row counts as of the other institution.

        Column 0 is what was observed; the others exchange labels within strata, and within patients who have two rows.
        """
        # Column by column in memory: a relabelling is shuffled as one piece.
        columns = np.empty((len(self.patients), self.n_permutations + 1), dtype=bool, order="F")
        columns[:, 0] = self.is_target
        generator = np.random.default_rng(self.seed)
        for rows in self._exchangeable:
            if len(rows) == len(columns):
                columns[:, 1:] = self.is_target[:, None]
                generator.permuted(columns[:, 1:], axis=0, out=columns[:, 1:])
            elif len(rows):
                tiled = np.repeat(self.is_target[rows][:, None], self.n_permutations, axis=1)
                columns[rows, 1:] = generator.permuted(tiled, axis=0)
        if len(self.twins):
            swapped = generator.random((len(self.twins), self.n_permutations)) < 0.5
            columns[self.twins[:, 0], 1:], columns[self.twins[:, 1], 1:] = swapped, ~swapped
        return columns

    @cached_property
    def _exchangeable(self) -> list[np.ndarray]:
        """Of each stratum the rows of patients seen in one institution."""
        alone = np.ones(len(self.patients), dtype=bool)
        alone[self.twins] = False
        strata = range(self.patient_stratum.max() + 1)
        return [np.flatnonzero(alone & (self.patient_stratum == stratum)) for stratum in strata]

    @cached_property
    def smallest_p(self) -> float:
        """The smallest p-value that these patients and this number of permutations can give.

        All tests here are blind to which side is called reference, so with equal sides every relabelling has a twin.
        """
        ways, mirrored = 2 ** len(self.twins), True
        for rows in self._exchangeable:
            inside = int(self.is_target[rows].sum())
            ways *= math.comb(len(rows), inside)
            mirrored &= 2 * inside == len(rows)
        return min(1.0, max(1 / (self.n_permutations + 1), (2 if mirrored else 1) / ways))

    def p_value(self, values: np.ndarray) -> float:
        """Return (1 + #{permuted >= observed}) / (permutations + 1) for one value a column of `membership`.

        References
        ----------
        Phipson and Smyth 2010, Permutation P-values Should Never Be Zero, SAGMB 9(1).
        """
        observed, permuted = float(values[0]), values[1:]
        if math.isnan(observed):
            return math.nan
        # Relabellings that amount to the observed one differ from it by rounding; they must count.
        finite = permuted[np.isfinite(permuted)]
        spread = float(finite.std()) if len(finite) else 0.0
        slack = 1e-9 * max(1e-12, spread, abs(observed) * 1e-3) if math.isfinite(observed) else 0.0
        return float((1 + np.count_nonzero(~(permuted < observed - slack))) / (len(permuted) + 1))


def _refuse_missing(labels: Sequence[str], what: str) -> None:
    missing = sum(label is None or label == "" or label != label for label in labels)
    if missing:
        raise InputError(f"{missing} of {len(labels)} notes have no {what}: fill the column, or leave these notes out")


def profile_strata(
    patient_ids: Sequence[str],
    institutions: Sequence[str],
    note_types: Sequence[str | None],
    notes_of_patient: np.ndarray,
    *,
    n_strata: int = 4,
) -> np.ndarray:
    """Group patients with like profiles: how many notes they have and of which types.

    A propensity of the institution given the profile is fitted and cut at its quantiles. Permuting within these
    strata asks whether notes differ beyond what the mix of notes explains. It is approximate: exact only if patients
    of one stratum are exchangeable. (Permuting notes within their types instead rejects identical institutions in
    28 to 78 % of cases, patients within their dominant type in 41 %.)

    Parameters
    ----------
    patient_ids, institutions, note_types : one entry a note, two institutions.
    notes_of_patient : (n_notes,) how many notes the note's patient has.
    n_strata : quantile groups.

    Returns
    -------
    (n_notes,) int, the same for all notes of a patient.

    References
    ----------
    Rosenbaum and Rubin 1983, The central role of the propensity score, Biometrika 70.
    """
    from sklearn.linear_model import LogisticRegression

    patients, rows = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    kinds, kind = np.unique([name or "" for name in note_types], return_inverse=True)
    shares = np.zeros((len(patients), len(kinds)))
    np.add.at(shares, (rows, kind), 1.0)
    count = np.zeros(len(patients))
    count[rows] = np.log(notes_of_patient)
    profile = np.column_stack([count, shares / shares.sum(axis=1, keepdims=True)])
    spread = profile.std(axis=0)
    profile = (profile - profile.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    side = np.zeros(len(patients), dtype=int)
    side[rows] = np.unique(np.asarray(institutions, dtype=str), return_inverse=True)[1]
    propensity = np.round(LogisticRegression(max_iter=1000).fit(profile, side).decision_function(profile), 9)
    cuts = np.unique(np.quantile(propensity, np.arange(1, n_strata) / n_strata))
    return np.searchsorted(cuts, propensity, side="left")[rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false finding among them stays below the level.

    NaN (a test that could not be made) stays NaN and still counts in the family.

    References
    ----------
    Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6.
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(values), math.nan)
    largest = 0.0
    order = np.argsort(values, kind="stable")
    for rank, index in enumerate(order):
        if not math.isnan(values[index]):
            largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
            adjusted[index] = largest
    return adjusted.tolist()
