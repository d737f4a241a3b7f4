"""Profiles: the same verdict as the notes, nothing in the file that must not leave, files that are broken."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clinical_nlp.corpora.synthetic_hospitals import load
from clinical_nlp.errors import InputError, TooFewPatientsError
from clinical_nlp.notes.schema import Note, iter_notes
from clinical_nlp.statistics.comparison import compare, decide
from clinical_nlp.statistics.profile import (
    compare_profiles,
    feature_map,
    is_profile,
    make_profile,
    profile_text,
    read_profiles,
)
from clinical_nlp.statistics.sample import NoteSampler, SampledNotes
from clinical_nlp.statistics.text_measures import hashed_features, projected_words

MARKER = "Zyxwvut"
WORDS = [
    *("no acute distress", "denies chest pain", "lungs are clear", "follow up in two weeks", "stable overnight"),
    *("afebrile", "tolerating diet", "ambulating with walker", "plan discussed", "continue home medications"),
]


def sampled(notes: list[Note]) -> SampledNotes:
    sampler = NoteSampler()
    for note in notes:
        sampler.add(note)
    return sampler.finish()


def hospital(seed: int, place: str, *, patients: int = 40, notes: int = 3, style: float = 0.0) -> list[Note]:
    """Clustered notes; with probability `style` a note has bullets and a placeholder."""
    generator = np.random.default_rng([seed, ord(place)])
    found = []
    for patient in range(patients):
        weights = generator.dirichlet(np.full(len(WORDS), 1.0))
        for number in range(notes):
            parts = list(generator.choice(WORDS, 12, p=weights))
            text = ". ".join([*parts, f"{MARKER}{patient}."])
            if generator.random() < style:
                text = "Seen by ___.\n" + "\n".join(f"- {part}" for part in parts)
            name = f"{place}{patient}"
            found.append(Note(f"{name}-{number}", name, place, text, source="here"))
    return found


def both_verdicts(notes: list[Note]) -> tuple[str, str]:
    sample = sampled(notes)
    names = sorted(sample.n_patients)
    by_notes = compare(
        sample,
        reference=names[0],
        other=names[1],
        represent=lambda rows: hashed_features([row.text for row in rows], dimensions=16),
        n_permutations=199,
    )
    profiles = [make_profile(sample, name) for name in names]
    return decide([by_notes])[0].verdict, decide([compare_profiles(*profiles)])[0].verdict


def test_profiles_and_notes_agree_on_identical_and_on_differing_institutions():
    identical = [both_verdicts(hospital(seed, "a") + hospital(seed, "b")) for seed in range(8)]
    for side in (0, 1):
        assert sum(pair[side] == "differ" for pair in identical) <= 2
    assert sum(first != second for first, second in identical) <= 2
    differing = [both_verdicts(hospital(seed, "a") + hospital(seed, "b", style=0.5)) for seed in range(4)]
    assert set(differing) == {("differ", "differ")}


def test_the_synthetic_hospitals_get_one_verdict():
    for knob, verdict in ((0.0, "not_distinguished"), (0.6, "differ")):
        notes = load(institutions=2, patients=40, notes_per_patient=(2, 3), covariate=knob, seed=2).notes
        assert both_verdicts(list(iter_notes(notes))) == (verdict, verdict)


def test_size_under_identical_institutions_with_clustered_notes():
    rejected = []
    for seed in range(30):
        notes = hospital(seed, "a", patients=25, notes=4) + hospital(seed, "b", patients=25, notes=2)
        sample = sampled(notes)
        found = compare_profiles(make_profile(sample, "a"), make_profile(sample, "b"))
        rejected.append([test.p_value <= 0.05 for test in found.all_notes])
    assert (np.mean(rejected, axis=0) <= 0.17).all()  # 1 or 2 of 30 expected


def test_a_file_comes_back_as_it_was_and_holds_no_text(tmp_path):
    notes = [
        replace(note, note_type="progress" if i % 2 else "rare" * (i < 8)) for i, note in enumerate(hospital(0, "a"))
    ]
    sample = sampled(notes)
    made = make_profile(sample, "a", institution_means="a ward")
    file = tmp_path / "a.json"
    file.write_text(profile_text([made], made_with="test"))
    assert is_profile(file)
    found = read_profiles(file)[0]
    assert (found.institution, found.n_patients, found.n_notes, found.n_sampled) == ("a", 40, 120, 40)
    for basis in (0, 1):
        np.testing.assert_allclose(found.summaries[basis].mean, made.summaries[basis].mean, atol=1e-6)
        np.testing.assert_allclose(found.summaries[basis].covariance, made.summaries[basis].covariance, atol=1e-6)
        np.testing.assert_allclose(found.summaries[basis].unit_mean, made.summaries[basis].unit_mean, rtol=1e-5)
    written = file.read_text().lower()
    assert "type:progress" in written
    assert "rarerare" not in written
    of_units = {"medications"}  # the name of a section in the fixed list
    words = {word.lower() for phrase in [*WORDS, MARKER] for word in phrase.split() if len(word) > 5} - of_units
    assert not [word for word in words if word in written]
    assert not [name for name in ("a11-0", "a39-2") if name in written]
    assert "what_leaves" in written


def test_means_and_covariances_are_those_of_patients():
    notes = hospital(1, "a", patients=15)
    made = make_profile(sampled(notes), "a").summaries[0]
    features = feature_map().transform(projected_words([note.text for note in notes]))
    people = [note.patient_id for note in notes]
    means = np.array([features[[p == who for p in people]].mean(axis=0) for who in sorted(set(people))])
    np.testing.assert_allclose(made.mean, means.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(made.covariance, np.cov(means, rowvar=False), atol=1e-6)


def test_what_few_patients_have_carries_no_number():
    notes = hospital(2, "a", patients=30, notes=1)
    notes = [
        replace(note, text="- " + note.text.replace(". ", "\n- ") if i < 10 else note.text)
        for i, note in enumerate(notes)
    ]
    made = make_profile(sampled(notes), "a").summaries[0]
    assert "bullet:dash" not in made.units
    assert made.rare["bullet:dash"] == 0.0
    eleven = [
        replace(note, text="- " + note.text.replace("\n- ", ". ") if i < 11 else note.text)
        for i, note in enumerate(notes)
    ]
    assert "bullet:dash" in make_profile(sampled(eleven), "a").summaries[0].units


def test_an_institution_of_few_patients_has_no_profile():
    with pytest.raises(TooFewPatientsError, match="fewer than 11 patients"):
        make_profile(sampled(hospital(0, "a", patients=10)), "a")


def test_broken_files_are_one_clear_error(tmp_path):
    file = tmp_path / "p.json"
    text = profile_text([make_profile(sampled(hospital(0, "a", patients=12)), "a")], made_with="test")
    whole = json.loads(text)

    def refused(match: str, **changes: object) -> None:
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(InputError, match=match):
            read_profiles(file)

    refused("version 99", version=99)
    refused("not a profile", format="something")
    refused("incomplete", profiles=[{"institution": "a"}])
    refused("another map", profiles=[{**whole["profiles"][0], "features": "0"}])
    cut = json.loads(text)["profiles"][0]
    cut["summaries"]["all_notes"]["mean"] = cut["summaries"]["all_notes"]["mean"][:40]
    refused("incomplete", profiles=[cut])
    file.write_text(text[:500])
    with pytest.raises(InputError, match="not a profile"):
        read_profiles(file)
