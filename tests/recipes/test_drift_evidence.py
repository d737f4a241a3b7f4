"""Drift with more than text: labels, double marks, profiles, windows of time; and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from clinical_nlp.cli import main
from clinical_nlp.errors import InputError, MissingDataError, TooFewPatientsError, UsageError
from clinical_nlp.notes.schema import Note
from clinical_nlp.recipes.drift import drift
from clinical_nlp.recipes.profile import profile
from clinical_nlp.statistics.comparison import CONFIRMATORY
from clinical_nlp.statistics.evidence import task_outputs
from clinical_nlp.statistics.profile import read_profiles

MARKER = "Zyxwvut"
SENTENCES = ["no acute distress", "denies chest pain", "lungs are clear", "follow up in two weeks", "stable overnight"]


def write_table(
    path: Path,
    place: str,
    *,
    patients: int = 30,
    notes: int = 2,
    style: float = 0.0,
    sick: float = 0.3,
    year: int = 2020,
) -> dict[str, int]:
    """An export whose sick patients have a word in their notes; returns who is sick."""
    generator = np.random.default_rng([ord(place[0]), patients, year])
    labels = {}
    with path.open("a") as file:
        for patient in range(patients):
            weights = generator.dirichlet(np.full(5, 3.0))
            name = f"{place}{year}-{patient}"
            labels[name] = int(generator.random() < sick)
            for number in range(notes):
                parts = list(generator.choice(SENTENCES, 12, p=weights))
                parts += ["orthopnea"] * labels[name]
                lead = "IMPRESSION:\nsee ___\n- " if generator.random() < style else ""
                row = {
                    "note_id": f"{name}-{number}", "patient_id": name, "institution": place,
                    "text": lead + ". ".join([*parts, MARKER.lower() + name]), "written_at": f"{year}-0{1 + number}-15",
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
    return labels


def write_csv(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return path


def claims(folder: Path) -> dict[str, dict]:
    written = json.loads((folder / "results.json").read_text())
    return {claim["question"]: claim for claim in written["comparisons"][0]["claims"]}


def test_what_changed_is_named_in_clinical_units(tmp_path):
    write_table(tmp_path / "a.jsonl", "a")
    write_table(tmp_path / "b.jsonl", "b", style=0.9)
    results = drift([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], output=tmp_path / "run", n_permutations=99)
    named = [item.unit.name for item in results.comparisons[0].units if item.shift.adjusted_p <= 0.05]
    assert "Section: impression" in named
    assert "De-identification placeholders" in named
    page = (tmp_path / "run" / "report.html").read_text()
    assert "what changed, in clinical units" in page
    assert "section: impression from about 0 to" in page
    assert "cannot tell" in page
    assert "generalises" not in page
    assert MARKER.lower() not in page.lower()
    units = json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"][0]["units"]
    impression = next(unit for unit in units if unit["key"] == "section:impression")
    assert impression["reference"] is None  # nobody there has one: fewer than 11
    assert 70 < impression["other"] <= 100


def test_labels_of_both_institutions_say_prevalence_and_labels_of_one_say_it_under_an_assumption(tmp_path):
    labels = write_table(tmp_path / "a.jsonl", "a", patients=60, sick=0.2)
    labels |= (others := write_table(tmp_path / "b.jsonl", "b", patients=50, sick=0.75))
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    both = write_csv(tmp_path / "both.csv", ["patient_id", "label"], [[*row] for row in labels.items()])
    options = {"n_permutations": 99, "label_name": "heart failure", "labels_are_marked": False}
    drift(sources, output=tmp_path / "gold", labels=str(both), **options)
    found = claims(tmp_path / "gold")
    assert found["prevalence"]["answer"] == "changed"
    assert found["annotation"]["answer"] == "cannot_tell"
    assert found["prevalence"]["estimates"]["other"]["value"] == pytest.approx(np.mean(list(others.values())))
    one = write_csv(
        tmp_path / "one.csv",
        ["patient_id", "label"],
        [[who, "" if who in others else label] for who, label in labels.items()],
    )
    drift(sources, output=tmp_path / "text", labels=str(one), **options)
    found = claims(tmp_path / "text")
    assert found["prevalence"]["answer"] == "changed_if"
    assert "P(text | label)" in found["prevalence"]["condition"]
    assert found["association"]["answer"] == "cannot_tell"
    assert "Recalibrate only after labels" in (tmp_path / "text" / "report.html").read_text()


def test_notes_marked_twice_say_whether_the_convention_differs(tmp_path):
    write_table(tmp_path / "a.jsonl", "a")
    labels = write_table(tmp_path / "b.jsonl", "b")
    rows = [[f"{who}-0", who, kind, 3, 3 - 2 * (kind == "family")] for who in labels for kind in ("family", "absent")]
    marks = write_csv(tmp_path / "marks.csv", ["note_id", "patient_id", "class", "reference", "other"], rows)
    options = {"n_permutations": 99, "conventions": str(marks)}
    drift([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], output=tmp_path / "run", **options)
    found = claims(tmp_path / "run")["annotation"]
    assert (found["answer"], found["evidence"]) == ("changed", ["family"])
    assert "Agree on one convention" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("style", "verdict"), [(0.0, "not_distinguished"), (0.9, "differ")])
def test_profiles_beside_or_instead_of_exports_give_the_verdict_of_the_notes(tmp_path, style, verdict):
    write_table(tmp_path / "a.jsonl", "a")
    write_table(tmp_path / "b.jsonl", "b", style=style)
    for place in ("a", "b"):
        profile([tmp_path / f"{place}.jsonl"], output=tmp_path / f"{place}.json")
    pairs = {"notes": ("jsonl", "jsonl"), "beside": ("json", "jsonl"), "instead": ("json", "json")}
    for name, (first, second) in pairs.items():
        sources = [tmp_path / f"a.{first}", tmp_path / f"b.{second}"]
        results = drift(sources, output=tmp_path / name, n_permutations=199, reference="a")
        assert [item.verdict for item in results.comparisons] == [verdict], name
    page = (tmp_path / "instead" / "report.html").read_text()
    assert MARKER.lower() not in page.lower() + (tmp_path / "a.json").read_text().lower()
    assert "From profiles no classifier" in page
    instead = json.loads((tmp_path / "instead" / "results.json").read_text())
    beside = json.loads((tmp_path / "beside" / "results.json").read_text())
    assert [u["key"] for u in instead["comparisons"][0]["units"]] == [
        u["key"] for u in beside["comparisons"][0]["units"]
    ]
    with pytest.raises(UsageError, match="'a' is there twice"):
        drift([tmp_path / "a.json", tmp_path / "a.jsonl"], output=tmp_path / "twice")
    with pytest.raises(UsageError, match="labels needs notes"):
        drift([tmp_path / "a.json", tmp_path / "b.json"], output=tmp_path / "labels", labels="x.csv")
    with pytest.raises(InputError, match="a second one"):
        drift([tmp_path / "a.json"], output=tmp_path / "alone")
    with pytest.raises(UsageError, match="reference 'z'"):
        drift([tmp_path / "a.json", tmp_path / "b.json"], output=tmp_path / "z", reference="z")


def test_the_profile_verb(tmp_path, capsys):
    write_table(tmp_path / "a.jsonl", "a", patients=12)
    file = tmp_path / "a.json"
    assert main(["profile", str(tmp_path / "a.jsonl"), "--output", str(file)]) == 0
    assert "no text" in capsys.readouterr().out
    assert main(["profile", str(tmp_path / "a.jsonl"), "--output", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "a.txt")]) == 2
    assert main(["profile", str(tmp_path / "a.jsonl")]) == 2
    write_table(tmp_path / "few.jsonl", "f", patients=10)
    assert main(["profile", str(tmp_path / "few.jsonl"), "--output", str(tmp_path / "few.json")]) == 1
    assert "none of 1 institutions has 11 patients" in capsys.readouterr().err
    assert not (tmp_path / "few.json").exists()
    with pytest.raises(TooFewPatientsError):
        profile([tmp_path / "few.jsonl"], output=tmp_path / "few.json")


def test_profiles_of_windows_give_the_verdicts_of_the_notes(tmp_path, capsys):
    for year, style in ((2019, 0.0), (2020, 0.0), (2021, 0.9)):
        write_table(tmp_path / "a.jsonl", "a", year=year, style=style, patients=25)
    undated = '{"note_id": "x", "patient_id": "x", "institution": "a", "text": "no date here"}\n'
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + undated)
    file = tmp_path / "a.json"
    assert main(["profile", str(tmp_path / "a.jsonl"), "--window", "year", "--output", str(file)]) == 0
    assert "3 institutions" in capsys.readouterr().out
    kept = {item.institution: item for item in read_profiles(file)}
    assert {name: item.n_patients for name, item in kept.items()} == {"a 2019": 25, "a 2020": 25, "a 2021": 25}
    assert {item.n_notes for item in kept.values()} == {50}
    assert "in one year" in kept["a 2019"].institution_means
    from_profiles = drift([file], output=tmp_path / "profiles", window="year")
    from_notes = drift([tmp_path / "a.jsonl"], output=tmp_path / "notes", window="year", n_permutations=199)
    verdicts = {item.other: item.verdict for item in from_notes.comparisons}
    assert from_profiles.comparisons[0].reference == "a 2019"
    assert {item.other: item.verdict for item in from_profiles.comparisons} == verdicts
    assert set(verdicts.values()) == {"differ", "not_distinguished"}
    account = json.loads((tmp_path / "notes" / "results.json").read_text())["account"]
    assert account["skipped"] == {"no date": 1}
    assert main(["profile", str(tmp_path / "a.jsonl"), "--window", "week", "--output", str(tmp_path / "w.json")]) == 2


def test_windows_of_time_are_compared_with_the_first(tmp_path):
    for year, style in ((2019, 0.0), (2020, 0.0), (2021, 0.9)):
        write_table(tmp_path / "a.jsonl", "a", year=year, style=style, patients=25)
    results = drift([tmp_path / "a.jsonl"], output=tmp_path / "run", window="year", n_permutations=199)
    found = {item.other: item.verdict for item in results.comparisons}
    assert results.comparisons[0].reference == "a 2019"
    assert found == {"a 2020": "not_distinguished", "a 2021": "differ"}
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {look["other"]: look["alarm"] for look in written["looks"]} == {"a 2020": False, "a 2021": True}
    assert [look["spends"] for look in written["looks"]] == [0.05, 0.05]  # one look a year, at one institution
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Clinical units over time" in page
    assert ">2021</text>" in page

    def p_of_look(other: str) -> float:
        tests = next(item for item in results.comparisons if item.other == other).tests
        return min(1.0, 5 * min(tests[name].p_value for name in CONFIRMATORY))

    assert [look["p_value"] for look in written["looks"]] == [p_of_look("a 2020"), p_of_look("a 2021")]


def test_months_of_two_institutions_spend_a_24th_of_the_year_each(tmp_path):
    for place in ("a", "b"):
        write_table(tmp_path / "both.jsonl", place, patients=14, notes=3)
    results = drift([tmp_path / "both.jsonl"], output=tmp_path / "run", window="month", patient_in_two="majority",
                    n_permutations=19)  # fmt: skip
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["looks"]
    for look in written["looks"]:
        assert look["spends"] == pytest.approx(0.05 / 24)
    # Every look is given relabellings enough that it could alarm.
    assert {test.n_permutations for item in results.comparisons for test in item.all_notes} == {100 * 24 - 1}
    for place, year in (("c", 2019), ("c", 2020), ("d", 2019), ("d", 2020)):
        write_table(tmp_path / "years.jsonl", place, patients=14, notes=2, year=year, style=0.9 * (year > 2019))
    drift([tmp_path / "years.jsonl"], output=tmp_path / "two", window="year", n_permutations=19)
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [look["other"] for look in written["looks"]] == ["d 2019", "c 2020", "d 2020"]
    assert {look["spends"] for look in written["looks"]} == {0.05 / 2}
    page = (tmp_path / "two" / "report.html").read_text()
    assert page.count('aria-label="Clinical units over time"') == 2  # each institution by itself
    with pytest.raises(UsageError, match="share no year"):
        drift([tmp_path / "both.jsonl"], output=tmp_path / "years", window="month", strata="profile_year")


def test_bad_input_is_one_clear_error_or_a_stated_gap(tmp_path):
    write_table(tmp_path / "a.jsonl", "a")
    write_table(tmp_path / "b.jsonl", "b")
    write_table(tmp_path / "one.jsonl", "o", patients=1)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]

    def refused(match: str, rows: list[list[object]], columns: list[str], error: type[Exception] = InputError) -> None:
        file = write_csv(tmp_path / "labels.csv", columns, rows)
        with pytest.raises(error, match=match):
            drift(sources, output=tmp_path / f"refused{abs(hash(match))}", labels=str(file), n_permutations=19)

    refused("none of its patient_id values", [["nobody", 1]], ["patient_id", "label"])
    refused("line 2: label must be", [["a2020-0", 7]], ["patient_id", "label"])
    refused("no column 'label'", [["a2020-0", 1]], ["patient_id", "gold"])
    refused("patient_id or note_id", [["a2020-0", 1]], ["person", "label"])
    with pytest.raises(MissingDataError, match="no such file"):
        drift(sources, output=tmp_path / "absent", labels="absent.csv", n_permutations=19)

    # An institution with one patient: a page that says so, no test and no count.
    results = drift([tmp_path / "a.jsonl", tmp_path / "one.jsonl"], output=tmp_path / "single", n_permutations=19)
    assert [(item.verdict, item.all_notes) for item in results.comparisons] == [("too_few", ())]
    assert "too few patients" in (tmp_path / "single" / "report.html").read_text()

    # Notes that are all alike: nothing differs, whatever is constant has no number.
    for place in ("x", "y"):
        with (tmp_path / f"{place}.jsonl").open("w") as file:
            for i in range(15):
                row = {
                    "note_id": f"{place}{i}",
                    "patient_id": f"{place}{i}",
                    "institution": place,
                    "text": "Seen. Well.",
                }
                file.write(json.dumps(row) + "\n")
    results = drift([tmp_path / "x.jsonl", tmp_path / "y.jsonl"], output=tmp_path / "alike", n_permutations=19)
    assert results.comparisons[0].verdict == "not_distinguished"
    assert "no difference found" in (tmp_path / "alike" / "report.html").read_text()

    # Without a patient id nothing can be permuted: the records are rejected, and counted.
    text = (tmp_path / "b.jsonl").read_text().replace('"patient_id": "b2020-3"', '"patient_id": ""')
    (tmp_path / "gap.jsonl").write_text(text)
    drift([tmp_path / "a.jsonl", tmp_path / "gap.jsonl"], output=tmp_path / "gaps", n_permutations=19)
    assert json.loads((tmp_path / "gaps" / "results.json").read_text())["account"]["n_rejected"] == 2


def test_what_a_tagger_says_is_compared_too(tmp_path):
    from tiny_models import write_encoder

    from clinical_nlp.config import load_config
    from clinical_nlp.recipes import ner

    generator = np.random.default_rng(0)
    sentences = {"no fever or cough today": "O B-Disease O B-Disease O", "stop aspirin at night": "O O O O"}
    (tmp_path / "iob").mkdir()
    for part in ("train", "devel", "test"):
        lines = []
        for text in generator.choice(list(sentences), 40):
            lines += [f"{w}\t{t}" for w, t in zip(text.split(), sentences[text].split(), strict=True)] + [""]
        (tmp_path / "iob" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    options = {"strategy.name": "full", "window": 48, "overlap": 8, "max_steps": 60, "training.batch_size": 8}
    options |= {"training.learning_rate": 0.003, "training.head_learning_rate": 0.01, "training.epochs": 30}
    names = {"corpus.name": "ncbi_disease", "corpus.path": str(tmp_path / "iob")}
    names["base_model"] = str(write_encoder(tmp_path / "encoder"))
    tagger = ner.run(load_config(ner.CONFIG, None, {**options, **names}), tmp_path / "tagger")

    for place, share in (("a", 0.2), ("b", 0.9)):
        with (tmp_path / f"{place}.jsonl").open("w") as file:
            for i in range(25):
                text = " ".join(generator.choice(list(sentences), 4, p=[share, 1 - share]))
                row = {"note_id": f"{place}{i}", "patient_id": f"{place}{i}", "institution": place, "text": text}
                file.write(json.dumps(row) + "\n")
    drift(
        [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        output=tmp_path / "run",
        model=str(tagger.path),
        max_tokens=48,
        n_permutations=99,
    )
    found = claims(tmp_path / "run")["outputs"]
    assert found["answer"] == "changed"
    assert any("per 100 words" in name for name in found["evidence"])
    assert found["n_patients"] == 50


def test_what_a_coder_says_is_compared_too(tmp_path):
    from tiny_models import write_encoder

    from clinical_nlp.config import load_config
    from clinical_nlp.recipes import coding
    from clinical_nlp.tasks.coding import Coder

    values = {
        "corpus.options": {"institutions": 2, "patients": 60},
        "base_model": str(write_encoder(tmp_path / "encoder")),
        "strategy.name": "full",
        "max_steps": 4,
        "chunk": 64,
        "max_tokens": 256,
        "training.batch_size": 4,
        "baselines": [],
    }
    coded = coding.run(load_config(coding.CONFIG, None, values), tmp_path / "coded")
    write_table(tmp_path / "a.jsonl", "a", patients=20)
    write_table(tmp_path / "b.jsonl", "b", patients=20, style=1.0)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    drift(sources, output=tmp_path / "run", model=str(coded.path), max_tokens=64, n_permutations=99)
    found = claims(tmp_path / "run")["outputs"]
    # The style alone moves every logit of so little a model, by far more than patients differ.
    assert found["answer"] == "changed"
    assert (found["n_patients"], found["n_notes"]) == (40, 80)
    assert all(name.startswith("probability of ") for name in found["evidence"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Does the model say other things?" in page
    assert MARKER.lower() not in page.lower()
    assert "Known: coding on synthetic_hospitals" in page

    rows = [json.loads(line) for line in sources[0].read_text().splitlines()[:5]]
    notes = [Note(row["note_id"], row["patient_id"], "a", row["text"], "s") for row in rows]
    said, names = task_outputs(coded.path, notes)
    coder = Coder.load(coded.path)
    assert names == tuple(f"probability of {code}" for code in coder.task.codes)
    alone = np.concatenate([coder.calibration(coder.logits([[row["text"]]])) for row in rows])
    np.testing.assert_allclose(said, alone, atol=1e-5)
    assert ((said >= 0) & (said <= 1)).all()
