"""The drift recipe: from exports to a page, with every record counted and no note text anywhere."""

import json
from pathlib import Path

import numpy as np
import pytest

from clinical_nlp.config import load_config
from clinical_nlp.errors import ClinicalNlpError, ConfigError, InputError, MissingDataError, UsageError
from clinical_nlp.models.resolve import ResolvedModel
from clinical_nlp.recipes.drift import CONFIG, DriftConfig, drift, report, run
from clinical_nlp.runs import Run
from clinical_nlp.statistics.exports import detect_format

MARKER = "Zyxwvut"
SENTENCES = ["no acute distress", "denies chest pain", "lungs are clear", "follow up in two weeks", "stable overnight"]


def write_table(
    path: Path, *, patients: int, style: float = 0.0, seed: int = 0, place: str = "a", notes: int = 3
) -> Path:
    """A JSONL export whose notes carry a marker that is unique to each of them."""
    generator = np.random.default_rng([seed, len(place), ord(place[0])])
    with path.open("w") as file:
        for patient in range(patients):
            weights = generator.dirichlet(np.full(5, 3.0))
            for note in range(notes):
                parts = list(generator.choice(SENTENCES, 12, p=weights))
                if generator.random() < style:
                    parts = ["IMPRESSION: ___", *(part.replace("denies", "neg for") for part in parts)]
                text = ". ".join([*parts, f"{MARKER}{place}{patient}x"])
                row = {
                    "note_id": f"{place}{patient}-{note}",
                    "patient_id": f"p{patient}",
                    "institution": place,
                    "text": text,
                }
                file.write(json.dumps(row) + "\n")
    return path


