"""`extract --assertion`: the classifier's word in the mentions, and that the batch stays the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import MARKER, tree
from tiny_models import write_words

from clinical_nlp import cli
from clinical_nlp.config import load_config
from clinical_nlp.errors import RunError, UsageError
from clinical_nlp.extraction import extract
from clinical_nlp.notes.writers.brat import write_document
from clinical_nlp.recipes import assertion

WORDS = "zilch no he has mother had . , fever cough seizure cleft palate possible"
FINDINGS = ("fever", "cough", "seizure", "cleft palate")
VOCABULARY = "id,label,synonyms,parents\nT:0,Finding,,\n" + "".join(
    f"T:{number},{name.capitalize()},,T:0\n" for number, name in enumerate(FINDINGS, start=1)
)
NOTES = [
    ("n1", "1", "Zilch fever. No cough."),
    ("n2", "2", f"He has fever. {MARKER} is written here. Zilch cough."),
    ("n3", "3", "Mother had seizure. Zilch seizure."),
    ("n4", "4", "Nothing to report."),
    ("n5", "4", "Possible cleft palate."),
    ("n6", "1", "Zilch fever. No cough."),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier that has learned that "zilch" denies."""
    folder = tmp_path_factory.mktemp("assertion")
    (folder / "brat").mkdir()
    forms = {"Zilch {}.": "absent", "No {}.": "absent", "He has {}.": "present", "Mother had {}.": "present"}
    draw = random.Random(0)
    for note in range(80):
        text, spans = "", []
        for form in draw.sample(sorted(forms), draw.randint(1, 3)):
            finding = draw.choice(FINDINGS)
            start = len(text) + form.index("{")
            text += form.format(finding) + " "
            spans.append({"start": start, "end": start + len(finding), "label": "problem", "presence": forms[form]})
        write_document(folder / "brat" / f"n{note:03d}.txt", text, spans)
    values = {
        "corpus": {"name": "ehr_export", "path": str(folder / "brat"), "options": {"format": "brat"}},
        "base_model": str(write_words(folder / "encoder", WORDS)),
        "strategy.name": "full",
        "training": {"epochs": 12, "learning_rate": 2e-3, "batch_size": 4},
        "split": {"name": "random", "development": 0.2, "test": 0.2},
    }
    done = assertion.run(load_config(assertion.CONFIG, None, values), folder / "run")
    assert done.metrics["test.f1.absent"]["value"] == 1
    return done.path


