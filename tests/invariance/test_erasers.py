"""Erasers: LEACE against the reference library and its definition, streaming, saving, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concept_erasure import LeaceFitter
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import InputError, ModelError, TooFewPatientsError, UsageError
from clinical_nlp.invariance import ERASERS
from clinical_nlp.invariance.erasers import Eraser, EraserFitter, fit_erasers


def drawn(k=3, patients=40, d=8, seed=0, shift=1.5, notes=(1, 5)):
    """Vectors of k institutions with a mean each, a covariance of their own, and patients that differ."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d))
    rows, institutions, people = [], [], []
    for number in range(k):
        mean = shift * rng.normal(size=d)
        for patient in range(patients):
            own = rng.normal(size=d)
            for _ in range(int(rng.integers(*notes))):
                rows.append(mean + (own + rng.normal(size=d)) @ mixing)
                institutions.append(f"h{number}")
                people.append(f"h{number}-p{patient}")
    return np.array(rows), institutions, people


def weights(people):
    _, rows, counts = np.unique(people, return_inverse=True, return_counts=True)
    return 1 / counts[rows]


def cross_covariance(vectors, institutions, people):
    w = weights(people) / len(set(people))
    one_hot = np.array(institutions)[:, None] == np.unique(institutions)
    return (vectors - w @ vectors).T @ (w[:, None] * (one_hot - w @ one_hot))