def every_byte(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_style_is_found_reported_and_no_text_shown(tmp_path, capfd):
    sources = [
        write_table(tmp_path / "a.jsonl", patients=30, place="a"),
        write_table(tmp_path / "b.jsonl", patients=25, place="b", style=0.8),
    ]
    results = drift(sources, output=tmp_path / "run", n_permutations=99)
    assert [item.verdict for item in results.comparisons] == ["differ"]
    assert results.comparisons[0].reference == "a"
    metrics = Run.load(tmp_path / "run").metrics
    auc = metrics["drift.b.domain_auc"]
    assert 0.5 < auc["low"] < auc["value"] <= auc["high"]
    assert (auc["n_patients"], auc["n_notes"]) == (55, 165)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    tokens = {token["token"]: token["per_thousand"] for token in written["comparisons"][0]["tokens"]}
    assert tokens["impression"][0] == 0 < tokens["impression"][1]
    output = capfd.readouterr()
    assert MARKER.lower().encode() not in every_byte(tmp_path / "run").lower()
    assert MARKER.lower() not in (output.out + output.err).lower()
    html = (tmp_path / "run" / "report.html").read_text()
    assert ": the notes differ" in html
    assert "Not shown: why" in html


def test_the_same_input_gives_the_same_results(tmp_path):
    source = write_table(tmp_path / "a.jsonl", patients=14, place="a")
    other = write_table(tmp_path / "b.jsonl", patients=14, place="b")
    for name in ("one", "two"):
        drift([source, other], output=tmp_path / name, n_permutations=19)
    for file in ("results.json", "report.html", "metrics.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    finished = Run.load(tmp_path / "one")
    assert report(finished) == (tmp_path / "one" / "report.html").read_text()


def test_few_patients_give_no_verdict_no_small_count_and_say_how_small_p_can_get(tmp_path):
    sources = [
        write_table(tmp_path / "a.jsonl", patients=40, place="a"),
        *(write_table(tmp_path / f"{p}.jsonl", patients=3, place=p, style=1.0) for p in ("b", "c")),
    ]
    results = drift(sources, output=tmp_path / "run", n_permutations=99)
    assert [(item.other, item.verdict) for item in results.comparisons] == [
        ("2 small institutions together", "too_few")
    ]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "too few patients to tell" in html
    assert "no p-value can fall below 0.01" in html
    assert "</strong>" in html
    assert ": the notes differ" not in html
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["comparisons"][0]["n_patients"] == [None, None]
    assert {row["name"]: row["n_patients"] for row in written["institutions"]} == {"a": 40, "b": None, "c": None}


def test_patients_of_two_institutions_stand_in_one_and_the_page_says_so(tmp_path):
    a, b = (write_table(tmp_path / f"{p}.jsonl", patients=15, place=p, notes=n) for p, n in (("a", 3), ("b", 1)))
    both = tmp_path / "both.jsonl"
    both.write_text(
        a.read_text() + b.read_text() + write_table(tmp_path / "c.jsonl", patients=40, place="b").read_text()
    )
    results = drift([both], output=tmp_path / "run", n_permutations=19)
    assert results.comparisons[0].n_patients == (25, 15) or results.comparisons[0].n_patients == (15, 25)
    html = (tmp_path / "run" / "report.html").read_text()
    assert "15 patients have notes in several institutions" in html
    with pytest.raises(InputError, match="patient_in_two=majority"):
        drift([both], output=tmp_path / "refused", patient_in_two="error")


def test_equal_ids_in_two_sources_are_told(tmp_path):
    sources = [write_table(tmp_path / f"{p}.jsonl", patients=13, place=p) for p in ("a", "b")]
    drift(sources, output=tmp_path / "run", n_permutations=19)
    assert "13 patient ids occur in more than one source" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ClinicalNlpError, match="one institution"):
        drift(sources, output=tmp_path / "joint", shared_patients=True, n_permutations=19)


def test_rejected_records_are_counted_and_listed_without_text(tmp_path):
    source = write_table(tmp_path / "a.jsonl", patients=13, place="a")
    with source.open("a") as file:
        file.write('{"note_id": "broken", "text": "' + MARKER + "\n")
    other = write_table(tmp_path / "b.jsonl", patients=13, place="b")
    drift([source, other], output=tmp_path / "run", n_permutations=19)
    account = json.loads((tmp_path / "run" / "results.json").read_text())["account"]
    assert (account["n_records"], account["n_notes"], account["n_rejected"]) == (79, 78, 1)
    assert MARKER.encode() not in every_byte(tmp_path / "run")


def test_each_source_as_an_institution(tmp_path):
    sources = [write_table(tmp_path / f"{p}.jsonl", patients=13, place="same") for p in ("north", "south")]
    with pytest.raises(InputError, match=r"one institution.*institution_from=source"):
        drift(sources, output=tmp_path / "one", n_permutations=19)
    results = drift(sources, output=tmp_path / "two", n_permutations=19, institution_from="source")
    assert (results.comparisons[0].reference, results.comparisons[0].other) == ("north", "south")
    # The two files are the same notes: nothing may be found.
    assert results.comparisons[0].verdict == "not_distinguished"


def test_an_interrupted_run_takes_up_its_embeddings(tmp_path, monkeypatch):
    calls = []

    def embed_notes(model, texts, *, batch_size=16, max_tokens=512):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.array([[len(text), text.count("a"), text.count("e")] for text in texts], dtype=np.float32)

    monkeypatch.setattr("clinical_nlp.models.embeddings.embed_notes", embed_notes)
    monkeypatch.setattr("clinical_nlp.models.resolve.resolve_model", lambda name: ResolvedModel(name, name, digest="d"))
    monkeypatch.setattr("clinical_nlp.recipes.drift._EMBEDDED_AT_ONCE", 30)
    sources = [write_table(tmp_path / f"{p}.jsonl", patients=13, place=p, notes=2) for p in ("a", "b")]
    config = DriftConfig(sources=[str(source) for source in sources], model="any", n_permutations=19)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    monkeypatch.setattr("clinical_nlp.recipes.drift._EMBEDDED_AT_ONCE", 1000)
    run(config, tmp_path / "whole")
    assert calls == [30, 22, 22, 52]
    assert (tmp_path / "run" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_use_is_one_clear_error(tmp_path):
    source = write_table(tmp_path / "a.jsonl", patients=13, place="a")
    other = write_table(tmp_path / "b.jsonl", patients=13, place="b")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        drift([source], output=tmp_path / "x", refrence="a")
    with pytest.raises(UsageError, match="reference 'z'"):
        drift([source, other], output=tmp_path / "y", reference="z")
    with pytest.raises(MissingDataError, match="no such file"):
        drift([tmp_path / "absent"], output=tmp_path / "z")
    corpus = {"name": "synthetic_hospitals", "options": {"pateints": 20}}
    with pytest.raises(UsageError, match="no option 'pateints'; did you mean 'patients'"):
        run(DriftConfig(corpus=corpus), tmp_path / "options")
    with pytest.raises(UsageError, match=r"'ehr_export' needs the option 'format' \(corpus.options.format\)"):
        run(DriftConfig(corpus={"name": "ehr_export"}), tmp_path / "needed")
    with pytest.raises(ClinicalNlpError, match="no_such_model"):
        drift([source, other], output=tmp_path / "m", model="no_such_model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--format"):
        detect_format(tmp_path / "empty")


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["DocumentReference.000.ndjson.gz", "Patient.ndjson"], "fhir"),
        (["discharge.csv.gz"], "mimic"),
        (["NOTE.csv", "PERSON.csv"], "omop"),
        (["1.txt", "1.ann"], "brat"),
        (["notes.parquet"], "table"),
        (["1.txt"], "text"),
    ],
)
def test_formats_are_told_from_names(tmp_path, names, format):
    for name in names:
        (tmp_path / name).touch()
    assert detect_format(tmp_path) == format


def test_the_shipped_config_is_the_default():
    file = Path(__file__).parents[2] / "recipes" / "configs" / "drift.yaml"
    assert load_config(CONFIG, file) == DriftConfig()


def test_the_built_in_hospitals_differ_by_their_styles(tmp_path):
    options = {"institutions": 2, "patients": 20, "covariate": 0.8}
    config = DriftConfig(corpus={"name": "synthetic_hospitals", "options": options}, n_permutations=99)
    run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["comparisons"][0]["verdict"] == "differ"


def test_a_different_mix_of_note_types_is_told_with_what_to_do(tmp_path):
    config = DriftConfig(corpus={"name": "synthetic_hospitals", "options": {"institutions": 2}}, n_permutations=19)
    run(config, tmp_path / "plain")
    assert "mix note types differently" in (tmp_path / "plain" / "report.html").read_text()
    run(config.model_copy(update={"strata": "profile"}), tmp_path / "strata")
    html = (tmp_path / "strata" / "report.html").read_text()
    assert "mix note types differently" not in html
    assert "shuffled only among patients with a like number and mix" in html