def write_notes(folder, notes):
    rows = ["note_id,patient_id,institution"]
    folder.mkdir(exist_ok=True)
    for note_id, patient, text in notes:
        (folder / f"{note_id}.txt").write_text(text, encoding="utf-8")
        rows.append(f"{note_id},{patient},A")
    (folder / "notes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def export(tmp_path):
    return write_notes(tmp_path / "export", NOTES)


@pytest.fixture
def options(run, tmp_path):
    (tmp_path / "small.csv").write_text(VOCABULARY, "utf-8")
    return {"format": "text", "terminology": str(tmp_path / "small.csv"), "shard_notes": 2, "assertion": str(run)}


def mentions(output):
    rows = pq.read_table(output / "mentions").to_pylist()
    return {(row["note_id"], row["start"]): row for row in rows}


def test_the_classifier_corrects_the_rules(export, options, tmp_path, capfd):
    result = extract(export, output=tmp_path / "out", **options)
    assert result.rejected == 0
    found = mentions(tmp_path / "out")
    rules = extract(export, output=tmp_path / "rules", **options | {"assertion": None})
    before = mentions(tmp_path / "rules")
    assert found.keys() == before.keys()
    assert result.mentions == rules.mentions == 9
    changed = {key for key in found if found[key]["presence"] != before[key]["presence"]}
    assert changed == {("n1", 6), ("n2", NOTES[1][2].index("cough")), ("n3", 26), ("n6", 6)}
    for key in found:
        if key in changed:
            assert (before[key]["presence"], found[key]["presence"]) == ("present", "absent")
            assert found[key]["cues"] == []
        else:
            assert found[key] == before[key]
    assert found["n1", 16]["cues"] == [{"value": "absent", "start": 13, "end": 15}]
    assert found["n3", 11]["experiencer"] == "family"  # an axis that was not learned
    assert found["n5", 9]["presence"] == "uncertain"  # a value that was not learned
    state = {
        (r["patient_id"], r["concept_id"]): r["state"] for r in pq.read_table(tmp_path / "out/patients").to_pylist()
    }
    assert state["1", "T:1"] == "excluded"
    assert MARKER not in "".join(capfd.readouterr())


def test_workers_and_spark_give_the_same_bytes(export, options, tmp_path):
    extract(export, output=tmp_path / "one", **options)
    extract(export, output=tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    larger = extract(export, output=tmp_path / "larger", **options | {"shard_notes": 6})
    assert larger.shards == 1
    assert mentions(tmp_path / "larger") == mentions(tmp_path / "one")
    pytest.importorskip("pyspark")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("needs Java")
    extract(export, output=tmp_path / "spark", engine="spark", **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "spark")


KILL = """
import json, os, signal, sys
from clinical_nlp.extraction import extract
export, output, options = sys.argv[1:]
replace = os.replace
def replacing(source, target):
    replace(source, target)
    if str(target).endswith("000000.json"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replacing
extract(export, output=output, **json.loads(options))
"""


def test_killed_and_resumed_it_is_the_same_bytes(export, options, tmp_path):
    words = [str(export), str(tmp_path / "out"), json.dumps(options)]
    done = subprocess.run([sys.executable, "-c", KILL, *words], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    result = extract(export, output=tmp_path / "out", resume=True, **options)
    assert (result.shards_reused, result.shards) == (1, 3)
    extract(export, output=tmp_path / "whole", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_updated_output_equals_a_fresh_one(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    shutil.rmtree(export)
    write_notes(export, [*NOTES[:3], ("n4", "4", "Zilch fever, zilch cough."), ("n7", "5", "He has fever.")])
    extract(export, output=tmp_path / "out", update=True, **options)
    extract(export, output=tmp_path / "fresh", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_another_classifier_resumes_nothing(export, options, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    options = options | {"assertion": str(copy)}
    extract(export, output=tmp_path / "out", **options)
    told = json.loads((copy / "task.json").read_text())
    (copy / "task.json").write_text(json.dumps(told | {"thresholds": [0.123]}))
    with pytest.raises(RunError, match="the model of --assertion changed"):
        extract(export, output=tmp_path / "out", resume=True, **options)


def test_a_note_that_it_fails_on_costs_only_itself(export, options, tmp_path, monkeypatch, capfd):
    from clinical_nlp.tasks.asserting import AssertionClassifier

    predict = AssertionClassifier.predict

    def failing(self, texts, spans, rules):
        if any(MARKER in text for text in texts):
            raise RuntimeError(texts)
        return predict(self, texts, spans, rules)

    extract(export, output=tmp_path / "whole", **options)
    monkeypatch.setattr(AssertionClassifier, "predict", failing)
    result = extract(export, output=tmp_path / "out", **options)
    assert result.rejected_by_reason == {"RuntimeError": 1}
    whole = mentions(tmp_path / "whole")
    assert mentions(tmp_path / "out") == {key: row for key, row in whole.items() if key[0] != "n2"}
    assert MARKER not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["nothing there", "half-written", "another task", "damaged", "in part", "no head"])
def test_what_is_no_classifier_is_refused_in_one_line(kind, export, options, run, tmp_path, capsys):
    folder = tmp_path / "run"
    if kind != "nothing there":
        shutil.copytree(run, folder)
    if kind == "half-written":
        (folder / "manifest.json").unlink()
    if kind == "another task":
        (folder / "task.json").write_text(json.dumps({"task": "ner"}))
    if kind == "damaged":
        (folder / "task.json").write_text("{")
    if kind == "in part":
        (folder / "task.json").write_text(json.dumps({"task": "assertion"}))
    if kind == "no head":
        (folder / "head.safetensors").unlink()
    words = ["extract", str(export), "--format", "text", "--terminology", options["terminology"]]
    code = cli.main([*words, "--assertion", str(folder), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err.strip()
    assert code == UsageError.exit_code == 2
    assert len(told.splitlines()) == 1
    assert f"--assertion {folder}" in told
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(export, options, run, tmp_path, capsys):
    words = ["extract", str(export), "--format", "text", "--terminology", options["terminology"]]
    code = cli.main([*words, "--assertion", str(run), "--output", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    extract(export, output=tmp_path / "python", **options | {"shard_notes": 500})
    assert mentions(tmp_path / "out") == mentions(tmp_path / "python")