@settings(max_examples=15, deadline=None)
@given(k=st.integers(2, 5), d=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_leace_equals_the_reference_library(k, d, seed):
    vectors, institutions, people = drawn(k, 30, d, seed, notes=(1, 2))  # one note a patient: no weights there
    ours = fit_erasers(vectors, institutions, people, ["leace"])
    one_hot = torch.tensor(np.array(institutions)[:, None] == np.unique(institutions), dtype=torch.float64)
    fitter = LeaceFitter(d, k, dtype=torch.float64, shrinkage=False, svd_tol=1e-9, constrain_cov_trace=False)
    theirs = fitter.update(torch.tensor(vectors), one_hot).eraser
    plain = EraserFitter().update(vectors, institutions, people).fit("leace", shrinkage=False)
    assert plain.n_directions == min(k - 1, d)
    assert np.allclose(plain(vectors), theirs(torch.tensor(vectors)).numpy(), atol=1e-6 * np.abs(vectors).max())
    assert ours["leace"].shrinkage > 0


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_nothing_linear_is_left_on_the_fitted_notes_patients_weighing_one(k, shrinkage):
    vectors, institutions, people = drawn(k)
    eraser = EraserFitter().update(vectors, institutions, people).fit("leace", shrinkage=shrinkage)
    assert np.abs(cross_covariance(vectors, institutions, people)).max() > 0.1
    assert np.abs(cross_covariance(eraser(vectors), institutions, people)).max() < 1e-10


def test_integer_labels_would_leave_a_direction_and_ours_are_one_hot():
    vectors, institutions, people = drawn(3)
    numbers = [int(name[1:]) for name in institutions]
    eraser = EraserFitter().update(vectors, numbers, people).fit("leace")
    assert eraser.n_directions == 2
    assert eraser.institutions == ("0", "1", "2")
    by_number = LeaceFitter(8, 1, dtype=torch.float64, svd_tol=1e-9)
    by_number.update(torch.tensor(vectors), torch.tensor(numbers, dtype=torch.float64)[:, None])
    left = by_number.eraser(torch.tensor(vectors)).numpy()
    assert np.abs(cross_covariance(left, institutions, people)).max() > 0.1  # the trap is real


def test_leace_moves_the_vectors_less_than_the_other_erasers_and_less_than_an_orthogonal_one():
    vectors, institutions, people = drawn(2, 200)
    eraser = EraserFitter().update(vectors, institutions, people).fit("leace", shrinkage=False)
    w = weights(people)[:, None]

    def moved(other):
        return (w * (vectors - other) ** 2).sum()

    direction = np.linalg.svd(cross_covariance(vectors, institutions, people))[0][:, :1]
    mean = (w * vectors).sum(0) / w.sum()
    assert moved(eraser(vectors)) < moved(vectors - (vectors - mean) @ direction @ direction.T)


@pytest.mark.parametrize("name", ERASERS)
def test_batches_in_any_order_give_what_all_at_once_gives(name):
    vectors, institutions, people = drawn(3, 60)
    vectors = vectors + 1e4  # far from zero: sums about zero would lose the covariance
    whole = fit_erasers(vectors, institutions, people, [name])[name]
    fitter = EraserFitter()
    order = np.random.default_rng(1).permutation(sorted(set(people)))
    for batch in np.array_split(order, 7):
        rows = np.flatnonzero(np.isin(people, batch))
        fitter.update(vectors[rows], [institutions[i] for i in rows], [people[i] for i in rows])
    again = fitter.fit(name)
    assert np.allclose(whole(vectors, institutions), again(vectors, institutions), atol=1e-6)
    assert again.n_patients == len(set(people))
    assert again.n_notes == len(people)
    assert fitter.patients == set(people)


@pytest.mark.parametrize("name", ERASERS)
def test_saved_and_loaded_it_erases_alike_in_numpy_and_torch(name, tmp_path):
    vectors, institutions, people = drawn(3, 60)
    eraser = fit_erasers(vectors, institutions, people, [name])[name]
    eraser.save(tmp_path)
    loaded = Eraser.load(tmp_path, name)
    assert np.array_equal(loaded(vectors, institutions), eraser(vectors, institutions))
    assert (loaded.institutions, loaded.n_patients, loaded.note) == (eraser.institutions, 180, eraser.note)
    single = torch.tensor(vectors, dtype=torch.float32, requires_grad=True)
    erased = eraser(single, institutions)
    assert erased.dtype == torch.float32
    assert np.allclose(erased.detach().numpy(), eraser(vectors, institutions), atol=1e-4)
    erased.sum().backward()
    assert single.grad is not None
    assert eraser(vectors.astype(np.float32), institutions).dtype == np.float32
    (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="fit it again"):
        Eraser.load(tmp_path, name)


def test_mean_centring_makes_the_means_equal_and_names_an_institution_it_has_not_seen():
    vectors, institutions, people = drawn(3)
    eraser = fit_erasers(vectors, institutions, people, ["mean_centring"])["mean_centring"]
    left = cross_covariance(eraser(vectors, institutions), institutions, people)
    assert np.abs(left).max() < 1e-10
    with pytest.raises(InputError, match="not fitted on institution 'elsewhere'"):
        eraser(vectors[:1], ["elsewhere"])
    with pytest.raises(UsageError, match="needs the institution"):
        eraser(vectors)


def test_leace_and_inlp_take_notes_of_an_institution_that_they_have_not_seen():
    vectors, institutions, people = drawn(3)
    for name in ("leace", "inlp"):
        eraser = fit_erasers(vectors, institutions, people, [name])[name]
        assert np.array_equal(eraser(vectors[:2], ["elsewhere"] * 2), eraser(vectors[:2]))


def test_inlp_is_an_orthogonal_projection_that_stops_by_itself():
    rng = np.random.default_rng(3)
    people = [f"p{i}" for i in range(600)]
    institutions = ["a", "b"] * 300
    vectors = rng.normal(size=(600, 10)) @ np.diag([3, 1, 1, 1, 1, 1, 1, 1, 1, 0.2])
    vectors[::2] += [2, 1, 0, 0, 0, 0, 0, 0, 0, 0.3]
    eraser = fit_erasers(vectors, institutions, people, ["inlp"])["inlp"]
    assert 1 <= eraser.n_directions < 9
    assert "held-out fifth" in eraser.note
    projector = np.eye(10) - eraser.left @ eraser.right
    assert np.allclose(projector @ projector, projector)
    assert np.allclose(projector, projector.T)
    asked = EraserFitter().update(vectors, institutions, people).fit("inlp", n_directions=4)
    assert asked.n_directions == 4


@pytest.mark.parametrize("name", ERASERS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda v, h, p: (v, ["h0"] * len(h), p), TooFewPatientsError, "at least 2 institutions"),
        (lambda v, h, p: (v[:-1], [*h[:-1]], [*p[:-1]]), None, ""),
        (lambda v, h, p: (np.vstack([v, v[:1]]), [*h, "new"], [*p, "lonely"]), TooFewPatientsError, "single patient"),
        (lambda v, h, p: (v, ["h1", *h[1:]], [p[1], *p[1:]]), InputError, "two institutions"),
        (lambda v, h, p: (np.ones_like(v), h, p), InputError, "do not vary"),
        (
            lambda v, h, p: (np.where(np.arange(len(v))[:, None] == 3, np.nan, v), h, p),
            InputError,
            "1 of .* not finite",
        ),
        (lambda v, h, p: (v, h, p[:-1]), UsageError, "one institution and one patient"),
    ],
)
def test_bad_input_is_one_clear_error(name, change, error, words):
    vectors, institutions, people = drawn(3, notes=(3, 5))
    arguments = change(vectors, institutions, people)
    if error is None:
        assert np.isfinite(fit_erasers(*arguments, [name])[name](vectors, institutions)).all()
        return
    with pytest.raises(error, match=words):
        fit_erasers(*arguments, [name])


def test_a_patient_comes_in_one_batch_and_other_names_are_refused():
    vectors, institutions, people = drawn(2)
    fitter = EraserFitter().update(vectors, institutions, people)
    with pytest.raises(InputError, match="1 patients were in an earlier batch"):
        fitter.update(vectors[:1], institutions[:1], people[:1])
    with pytest.raises(UsageError, match="did you mean 'leace'"):
        fitter.fit("lease")
    with pytest.raises(UsageError, match="fitted on"):
        fitter.fit("leace")(vectors[:, :3])
