"""Do two institutions' notes differ? Tests that permute whole patients and let every patient weigh the same.

How many notes a patient has is a difference of its own (`utilisation_test`). With very unequal numbers of notes the
tests over all notes are approximate; a plan over one random note a patient is exact, and a report gives both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.random_features import RandomFeatures, patient_blocks, unbiased_mmd2

_CELLS_AT_ONCE = 8_000_000
_FEWEST_FOR_T = 5
_SINGLE_PRECISION_FROM = 4000


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test of one comparison.

    `statistic` is what was permuted; `null_mean` and `null_sd` are over the permutations. `effect` says the same in
    a unit that means something (`effect_unit`), with an interval where a valid one exists; otherwise `low` and
    `high` are NaN and `note` says why. `n_units` counts what was permuted: patients.
    """

    __test__ = False  # not a pytest class

    name: str
    statistic: float
    p_value: float
    null_mean: float
    null_sd: float
    n_units: int
    n_notes: int
    n_permutations: int
    smallest_p: float
    effect: float
    effect_unit: str
    low: float = math.nan
    high: float = math.nan
    unit: str = "patient"
    note: str = ""


def as_result(
    name: str,
    plan: PermutationPlan,
    values: np.ndarray,
    *,
    effect: float,
    effect_unit: str,
    low: float = math.nan,
    high: float = math.nan,
    note: str = "",
) -> TestResult:
    """Return the result of a test from the statistic of every relabelling, the observed one first."""
    permuted = values[1:][np.isfinite(values[1:])]
    return TestResult(
        name=name,
        statistic=float(values[0]),
        p_value=plan.p_value(values),
        null_mean=float(permuted.mean()) if len(permuted) else math.nan,
        null_sd=float(permuted.std(ddof=1)) if len(permuted) > 1 else math.nan,
        n_units=plan.n_people,
        n_notes=len(plan.note_patient),
        n_permutations=plan.n_permutations,
        smallest_p=plan.smallest_p,
        effect=effect,
        effect_unit=effect_unit,
        low=low,
        high=high,
        note=note,
    )


