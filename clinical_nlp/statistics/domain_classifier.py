"""Can the institution of an unseen patient's note be told? By a linear discriminant, and by a small neural network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clinical_nlp.errors import TooFewPatientsError
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import TestResult, as_result, checked_features, compared_groups

_CELLS_AT_ONCE = 8_000_000


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
    groups, note = compared_groups(cells, plan)
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
            if not len(test):
                continue  # a rare cell may have no patient in this fold
            new = np.where(varies, (features[test] - centre) / scale, 0.0)
            local = np.bincount(plan.note_patient[test], minlength=len(inside))
            tested.append((number, test, new, rows[inside[rows]], 1.0 / local[plan.note_patient[test]]))
        at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * max((len(test) for _, test, *_ in tested), default=1)))
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
