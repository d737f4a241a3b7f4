"""The loop with readers: what is drawn, what comes back, and figures that were worked out by hand."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MARKER, tree

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.extraction import extract
from clinical_nlp.extraction.review import export_review, import_review
from clinical_nlp.extraction.review.accuracy import (
    ALL,
    Reading,
    ReadNote,
    agreement,
    cohen_kappa,
    design_weights,
    weighted_accuracy,
)
from clinical_nlp.extraction.review.sampling import Stratum
from clinical_nlp.notes.readers import ReadOptions, read_notes
from clinical_nlp.notes.readers.brat import read_spans

FEVER, COUGH, SEIZURE = "HP:0001945", "HP:0012735", "HP:0001250"


def note(patient, stratum, flagged, of_kind, found, true, institution="A"):
    return ReadNote(patient, institution, stratum, flagged, of_kind, frozenset(found), dict.fromkeys(true, 1.0))


# 1,000 patients of whom 100 have flagged notes. Stratum f: 100 patients, all with flagged notes, 50 of them with
# unflagged notes too; 2 are drawn. Stratum u: 900 patients without a flag; 3 are drawn.
STRATA = (
    Stratum("f", "A", FEVER, 100, 100, 50, 2),
    Stratum("u", "A", None, 900, 0, 900, 3),
)
NOTES = [
    note("p1", "f", True, 4, {FEVER}, {FEVER}),  # weight 100/2 * 4/2 = 100
    note("p1", "f", True, 4, {FEVER}, set()),  # 100
    note("p1", "f", False, 3, set(), {FEVER}),  # 50/1 * 3/1 = 150
    note("p2", "f", True, 1, {FEVER, COUGH}, {FEVER}),  # 100/2 * 1/1 = 50
    note("u1", "u", False, 2, set(), set()),  # 900/3 * 2/2 = 300
    note("u1", "u", False, 2, set(), {COUGH}),  # 300
    note("u2", "u", False, 1, set(), set()),  # 900/3 * 1/1 = 300
    note("u3", "u", False, 5, set(), set()),  # 900/3 * 5/1 = 1,500
]


def test_weights_by_hand():
    weights = design_weights(NOTES, {stratum.name: stratum for stratum in STRATA})
    assert weights.tolist() == [100, 100, 150, 50, 300, 300, 300, 1500]


def test_accuracy_by_hand():
    results = {
        (item.measure, item.concept, item.institution): item.estimate
        for item in weighted_accuracy(NOTES, STRATA, [FEVER, COUGH])
    }
    # Fever: found in 100 + 100 + 50 = 250, of which 150 right; true in 100 + 150 + 50 = 300, of which 150 found.
    assert results["ppv", FEVER, ALL].value == pytest.approx(150 / 250)
    assert results["sensitivity", FEVER, ALL].value == pytest.approx(150 / 300)
    # Cough: found in 50, wrongly; true in 300, none found.
    assert results["ppv", COUGH, ALL].value == 0
    assert results["sensitivity", COUGH, "A"].value == 0
    # Together: 150 right of 300 found, and of 600 true.
    assert results["ppv", ALL, ALL].value == pytest.approx(150 / 300)
    assert results["sensitivity", ALL, ALL].value == pytest.approx(150 / 600)
    fever = results["ppv", FEVER, ALL]
    assert (fever.n_patients, fever.n_notes) == (2, 3)
    # Patients weigh 200 and 50: 250^2 / (200^2 + 50^2) = 1.47 effective patients.
    assert fever.note == "exact binomial at 1.5 effective patients"
    assert fever.low < 0.6 < fever.high
    assert (results["ppv", COUGH, ALL].low, results["ppv", COUGH, ALL].high) == (0, pytest.approx(0.975))


def test_half_of_the_readers_count_half():
    halves = [ReadNote("p1", "A", "f", True, 1, frozenset({FEVER}), {FEVER: 0.5})]
    (ppv, *_) = [item for item in weighted_accuracy(halves, STRATA[:1], [FEVER]) if item.measure == "ppv"]
    assert ppv.estimate.value == 0.5


def test_a_sample_of_everything_still_has_an_interval_for_patients_to_come():
    strata = (Stratum("f", "A", FEVER, 1, 1, 0, 1),)
    for item in weighted_accuracy([note("p", "f", True, 1, {FEVER}, {FEVER})], strata, [FEVER]):
        assert (item.estimate.value, item.estimate.low, item.estimate.high) == (1, pytest.approx(0.025), 1)


def test_nothing_to_count_is_not_zero():
    results = weighted_accuracy([note("p", "f", True, 1, {COUGH}, set())], STRATA[:1], [FEVER])
    assert all(math.isnan(item.estimate.value) for item in results)


def test_intervals_cover_in_a_population_whose_truth_is_known():
    """Draw again and again from one population, and see how often the interval holds its sensitivity and value."""
    generator = np.random.default_rng(5)
    population = []
    for patient in range(1200):
        hard = generator.beta(2, 2)  # patients differ, so their notes are alike
        notes = []
        for _ in range(int(generator.integers(1, 6))):
            true = generator.random() < 0.25
            found = generator.random() < (0.9 - 0.5 * hard if true else 0.05 + 0.1 * hard)
            notes.append((found, true))
        population.append((str(patient), notes))
    everything = [pair for _, notes in population for pair in notes]
    right = sum(found and true for found, true in everything)
    wanted = {
        "ppv": right / sum(found for found, _ in everything),
        "sensitivity": right / sum(true for _, true in everything),
    }
    flagged = [item for item in population if any(found for found, _ in item[1])]
    unflagged = [item for item in population if not any(found for found, _ in item[1])]
    with_both = sum(not all(found for found, _ in notes) for _, notes in flagged)
    strata = (
        Stratum("f", "A", FEVER, len(flagged), len(flagged), with_both, 70),
        Stratum("u", "A", None, len(unflagged), 0, len(unflagged), 50),
    )
    covered = {"ppv": 0, "sensitivity": 0}
    values = {"ppv": [], "sensitivity": []}
    rounds = 150
    for seed in range(rounds):
        sample = []
        for stratum, members in (("f", flagged), ("u", unflagged)):
            size = 70 if stratum == "f" else 50
            for place in generator.choice(len(members), size, replace=False):
                patient, notes = members[place]
                for kind in (True, False):
                    own = [pair for pair in notes if pair[0] == kind]
                    chosen = generator.permutation(len(own))[:2]
                    sample += [
                        note(
                            patient,
                            stratum,
                            kind,
                            len(own),
                            {FEVER} if kind else set(),
                            {FEVER} if own[i][1] else set(),
                        )
                        for i in chosen
                    ]
        for item in weighted_accuracy(sample, strata, [FEVER], seed=seed):
            if item.concept == FEVER and item.institution == ALL:
                covered[item.measure] += item.estimate.low <= wanted[item.measure] <= item.estimate.high
                values[item.measure].append(item.estimate.value)
    for measure, count in covered.items():
        assert count / rounds >= 0.88, (measure, count)
        spread = np.std(values[measure]) / math.sqrt(rounds)
        assert abs(np.mean(values[measure]) - wanted[measure]) < 4 * spread, measure


def test_kappa_by_hand():
    # 20 both, 5 and 10 one alone, 15 neither: observed .70, expected .5 * .6 + .5 * .4 = .50.
    assert cohen_kappa(np.array([20, 5, 10, 15])) == pytest.approx((0.7 - 0.5) / 0.5)


def test_agreement_by_hand():
    def reading(patient, *spans):
        return Reading(patient, frozenset(spans), frozenset(span[2] for span in spans if span[3] == "present"))

    first = {
        "1": reading("p", (0, 5, FEVER, "present"), (9, 14, COUGH, "absent")),
        "2": reading("q", (3, 8, FEVER, "present")),
        "3": reading("r", (0, 5, FEVER, "present")),
    }
    second = {
        "1": reading("p", (0, 5, FEVER, "present"), (8, 14, COUGH, "present")),
        "2": reading("q"),
        "4": reading("s", (0, 5, FEVER, "present")),
    }
    found = {
        (item.measure, item.concept): item.estimate for item in agreement(("a", first), ("b", second), [FEVER, COUGH])
    }
    # Notes 1 and 2, two concepts: both yes, only b, only a, neither: 1, 1, 1, 1.
    assert found["kappa", ALL].value == pytest.approx(0)
    assert found["kappa", FEVER].value == pytest.approx(0)
    assert math.isnan(found["kappa", FEVER].low)
    assert found["span_f1_exact", ALL].value == pytest.approx(2 * 1 / (3 + 2))
    assert found["span_f1_overlap", ALL].value == pytest.approx(2 * 2 / (3 + 2))
    assert found["presence", ALL].value == pytest.approx(1 / 2)
    assert (found["kappa", ALL].n_patients, found["kappa", ALL].n_notes) == (2, 2)


@pytest.fixture
def output(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    return tmp_path / "out"


def drawn(folder):
    return {row["note_id"]: row for row in pq.read_table(folder / "sample.parquet").to_pylist()}


def test_what_is_exported(output, export, tmp_path):
    before = tree(output)
    result = export_review(output, tmp_path / "review", readers=["ann", "bob"])
    assert tree(output) == before
    # Six patients, at most two flagged and two unflagged notes of each.
    assert (result.patients, result.notes, result.flagged_notes) == (6, 11, 7)
    sample = drawn(tmp_path / "review")
    told = json.loads((tmp_path / "review" / "review.json").read_text())
    assert set(told["concepts"]) == {FEVER, COUGH, SEIZURE, "HP:0000175"}
    assert sample["a1"]["concepts"] == [FEVER]
    assert sample["b2"]["concepts"] == []  # The mother's fever is no flag.
    for row in sample.values():
        text = (export / f"{row['note_id']}.txt").read_bytes()
        for reader in ("ann", "bob"):
            assert (tmp_path / "review" / "brat" / reader / f"{row['file']}.txt").read_bytes() == text
    spans = read_spans(tmp_path / "review" / "brat" / "ann", ReadOptions())
    assert not spans.rejected
    marked = {
        (row["note_id"], row["text"]): (row["label"], row["presence"], row["experiencer"])
        for row in spans.table.to_pylist()
    }
    assert marked[sample["a1"]["file"], "cough"] == ("HP_0012735", "absent", None)
    assert marked[sample["b2"]["file"], "fever"] == ("HP_0001945", None, "family")
    tasks = json.loads((tmp_path / "review" / "label_studio" / "ann.json").read_text())
    assert len(tasks) == 11
    for task in tasks:
        for item in task["predictions"][0]["result"]:
            value = item["value"]
            assert task["data"]["text"][value["start"] : value["end"]] == value["text"]
    again = export_review(output, tmp_path / "again", readers=["ann", "bob"])
    assert again.notes == result.notes
    assert tree(tmp_path / "again") == tree(tmp_path / "review")
    few = export_review(output, tmp_path / "few", concepts=[SEIZURE], notes_per_patient=1, n_patients=1)
    assert few.concepts == 1
    assert few.notes < result.notes


def correct(folder, name, old, new):
    path = folder / f"{name}.ann"
    body = path.read_text("utf-8")
    assert old in body
    path.write_text(body.replace(old, new), "utf-8")


def test_corrections_come_back_from_brat(output, tmp_path):
    folder = tmp_path / "review"
    export_review(output, folder, readers=["ann", "bob"])
    with pytest.raises(InputError, match="nobody has read a note yet"):
        import_review(output, folder)
    files = {note_id: row["file"] for note_id, row in drawn(folder).items()}
    ann = folder / "brat" / "ann"
    # Ann says that the fever of a7 is absent, finds the family's fever to be the patient's, and did not read b5.
    (line,) = [line for line in (ann / f"{files['a7']}.ann").read_text().splitlines() if line.startswith("T1")]
    correct(ann, files["a7"], f"{line}\n", f"{line}\nA9\tNegation T1\n")
    body = (ann / f"{files['b2']}.ann").read_text().splitlines()
    (ann / f"{files['b2']}.ann").write_text("\n".join(row for row in body if "family" not in row) + "\n")
    (ann / f"{files['b5']}.ann").unlink()
    result = import_review(output, folder)
    assert result.read == {"ann": 10}
    assert not result.rejected
    assert result.agreement == ()
    by_cell = {(item.measure, item.concept, item.institution): item.estimate for item in result.accuracy}
    # Fever is affirmed in a1, a2, a7 and b5; b5 was not read, and of the three others a7 is wrong.
    assert by_cell["ppv", FEVER, "A"].value == pytest.approx(2 / 3)
    assert math.isnan(by_cell["ppv", FEVER, "B"].value)
    assert by_cell["sensitivity", FEVER, "B"].value == 0  # b2
    # All notes of every patient are drawn, so every weight is 1 but for what stands in for b5.
    (bob_says_done := folder / "brat" / "bob" / "done").touch()
    both = import_review(output, folder)
    assert both.read == {"ann": 10, "bob": 11}
    kappa = next(item.estimate for item in both.agreement if (item.measure, item.concept) == ("kappa", FEVER))
    # Ten notes read by both: both yes a1 a2, only bob a7, only ann b2, neither six.
    assert kappa.value == pytest.approx((0.8 - (0.3 * 0.3 + 0.7 * 0.7)) / (1 - (0.3 * 0.3 + 0.7 * 0.7)))
    assert kappa.n_notes == 10
    halves = {(item.measure, item.concept, item.institution): item.estimate for item in both.accuracy}
    assert halves["ppv", FEVER, "A"].value == pytest.approx(2.5 / 3)
    alone = import_review(output, folder, truth="bob")
    assert {item.estimate.value for item in alone.accuracy if item.concept == ALL} == {1.0}
    assert "kappa" in str(both)
    written = json.loads((folder / "results.json").read_text())
    assert len(written["accuracy"]) == len(alone.accuracy)
    assert bob_says_done.exists()
    for name in ("results.json", "accuracy.csv", "rejected.csv", "review.json"):
        assert MARKER not in (folder / name).read_text()


def test_corrections_come_back_from_label_studio(output, tmp_path):
    folder = tmp_path / "review"
    export_review(output, folder, readers=["ann"])
    files = {note_id: row["file"] for note_id, row in drawn(folder).items()}
    path = folder / "label_studio" / "ann.json"
    tasks = json.loads(path.read_text())
    for number, task in enumerate(tasks):
        result = task.pop("predictions")[0]["result"]
        if task["data"]["note"] == files["a7"]:
            result = [
                {**item, "value": {**item["value"], "choices": ["absent"]}} if item["from_name"] == "presence" else item
                for item in result
            ]
        if task["data"]["note"] == files["a4"]:
            result.append(
                {"id": "x", "from_name": "concept", "type": "labels", "value": {"start": 0, "end": 5, "text": "wrong"}}
            )
        task["annotations"] = [] if task["data"]["note"] == files["b5"] else [{"id": number, "result": result}]
    path.write_text(json.dumps(tasks))
    result = import_review(output, folder)
    assert result.read == {"ann": 10}
    assert [item.reason for item in result.rejected] == ["the text at the offsets is not what the region says"]
    by_cell = {(item.measure, item.concept, item.institution): item.estimate for item in result.accuracy}
    assert by_cell["ppv", FEVER, "A"].value == pytest.approx(2 / 3)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a JSON export of Label Studio"):
        import_review(output, folder)


def test_corrections_are_a_corpus(output, tmp_path):
    from clinical_nlp.notes.corpus import load_corpus

    folder = tmp_path / "review"
    export_review(output, folder, readers=["ann"])
    (folder / "brat" / "ann" / "done").touch()
    import_review(output, folder)
    corpus = load_corpus("n2c2", folder / "corpus")
    spans = corpus.spans.to_pylist()
    assert {row["label"] for row in spans} == {"phenotype"}
    assert {row["hpo_id"] for row in spans} == {FEVER, COUGH, SEIZURE, "HP:0000175"}
    assert {"absent", "uncertain"} < {row["presence"] for row in spans}
    assert "family" in {row["experiencer"] for row in spans}
    whose = {"A/1", "A/2", "A/3", "B/1", "B/4 / ü", "B/5"}
    given = ReadOptions(patient_map=folder / "corpus" / "patient_map.csv")
    for options in (given, ReadOptions()):  # the map is there, and is taken: notes of a patient stay together
        assert {note.patient_id for note in read_notes(folder / "corpus", format="brat", options=options)} == whose
    assert set(corpus.notes["patient_id"].to_pylist()) == whose
    assert set(load_corpus("ehr_export", folder / "corpus", format="brat").notes["patient_id"].to_pylist()) == whose


def test_texts_that_were_changed_do_not_count(output, tmp_path):
    folder = tmp_path / "review"
    export_review(output, folder, readers=["ann"])
    file = drawn(folder)["a1"]["file"]
    (folder / "brat" / "ann" / "done").touch()
    text = folder / "brat" / "ann" / f"{file}.txt"
    text.write_text(text.read_text() + " More.")
    result = import_review(output, folder)
    assert result.read == {"ann": 10}
    assert [item.reason for item in result.rejected] == ["the text is not the one that was given out"]


def test_wrong_usage(output, export, tmp_path):
    with pytest.raises(UsageError, match="not affirmed"):
        export_review(output, tmp_path / "r", concepts=["HP:0000707"])
    with pytest.raises(UsageError, match="reader 'a/b'"):
        export_review(output, tmp_path / "r", readers=["a/b"])
    with pytest.raises(UsageError, match="each name once"):
        export_review(output, tmp_path / "r", readers=["a", "a"])
    with pytest.raises(UsageError, match="at least one patient"):
        export_review(output, tmp_path / "r", n_patients=0)
    with pytest.raises(MissingDataError, match=r"no review\.json"):
        import_review(output, tmp_path)
    with pytest.raises(UsageError, match="not empty"):
        export_review(output, export)
    assert not (tmp_path / "r").exists()
    assert not (output / ".cache").exists()