def checked_features(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Return (n_notes, d) float64 features, or say what is wrong with them."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(plan.note_patient):
        raise UsageError(f"features have shape {features.shape}; they need one row for each of the plan's notes")
    if not np.isfinite(features).all():
        raise UsageError("features hold values that are not finite")
    return features


def patient_means(values: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Average notes (n_notes, k) within the rows of the plan: (n_rows, k)."""
    return np.asarray(_averaging(plan) @ values)


def _averaging(plan: PermutationPlan) -> Any:
    """(n_rows, n_notes) sparse; multiplied with values of the notes it averages them within patients."""
    from scipy import sparse

    shape = (len(plan.patients), len(plan.note_patient))
    return sparse.csr_array((plan.note_weight, (plan.note_patient, np.arange(shape[1]))), shape=shape)


# Domain classifier ---------------------------------------------------------------------------------------------------


def domain_classifier_test(
    features: np.ndarray, plan: PermutationPlan, *, cells: Sequence[object] | None = None, n_folds: int = 5
) -> TestResult:
    """How well a note of an unseen patient gives its institution away.

    A ridge discriminant is fitted on the patients of the other folds (each patient weighs 1; features standardised
    inside the fold; penalty equal to the number of features, as for a unit prior) and scores the patients of this
    one. The statistic is the area under the ROC curve over pairs of patients of one fold, 0.5 at chance. Folds are
    drawn without looking at institutions, so that every relabelling goes through exactly the same procedure; one
    factorisation a fold serves all relabellings.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions.
    plan : the relabellings.
    cells : one label a note, such as note type and year: the mean of each cell is taken out of the features, only
        notes of one cell are compared, and the cells' areas are summed with their shares of patients as fixed
        weights. Goes with a plan over `profile_strata`.
    n_folds : folds of patients.

    Returns
    -------
    TestResult; `effect` is the AUC, with an interval on the arcsine scale from DeLong's variance over patients, not
    narrower than the spread over relabellings.

    References
    ----------
    Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv 1610.06545.
    DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44.
    """
    from scipy.linalg import cho_factor, cho_solve

    features = checked_features(features, plan)
    n_folds = max(2, min(n_folds, plan.n_people // 2))
    fold_of = (np.random.default_rng([plan.seed, 1]).permutation(plan.n_people) % n_folds)[plan.row_person]
    groups, note = _groups(cells, plan)
    if cells is not None:
        features = features.copy()
        for notes, _, _ in groups:
            features[notes] -= np.average(features[notes], axis=0, weights=plan.note_weight[notes])
    members = plan.membership
    won, pairs = np.zeros((len(groups), members.shape[1])), np.zeros((len(groups), members.shape[1]))
    placement = np.full(len(plan.patients), math.nan)
    for fold in range(n_folds):
        inside = fold_of == fold
        train = np.flatnonzero(~inside[plan.note_patient])
        weight = plan.note_weight[train]
        centre = np.average(features[train], axis=0, weights=weight)
        scale = np.sqrt(np.average((features[train] - centre) ** 2, axis=0, weights=weight))
        # A feature that is constant but for rounding must not be blown up to unit variance.
        varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
        scale = np.where(varies, scale, 1.0)
        known = np.where(varies, (features[train] - centre) / scale, 0.0)
        gram = cho_factor(known.T @ (known * weight[:, None]) + features.shape[1] * np.eye(features.shape[1]))
        means = np.zeros((len(plan.patients), features.shape[1]))
        np.add.at(means, plan.note_patient[train], known * weight[:, None])
        tested = []
        for number, (notes, rows, _) in enumerate(groups):
            test = notes[inside[plan.note_patient[notes]]]
            new = np.where(varies, (features[test] - centre) / scale, 0.0)
            local = np.bincount(plan.note_patient[test], minlength=len(inside))
            tested.append((number, test, new, rows[inside[rows]], 1.0 / local[plan.note_patient[test]]))
        at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * max(len(test) for _, test, *_ in tested)))
        for start in range(0, members.shape[1], at_once):
            columns = slice(start, start + at_once)
            labels = members[:, columns].astype(np.float64)
            trained = labels[~inside] - labels[~inside].mean(axis=0)
            directions = cho_solve(gram, means[~inside].T @ trained)
            for number, test, new, rows, note_weight in tested:
                # Identical notes must tie, whatever order the arithmetic took.
                scores = np.round(new @ directions, 9)
                beaten, share = _placements(scores, labels[plan.note_patient[test]], note_weight)
                target = labels[rows].sum(axis=0)
                won[number, columns] += beaten
                pairs[number, columns] += target * (len(rows) - target)
                if start == 0 and cells is None:
                    placement[rows] = np.bincount(
                        plan.note_patient[test], weights=share * note_weight, minlength=len(inside)
                    )[rows]
    areas = np.divide(won, pairs, out=np.full(won.shape, 0.5), where=pairs > 0)
    auc = np.array([weight for *_, weight in groups]) @ areas
    low, high = math.nan, math.nan
    if cells is None:
        low, high, note = _auc_interval(auc, placement, plan)
    return as_result(
        "domain_classifier",
        plan,
        auc,
        effect=float(auc[0]),
        effect_unit="AUC over pairs of patients",
        low=low,
        high=high,
        note=note,
    )


def mlp_classifier_test(
    features: np.ndarray, plan: PermutationPlan, *, hidden: int = 32, steps: int = 400
) -> TestResult:
    """Second opinion: does a small neural network tell the institutions apart where the linear discriminant does not?

    A random half of the patients of each institution trains one network (one hidden layer; every step draws patients
    of both institutions alike and one note of each). It scores the other half once; their labels are permuted. The
    statistic is the area under the ROC curve over pairs of held-out patients.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions.
    plan : the patients, their strata, and how many relabellings of the held-out ones.
    hidden : units of the hidden layer.
    steps : of the optimiser, 128 notes each.

    Returns
    -------
    TestResult over the held-out patients; `effect` is the AUC, with DeLong's interval over patients.

    Raises
    ------
    TooFewPatientsError : fewer than four patients in an institution.

    References
    ----------
    Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv 1610.06545.
    """
    features = checked_features(features, plan)
    if min(plan.n_patients) < 4:
        raise TooFewPatientsError(
            f"the neural network test needs at least 4 patients in each institution (got {plan.n_patients[0]} and "
            f"{plan.n_patients[1]}): half of them train it"
        )
    generator = np.random.default_rng([plan.seed, 3])
    # Reference only, other only, both: half of each kind trains.
    kind = np.bincount(plan.row_person, weights=1 + plan.is_target).astype(int)
    trains = np.zeros(plan.n_people, dtype=bool)
    for number in (1, 2, 3):
        people = generator.permutation(np.flatnonzero(kind == number))
        trains[people[: len(people) // 2]] = True
    known = trains[plan.row_person]
    new = np.flatnonzero(~known[plan.note_patient])
    scores = _network_scores(features, plan, known, new, hidden=hidden, steps=steps)
    ids, sides = np.asarray(plan.patient_ids, dtype=str)[new], np.asarray(plan.institutions, dtype=str)[new]
    held_out = PermutationPlan(
        ids.tolist(),
        sides.tolist(),
        reference=plan.names[0],
        strata=None if plan.strata is None else np.asarray(plan.strata, dtype=str)[new].tolist(),
        n_permutations=plan.n_permutations,
        seed=plan.seed,
        paired=plan.paired,
    )
    labels = held_out.membership.astype(np.float64)
    auc = np.empty(labels.shape[1])
    placement: np.ndarray = np.empty(0)
    at_once = max(1, _CELLS_AT_ONCE // (4 * len(new)))
    for start in range(0, len(auc), at_once):
        columns = slice(start, start + at_once)
        here = labels[held_out.note_patient, columns]
        won, share = _placements(np.repeat(scores[:, None], here.shape[1], axis=1), here, held_out.note_weight)
        auc[columns] = won / np.prod(held_out.n_patients)
        if start == 0:
            placement = np.bincount(held_out.note_patient, weights=share * held_out.note_weight)
    low, high, note = _auc_interval(auc, placement, held_out)
    trained = f"trained on {int(trains.sum())} other patients"
    return as_result(
        "mlp_classifier",
        held_out,
        auc,
        effect=float(auc[0]),
        effect_unit="AUC over pairs of patients",
        low=low,
        high=high,
        note=f"{trained}; {note}" if note else trained,
    )


def _network_scores(
    features: np.ndarray, plan: PermutationPlan, known: np.ndarray, new: np.ndarray, *, hidden: int, steps: int
) -> np.ndarray:
    """Train on the rows that are known; return the logits of the new notes."""
    import torch

    notes = np.flatnonzero(known[plan.note_patient])
    centre = np.average(features[notes], axis=0, weights=plan.note_weight[notes])
    scale = np.sqrt(np.average((features[notes] - centre) ** 2, axis=0, weights=plan.note_weight[notes]))
    varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
    scaled = np.where(varies, (features - centre) / np.where(varies, scale, 1.0), 0.0).astype(np.float32)
    generator = np.random.default_rng([plan.seed, 4])
    order = np.argsort(plan.note_patient, kind="stable")
    starts = np.concatenate([[0], np.cumsum(plan.notes_per_patient)])
    sides = [np.flatnonzero(known & (plan.is_target == side)) for side in (False, True)]
    target = torch.tensor([0.0] * 64 + [1.0] * 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(features.shape[1], hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(hidden, 1),
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(steps):
            rows = np.concatenate([generator.choice(side, 64) for side in sides])
            drawn = order[starts[rows] + generator.integers(0, plan.notes_per_patient[rows])]
            logits = network(torch.from_numpy(scaled[drawn]))[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        network.eval()
        with torch.no_grad():
            scores = torch.cat([network(part)[:, 0] for part in torch.from_numpy(scaled[new]).split(4096)])
    return np.round(scores.numpy().astype(np.float64), 5)


def _placements(scores: np.ndarray, is_target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted Mann-Whitney sum per column, and for column 0 each note's share of the other side that it beats.

    Parameters
    ----------
    scores, is_target : (n, columns). weight : (n,).
    """
    order = np.argsort(scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    target = np.take_along_axis(is_target, order, axis=0)
    mass = weight[order]
    other = np.cumsum(mass * (1 - target), axis=0)
    positions = np.arange(len(scores))[:, None]
    begins = np.vstack([np.ones((1, scores.shape[1]), dtype=bool), ranked[1:] != ranked[:-1]])
    ends = np.vstack([begins[1:], np.ones((1, scores.shape[1]), dtype=bool)])
    first = np.maximum.accumulate(np.where(begins, positions, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, positions, len(scores))[::-1], axis=0)[::-1]

    def below(cumulative: np.ndarray) -> np.ndarray:
        padded = np.vstack([np.zeros((1, cumulative.shape[1])), cumulative])
        return (np.take_along_axis(padded, first, axis=0) + np.take_along_axis(padded, last + 1, axis=0)) / 2

    beaten = below(other)
    won = (mass * target * beaten).sum(axis=0)

    own = np.cumsum(mass[:, :1] * target[:, :1], axis=0)
    first, last = first[:, :1], last[:, :1]
    n_target, n_other = own[-1, 0], other[-1, 0]
    share = np.full(len(scores), math.nan)
    if n_target > 0 and n_other > 0:
        share[order[:, 0]] = np.where(target[:, 0] == 1, beaten[:, 0] / n_other, 1 - below(own)[:, 0] / n_target)
    return won, share


def _auc_interval(aucs: np.ndarray, placement: np.ndarray, plan: PermutationPlan) -> tuple[float, float, str]:
    if min(plan.n_patients) < FEWEST_PATIENTS:
        return math.nan, math.nan, f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
    # On the arcsine scale the spread hardly depends on the AUC, so that the interval holds up to 1.
    auc = min(max(float(aucs[0]), 0.0), 1.0)
    pulls = np.zeros(len(placement))
    for side in (plan.is_target, ~plan.is_target):
        scored_rows = side & np.isfinite(placement)
        n = int(scored_rows.sum())
        centred = placement[scored_rows] - placement[scored_rows].mean()
        pulls[scored_rows] = centred / math.sqrt(n * (n - 1))
    # The two sides of one patient pull together.
    scored = math.sqrt(float((np.bincount(plan.row_person, weights=pulls) ** 2).sum()))
    slope = 2 * math.sqrt(auc * (1 - auc))
    # DeLong leaves out that other patients would have trained another discriminant; relabelling shows how much.
    reach = 1.959964 * max(scored / slope if slope > 1e-6 else 0.0, float(aucs[1:].std(ddof=1)))
    angle = math.asin(math.sqrt(auc))
    return math.sin(max(angle - reach, 0.0)) ** 2, math.sin(min(angle + reach, math.pi / 2)) ** 2, ""


# Maximum mean discrepancy ---------------------------------------------------------------------------------------------


EXACT_UP_TO = 20_000
"""Notes up to which `mmd_test` computes the kernel itself; beyond, random features stand for it."""


def mmd_test(
    features: np.ndarray,
    plan: PermutationPlan,
    *,
    cells: Sequence[object] | None = None,
    exact_up_to: int = EXACT_UP_TO,
    n_random_features: int = 1024,
) -> TestResult:
    """Unbiased squared maximum mean discrepancy, every patient weighing 1, pairs of one patient left out.

    The kernel is the mean of three Gaussians at half, once and twice the median distance between notes of different
    patients, pooled over institutions. It is averaged over the notes of every pair of patients once; each
    relabelling is then a product with a (patients x patients) matrix. Beyond `exact_up_to` notes the kernel is that
    of `RandomFeatures`: features are read once, block by block, and only sums over patients are kept. The test is
    exact all the same, since one kernel serves all relabellings.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions; float32 and memory-mapped arrays stay as they are
        beyond `exact_up_to` notes.
    plan : the relabellings.
    cells : one label a note, such as note type and year: the statistic is computed within each cell and summed with
        the cells' shares of patients as fixed weights. Goes with a plan over `profile_strata`.
    exact_up_to : notes.
    n_random_features : beyond that.

    Returns
    -------
    TestResult; `effect` is the statistic's excess over the null in null standard deviations. It may be negative and
    is not clipped. The interval is normal with the variance of the statistic's projection on patients, not narrower
    than the spread over relabellings; a percentile interval of resampled patients would twin them with themselves
    and exclude zero under no difference. Simulated coverage of the population's value with 20 / 50 / 150 patients an
    institution (300 runs): no shift 100 / 100 / 100 %, 0.5 standard deviations 95 / 96 / 96 %, 2 standard deviations
    94 / 94 / 93 %.

    References
    ----------
    Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.
    Hoeffding 1948, A Class of Statistics with Asymptotically Normal Distribution (the projection).
    """
    exact = len(features) <= exact_up_to
    if exact or features.ndim != 2 or len(features) != len(plan.note_patient):
        features = checked_features(features, plan)
    groups, why = _groups(cells, plan)
    values, error = np.zeros(plan.n_permutations + 1), math.nan
    for notes, rows, weight in groups:
        here = features if cells is None else features[notes]
        local = np.searchsorted(rows, plan.note_patient[notes])
        labels = plan.membership if cells is None else plan.membership[rows]
        twins = plan.twins[np.isin(plan.twins, rows).all(axis=1)]
        twins = np.searchsorted(rows, twins)
        width = median_distance(here, plan.row_person[rows][local], seed=plan.seed)
        if exact:
            kernel = _kernel_of_rows(here, local, width)
            kernel[twins[:, 0], twins[:, 1]] = kernel[twins[:, 1], twins[:, 0]] = 0.0
            values += weight * _mmd2(kernel, labels, len(twins))
            if cells is None:
                error = _projection_error(kernel, plan)
        else:
            random = RandomFeatures(here.shape[1], width, n_random_features, plan.seed)
            values += weight * _random_mmd2(random, here, local, labels, twins)
    if cells is None and min(plan.n_patients) < FEWEST_PATIENTS:
        why = f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
    elif cells is None and not exact:
        why = f"{n_random_features} random features stand for the kernel; no interval from sums"
    result = as_result("mmd", plan, values, effect=math.nan, effect_unit="standard deviations of the null", note=why)
    if not result.null_sd > 1e-12:
        return replace(result, note="no effect: all notes are alike to the kernel")
    effect = (result.statistic - result.null_mean) / result.null_sd
    if why:
        return replace(result, effect=effect)
    reach = 1.959964 * max(error / result.null_sd, 1.0)
    return replace(result, effect=effect, low=effect - reach, high=effect + reach)


def median_distance(features: np.ndarray, people: np.ndarray, *, seed: int = 0, at_most: int = 1000) -> float:
    """Median distance between notes of different patients, from one note each of at most `at_most` patients.

    Parameters
    ----------
    features : (n_notes, d).
    people : (n_notes,) int, the patient of each note.
    seed : of the choice of patients.
    """
    _, first = np.unique(people, return_index=True)
    if len(first) > at_most:
        first = np.sort(np.random.default_rng([seed, 2]).choice(first, at_most, replace=False))
    chosen = np.asarray(features[first], dtype=np.float64)
    if not np.isfinite(chosen).all():
        raise UsageError("features hold values that are not finite")
    chosen = chosen - chosen.mean(axis=0)
    distances = np.sqrt(_squared_distances(chosen, chosen)[np.triu_indices(len(first), 1)])
    positive = distances[distances > 1e-7 * max(1.0, float(distances.max(initial=0.0)))]
    return float(np.median(positive)) if len(positive) else 1.0


def patient_kernel(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """(n_rows, n_rows) mean kernel over the notes of two rows, shifted by a constant, diagonal zero.

    The unbiased statistic does not change when a constant is subtracted from every pair; subtracting about the mean
    before summing keeps the sums small and the rounding error with them.
    """
    people = plan.row_person[plan.note_patient]
    return _kernel_of_rows(features, plan.note_patient, median_distance(features, people, seed=plan.seed))


def _kernel_of_rows(features: np.ndarray, note_row: np.ndarray, width: float) -> np.ndarray:
    order = np.argsort(note_row, kind="stable")
    features = features[order] - features.mean(axis=0)
    counts = np.bincount(note_row)
    starts = np.concatenate([[0], np.cumsum(counts)])
    sample = features[np.linspace(0, len(features) - 1, min(len(features), 300)).astype(int)]
    constant = float(_gaussians(_squared_distances(sample, sample), width).mean())
    if len(features) > _SINGLE_PRECISION_FROM:
        # Centred, single precision leaves 0.04 % of the null's spread as error, at half the time and memory.
        features = features.astype(np.float32)
    kernel = np.zeros((len(counts), len(counts)), dtype=features.dtype)
    row = 0
    while row < len(counts):
        notes = max(1, _CELLS_AT_ONCE // max(1, len(features) - starts[row]))
        stop = max(row + 1, int(np.searchsorted(starts, starts[row] + notes, side="right")) - 1)
        rows = slice(starts[row], starts[stop])
        block = _gaussians(_squared_distances(features[rows], features[starts[row] :]), width)
        block -= block.dtype.type(constant)
        if len(counts) < len(features):
            block = np.add.reduceat(block, starts[row:-1] - starts[row], axis=1)
            block = np.add.reduceat(block, starts[row:stop] - starts[row], axis=0)
            block /= np.outer(counts[row:stop], counts[row:]).astype(block.dtype)
        kernel[row:stop, row:] = block
        kernel[row:, row:stop] = block.T
        row = stop
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squared = left @ right.T
    squared *= -2
    squared += (left**2).sum(axis=1)[:, None]
    squared += (right**2).sum(axis=1)[None, :]
    return np.maximum(squared, 0, out=squared)


def _gaussians(squared: np.ndarray, width: float) -> np.ndarray:
    # exp(-d / (2 (s w)^2)) for s = 1/2, 1, 2: each is a power of the widest, so one exponential serves all three.
    widest = np.exp(squared * squared.dtype.type(-0.125 / width**2))
    middle = np.square(np.square(widest))
    widest += middle
    widest += np.square(np.square(middle, out=middle), out=middle)
    widest /= 3
    return widest


def _mmd2(kernel: np.ndarray, membership: np.ndarray, n_pairs: int) -> np.ndarray:
    """The statistic for every relabelling; `n_pairs` patients have a row on both sides, and 0 in the kernel for it."""
    values = np.empty(membership.shape[1])
    row_sums = kernel.sum(axis=0, dtype=np.float64)
    total = row_sums.sum()
    at_once = max(1, _CELLS_AT_ONCE // len(kernel))
    for start in range(0, len(values), at_once):
        target = membership[:, start : start + at_once].astype(kernel.dtype)
        n_target = target.sum(axis=0, dtype=np.float64)
        n_reference = len(kernel) - n_target
        within = (target * (kernel @ target)).sum(axis=0, dtype=np.float64)
        touching = row_sums @ target
        between = touching - within
        outside = total - 2 * touching + within
        values[start : start + at_once] = (
            within / (n_target * (n_target - 1))
            + outside / (n_reference * (n_reference - 1))
            - 2 * between / (n_target * n_reference - n_pairs)
        )
    return values


def _projection_error(kernel: np.ndarray, plan: PermutationPlan) -> float:
    """Standard error of the statistic to first order, from what each patient contributes to it."""
    pulls = np.zeros(len(kernel))
    paired = np.isin(np.arange(len(kernel)), plan.twins)
    for side in (plan.is_target, ~plan.is_target):
        own = kernel[np.ix_(side, side)].sum(axis=1, dtype=np.float64) / (side.sum() - 1)
        other = kernel[np.ix_(side, ~side)].sum(axis=1, dtype=np.float64) / ((~side).sum() - paired[side])
        pull = own - other
        pulls[side] = 2 * (pull - pull.mean()) / math.sqrt(side.sum() * (side.sum() - 1))
    return math.sqrt(float((np.bincount(plan.row_person, weights=pulls) ** 2).sum()))


def _random_mmd2(
    random: RandomFeatures, features: np.ndarray, note_row: np.ndarray, membership: np.ndarray, twins: np.ndarray
) -> np.ndarray:
    """`_mmd2` for the kernel of random features, in one pass over the notes."""
    n_columns = membership.shape[1]
    target = np.zeros((n_columns, random.n_features))
    target_squares = np.zeros(n_columns)
    total, total_square, of_pairs = np.zeros(random.n_features), 0.0, 0.0
    second = np.zeros(len(membership), dtype=bool)
    second[twins[:, 1]] = True
    centre: np.ndarray | None = None
    last = np.zeros((1, random.n_features), dtype=np.float32)
    for rows, means in patient_blocks(random, features, note_row):
        if len(twins):
            # Centring would not cancel where only some patients are on both sides: more digits instead.
            means = means.astype(np.float64)
        else:
            centre = means.mean(axis=0) if centre is None else centre
            means = means - centre
        squares = np.einsum("pd,pd->p", means, means, dtype=np.float64)
        labels = membership[rows].astype(means.dtype)
        target += labels.T @ means
        target_squares += squares @ labels
        total += means.sum(axis=0, dtype=np.float64)
        total_square += float(squares.sum())
        before = np.concatenate([last, means[:-1]])[second[rows]]
        of_pairs += float(np.einsum("pd,pd->", before, means[second[rows]]))
        last = means[-1:]
    n_target = membership.sum(axis=0).astype(np.float64)
    n_reference = len(membership) - n_target
    # Patients on both sides: their own pair is left out of the products between the sides.
    within = unbiased_mmd2(
        (target, total - target), (target_squares, total_square - target_squares), (n_target, n_reference)
    )
    if not len(twins):
        return within
    between = np.einsum("bd,bd->b", target, total - target)
    all_pairs = n_target * n_reference
    return within + 2 * between / all_pairs - 2 * (between - of_pairs) / (all_pairs - len(twins))


# Length and utilisation -----------------------------------------------------------------------------------------------


def ratio_test(
    name: str, values: np.ndarray, plan: PermutationPlan, *, effect_unit: str, cells: Sequence[object] | None = None
) -> TestResult:
    """Ratio of the geometric means of a positive quantity, one value a patient, two-sided.

    The permuted statistic is Welch's |t| of the patients' mean logarithms: studentised, it keeps its level when the
    spread of patients differs between the institutions, as it does when one writes more notes a patient.

    Parameters
    ----------
    name : of the result.
    values : (n_notes,) positive; averaged on the logarithmic scale within each patient.
    plan : the relabellings.
    effect_unit : words for the effect, e.g. "times as many words a note".
    cells : see `max_t_test`.

    Returns
    -------
    TestResult; `effect` is other / reference, with Welch's interval.

    References
    ----------
    Chung and Romano 2013, Exact and asymptotically robust permutation tests, Annals of Statistics 41.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if values.shape != plan.note_patient.shape or not (values > 0).all():
        raise UsageError(f"{name}: values must be positive, one for each of the plan's notes")
    if cells is not None:
        measure = max_t_test(np.log(values)[:, None], [name], plan, cells=cells, name=name)
        return replace(
            measure.test,
            effect=math.exp(measure.measures[0].difference),
            effect_unit=effect_unit,
            note=measure.measures[0].note,
        )
    logs = patient_means(np.log(values)[:, None], plan)
    difference, error, freedom = (found[0] for found in studentised(logs, plan))
    low = high = math.nan
    note = ""
    if error[0] == 0:
        note = "no interval: the patients of each institution are all alike"
    elif min(plan.n_patients) < _FEWEST_FOR_T:
        note = f"no interval: fewer than {_FEWEST_FOR_T} patients in an institution"
    if not note:
        reach = stats.t.ppf(0.975, freedom[0]) * error[0]
        low, high = math.exp(difference[0] - reach), math.exp(difference[0] + reach)
    statistic = _absolute_t(difference, error)
    return as_result(
        name, plan, statistic, effect=math.exp(difference[0]), effect_unit=effect_unit, low=low, high=high, note=note
    )


def studentised(values: np.ndarray, plan: PermutationPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of patients' means, its standard error, and Welch's degrees of freedom, for every relabelling.

    Parameters
    ----------
    values : (n_rows, k), NaN where a quantity was not measured.

    Returns
    -------
    Three (k, 1 + n_permutations) arrays. A patient seen in both institutions makes the two means covary, and the
    error allows for it. NaN where a side has fewer than two patients.
    """
    labels = plan.membership.astype(np.float64)
    there = np.isfinite(values)
    everywhere = np.maximum(there.sum(axis=0), 1)
    values = np.where(there, values, 0.0)
    values = np.where(there, values - values.sum(axis=0) / everywhere, 0.0)
    # What differs by rounding only is the same.
    values = np.where(np.abs(values) > 1e-12 * np.maximum(1.0, np.abs(values).max(axis=0, initial=0.0)), values, 0.0)
    n, sums, squares = (both_sides(part, labels) for part in (there.astype(np.float64), values, values**2))
    with np.errstate(all="ignore"):
        means = sums / n
        variance = np.maximum(squares - sums * means, 0) / (n - 1) / n
        freedom = variance.sum(axis=0) ** 2 / (variance**2 / (n - 1)).sum(axis=0)
        total = variance.sum(axis=0)
        if len(plan.twins):
            paired = np.zeros_like(there)
            paired[plan.twins] = (there[plan.twins[:, 0]] & there[plan.twins[:, 1]])[:, None]
            first, second = values[plan.twins[:, 0]], values[plan.twins[:, 1]]
            products = (first * second * paired[plan.twins[:, 0]]).sum(axis=0)[:, None]
            of_pairs = both_sides(np.where(paired, values, 0.0), labels)
            n_pairs = paired[plan.twins[:, 0]].sum(axis=0)[:, None]
            covariance = products - means[0] * of_pairs[1] - means[1] * of_pairs[0] + n_pairs * means[0] * means[1]
            total = total - 2 * covariance / np.sqrt((n * (n - 1)).prod(axis=0))
            freedom = np.where(n_pairs > 0, n.min(axis=0) - 1, freedom)
        # Rounding leaves crumbs where everything cancels.
        total = np.where(total > 1e-24 * np.maximum(1.0, (squares / n).max(axis=0)), total, 0.0)
        usable = n.min(axis=0) >= 2
        found = (means[1] - means[0], np.sqrt(total), freedom)
        return tuple(np.where(usable, part, math.nan) for part in found)  # type: ignore[return-value]


def both_sides(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the sums of (n_rows, k) values over the rows of the reference and of the other side: (2, k, columns)."""
    target = values.T @ labels
    return np.stack([values.sum(axis=0)[:, None] - target, target])


def _absolute_t(difference: np.ndarray, error: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        whole = np.where(np.abs(difference) > 1e-12, np.inf, 0.0)
        return np.where(np.isnan(error), math.nan, np.where(error > 0, np.abs(difference) / error, whole))


def length_test(words: np.ndarray, plan: PermutationPlan, *, cells: Sequence[object] | None = None) -> TestResult:
    """Are the notes longer? `words` (n_notes,) counts words a note, at least 1; see `ratio_test`."""
    return ratio_test("length", words, plan, effect_unit="times as many words a note", cells=cells)


def utilisation_test(notes_per_patient: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Do patients have more notes? `notes_per_patient` (n_notes,) repeats each patient's count; see `ratio_test`."""
    return ratio_test("utilisation", notes_per_patient, plan, effect_unit="times as many notes a patient")


# Many quantities at once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeasureShift:
    """How one quantity of the notes differs: the average patient's average note at the reference and at the other.

    `low` and `high` bound the difference at 95 % (Welch), each quantity by itself; NaN with the reason in `note`.
    `p_value` is of this quantity alone, `adjusted_p` holds for all quantities of the test together. `n_patients`
    have it measured.
    """

    name: str
    reference: float
    other: float
    difference: float
    low: float
    high: float
    statistic: float
    p_value: float
    adjusted_p: float
    n_patients: tuple[int, int]
    n_notes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class ManyMeasures:
    """The test that anything differs, and each quantity in the order given."""

    test: TestResult
    measures: tuple[MeasureShift, ...]


def max_t_test(
    values: np.ndarray,
    names: Sequence[str],
    plan: PermutationPlan,
    *,
    cells: Sequence[object] | None = None,
    name: str = "max_t",
) -> ManyMeasures:
    """Which of many quantities of the notes differ? The largest studentised difference against relabelled patients.

    Each quantity is averaged within patients; its statistic is |t| of the difference of the patients' means (Welch;
    studentised, so that no quantity rules the maximum by its scale or by the spread of one side). Adjusted p-values
    come from successive maxima over the same relabellings: the chance of naming any quantity that does not differ
    stays below the level, however the quantities depend on each other.

    Parameters
    ----------
    values : (n_notes, k); NaN where a quantity was not measured on a note, which is then left out of its average.
    names : of the k quantities.
    plan : the relabellings.
    cells : one label a note, such as note type and year: differences are taken within each cell and summed with the
        cell's share of patients as fixed weight. Goes with a plan over `profile_strata`. Differences are divided by
        their standard deviation over relabellings then, and have no interval.
    name : of the test.

    Returns
    -------
    ManyMeasures; the test's effect is the largest |t|.

    References
    ----------
    Westfall and Young 1993, Resampling-Based Multiple Testing, Wiley, algorithm 2.8 (step-down maxT).
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(plan.note_patient), len(names)) or not len(names):
        raise UsageError(
            f"{name}: values have shape {values.shape}; {len(plan.note_patient)} notes, {len(names)} names"
        )
    if np.isinf(values).any():
        raise UsageError(f"{name}: values hold infinities")
    measured = np.isfinite(values)
    patients = _measured_means(values, measured, plan.note_patient, len(plan.patients))
    difference, error, freedom = studentised(patients, plan)
    if cells is None:
        statistic, why = _absolute_t(difference, error), ""
    else:
        groups, why = _groups(cells, plan)
        difference = _within_groups(values, measured, groups, plan)
        spread = np.nanstd(difference, axis=1, keepdims=True)
        statistic = _absolute_t(difference - np.nanmean(difference, axis=1, keepdims=True), spread)
    adjusted = _step_down(statistic, plan)
    shifts = []
    for row, quantity in enumerate(names):
        has = np.isfinite(patients[:, row])
        sides = [has & (plan.is_target == side) for side in (False, True)]
        counts = (int(sides[0].sum()), int(sides[1].sum()))
        means = [float(patients[side, row].mean()) if side.any() else math.nan for side in sides]
        low = high = math.nan
        note = why
        if not note and min(counts) < FEWEST_PATIENTS:
            note = f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
        elif not note and error[row, 0] == 0:
            note = "no interval: the patients of each institution are all alike"
        elif not note:
            reach = float(stats.t.ppf(0.975, freedom[row, 0]) * error[row, 0])
            low, high = float(difference[row, 0]) - reach, float(difference[row, 0]) + reach
        shifts.append(
            MeasureShift(
                name=quantity,
                reference=means[0],
                other=means[1],
                difference=float(difference[row, 0]),
                low=low,
                high=high,
                statistic=float(statistic[row, 0]),
                p_value=plan.p_value(statistic[row]),
                adjusted_p=float(adjusted[row]),
                n_patients=counts,
                n_notes=int(measured[:, row].sum()),
                note=note if min(counts) >= 2 else "measured on fewer than 2 patients of an institution",
            )
        )
    largest = np.fmax.reduce(statistic, axis=0)
    test = as_result(
        name, plan, largest, effect=float(largest[0]), effect_unit="largest |t|", note="a maximum has no valid interval"
    )
    return ManyMeasures(test, tuple(shifts))


def _measured_means(values: np.ndarray, measured: np.ndarray, rows: np.ndarray, n_rows: int) -> np.ndarray:
    from scipy import sparse

    summing = sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(n_rows, len(rows)))
    count = summing @ measured.astype(np.float64)
    total = summing @ np.where(measured, values, 0.0)
    return np.divide(total, count, out=np.full(total.shape, math.nan), where=count > 0)


def _step_down(statistic: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Adjusted p of each row of statistics (k, columns); NaN where the observed one is NaN."""
    adjusted = np.full(len(statistic), math.nan)
    order = [row for row in np.argsort(-statistic[:, 0], kind="stable") if not math.isnan(statistic[row, 0])]
    successive = np.full(statistic.shape[1], -np.inf)
    raw = []
    for row in reversed(order):
        successive = np.fmax(successive, statistic[row])
        raw.append(plan.p_value(np.concatenate([statistic[row, :1], successive[1:]])))
    adjusted[order] = np.maximum.accumulate(raw[::-1]) if raw else []
    return adjusted


_Groups = list[tuple[np.ndarray, np.ndarray, float]]


def _within_groups(values: np.ndarray, measured: np.ndarray, groups: _Groups, plan: PermutationPlan) -> np.ndarray:
    """Differences within each group of notes summed with the groups' weights, (k, columns)."""
    total = np.zeros((values.shape[1], plan.n_permutations + 1))
    weights = np.zeros((values.shape[1], 1))
    for notes, rows, weight in groups:
        local = np.searchsorted(rows, plan.note_patient[notes])
        patients = _measured_means(values[notes], measured[notes], local, len(rows))
        there = np.isfinite(patients)
        labels = plan.membership[rows].astype(np.float64)
        n = both_sides(there.astype(np.float64), labels)
        sums = both_sides(np.where(there, patients, 0.0), labels)
        usable = n.min(axis=(0, 2)) >= 1
        with np.errstate(all="ignore"):
            means = sums / n
        total[usable] += weight * (means[1] - means[0])[usable]
        weights[usable] += weight
    with np.errstate(all="ignore"):
        return np.where(weights > 0, total / weights, math.nan)


def _groups(cells: Sequence[object] | None, plan: PermutationPlan) -> tuple[_Groups, str]:
    """The notes that are compared with each other, their rows and weight; and what the result has to say of it.

    Cells count where every relabelling has two patients on each side at least. So the choice, and the weights, which
    are the cells' shares of patients, are the same for all of them.
    """
    if cells is None:
        return [(np.arange(len(plan.note_patient)), np.arange(len(plan.patients)), 1.0)], ""
    if len(cells) != len(plan.note_patient):
        raise UsageError(f"{len(cells)} cells for {len(plan.note_patient)} notes")
    _, cell = np.unique(np.asarray(cells, dtype=str), return_inverse=True)
    found, left_out = [], 0
    for number in range(int(cell.max(initial=-1)) + 1):
        notes = np.flatnonzero(cell == number)
        rows = np.unique(plan.note_patient[notes])
        n_target = plan.membership[rows].sum(axis=0)
        if min(int(n_target.min()), len(rows) - int(n_target.max())) >= 2:
            found.append((notes, rows))
        else:
            left_out += len(notes)
    if not found:
        raise TooFewPatientsError("no cell (note type and year) has at least 2 patients on both sides; use wider cells")
    total = sum(len(rows) for _, rows in found)
    note = "no interval: approximate, since it conditions on the note's type"
    if left_out:
        note += f"; {left_out} notes of cells with too few patients are left out"
    return [(notes, rows, len(rows) / total) for notes, rows in found], note


def output_shift_test(scores: np.ndarray, names: Sequence[str], plan: PermutationPlan) -> ManyMeasures:
    """Do a model's outputs differ? Location and spread of every output over the notes; see `max_t_test`.

    A black-box test: it needs what a model says, not the model. It sees what matters to this model only; a change
    that leaves every output's distribution alone passes.

    Parameters
    ----------
    scores : (n_notes, k) probabilities, logits or counts.
    names : of the k outputs.
    plan : the relabellings.

    References
    ----------
    Rabanser, Guennemann and Lipton 2019, Failing Loudly, NeurIPS 32.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != len(plan.note_patient):
        raise UsageError(f"scores have shape {scores.shape}; they need one row for each of the plan's notes")
    measured = np.isfinite(scores)
    weight = plan.note_weight[:, None] * measured
    with np.errstate(all="ignore"):
        centre = (weight * np.where(measured, scores, 0.0)).sum(axis=0) / weight.sum(axis=0)
    spread = (scores - centre) ** 2
    return max_t_test(
        np.column_stack([scores, spread]),
        [*names, *(f"{output} (squared distance from the mean)" for output in names)],
        plan,
        name="outputs",
    )


# Vocabulary -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenShift:
    """How much one token adds to the divergence: bits beyond what relabelled patients give, and its two rates."""

    token: str
    excess_bits: float
    per_thousand: tuple[float, float]
    n_patients: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VocabularyShift:
    """Jensen-Shannon test, Kullback-Leibler divergence as a description, and the tokens behind them."""

    jensen_shannon: TestResult
    kullback_leibler: TestResult
    tokens: tuple[TokenShift, ...]


def vocabulary_test(
    frequencies: np.ndarray,
    tokens: tuple[str, ...],
    plan: PermutationPlan,
    *,
    cells: Sequence[object] | None = None,
    n_tokens: int = 15,
    smallest_cell: int = 11,
    smoothing: float = 0.1,
) -> VocabularyShift:
    """Do the notes use other words? Divergence of the average note's token distribution, in bits.

    Every divergence of samples is above zero; what counts is its excess over relabelled patients (`effect`).

    Parameters
    ----------
    frequencies : (n_notes, v) sparse or dense; the share of each token in a note, rows sum to 1.
    tokens : v names.
    plan : the relabellings.
    cells : one label a note, such as note type and year: divergences are computed within each cell and summed with
        the cells' shares of patients as fixed weights, and so are rates. Goes with a plan over `profile_strata`.
    n_tokens : how many of the most diverging tokens to return.
    smallest_cell : a token is returned only if at least that many patients of one institution have it.
    smoothing : share of the pooled distribution mixed in before the Kullback-Leibler divergence of the other
        institution from the reference, which is infinite otherwise.

    References
    ----------
    Lin 1991, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information Theory 37.
    Jelinek and Mercer 1980 (the smoothing).
    """
    from scipy import sparse

    notes = sparse.csr_array(frequencies)
    if notes.shape != (len(plan.note_patient), len(tokens)):
        raise UsageError(f"frequencies have shape {notes.shape}; {len(plan.note_patient)} notes, {len(tokens)} tokens")
    groups, note = _groups(cells, plan)
    divergence, directed = np.zeros(plan.n_permutations + 1), np.zeros(plan.n_permutations + 1)
    observed, expected = np.zeros(len(tokens)), np.zeros(len(tokens))
    rates, counts = np.zeros((2, len(tokens))), np.zeros((2, len(tokens)), dtype=int)
    at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * len(tokens)))
    for inside, rows, weight in groups:
        local = np.searchsorted(rows, plan.note_patient[inside])
        mean = sparse.csr_array(
            (1.0 / np.bincount(local)[local], (local, np.arange(len(inside)))), shape=(len(rows), len(inside))
        )
        patients = sparse.csr_array(mean @ notes[inside])
        columns = patients.T.tocsr()
        total = np.asarray(patients.sum(axis=0)).ravel()
        pooled = total / len(rows)
        for start in range(0, len(divergence), at_once):
            here = slice(start, start + at_once)
            labels = plan.membership[rows, here].astype(np.float64)
            n_target = labels.sum(axis=0)
            sums = columns @ labels
            target = sums / n_target
            reference = np.maximum(total[:, None] - sums, 0) / (len(rows) - n_target)
            middle = (target + reference) / 2
            parts = (_information(target, middle) + _information(reference, middle)) / 2
            mixed = [(1 - smoothing) * side + smoothing * pooled[:, None] for side in (target, reference)]
            divergence[here] += weight * parts.sum(axis=0)
            directed[here] += weight * _information(*mixed).sum(axis=0)
            if start == 0:
                observed += weight * parts[:, 0]
                rates += weight * np.stack([reference[:, 0], target[:, 0]])
            expected += weight * parts.sum(axis=1)
    have = sparse.csr_array(_averaging(plan) @ notes) > 0
    for side in (False, True):
        counts[int(side)] = np.asarray(have[plan.is_target == side].sum(axis=0)).ravel()
    expected = (expected - observed) / plan.n_permutations
    excess = observed - expected
    shown = [i for i in np.argsort(-excess, kind="stable") if counts[:, i].max() >= smallest_cell and excess[i] > 0]
    shifts = tuple(
        TokenShift(
            tokens[i],
            float(excess[i]),
            (float(1000 * rates[0, i]), float(1000 * rates[1, i])),
            (int(counts[0, i]), int(counts[1, i])),
        )
        for i in shown[:n_tokens]
    )
    note = note or "no interval: resampling patients adds divergence of its own"
    unit = "bits a token beyond relabelled patients"

    def described(name: str, values: np.ndarray) -> TestResult:
        return as_result(name, plan, values, effect=float(values[0] - values[1:].mean()), effect_unit=unit, note=note)

    return VocabularyShift(described("vocabulary", divergence), described("vocabulary_kl", directed), shifts)


def _information(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Elementwise left log2(left / right), 0 where left is 0."""
    ratio = np.divide(left, right, out=np.ones_like(left), where=(left > 0) & (right > 0))
    return left * np.log2(ratio)
