"""`extract --verify`: the whole batch with a verifier, its counts, and that it stays the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from answering_models import write_answering
from conftest import MARKER, tree

from clinical_nlp import cli
from clinical_nlp.errors import RunError
from clinical_nlp.extraction import extract
from clinical_nlp.language.mentions import Annotator
from clinical_nlp.language.terminology.homonyms import Homonyms
from clinical_nlp.tasks.verifying import VERDICTS, WHYS, prompt, questions, turned

VOCABULARY = """id,label,synonyms,parents
T:0,Disorder,,
T:1,Atrial septal defect,ASD,T:0
T:2,Autism spectrum disorder,ASD,T:0
T:3,Fever,,T:0
"""
NOTES = [
    # note, patient, text, option that the model names for its ASD in either order (a number: always that one)
    ("n1", "1", "The echo shows an ASD. No fever.", "Atrial septal defect"),
    ("n2", "2", "ASD, speaks little.", "Autism spectrum disorder"),
    ("n3", "3", f"The ASD form was sent to {MARKER}.", "none of these"),
    ("n4", "4", "ASD. Fever.", 1),
    ("n5", "4", "Nothing to report.", None),
    ("n6", "1", "Atrial septal defect (ASD). Known ASD.", None),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.csv"
    path.write_text(VOCABULARY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(vocabulary, tmp_path_factory):
    annotator = Annotator(vocabulary)
    prompts, answers = [], []
    for _, _, text, option in NOTES:
        mentions = annotator.annotate(text)
        found = questions(text, mentions, annotator.match(text), Homonyms(annotator.terminology), lambda _: ())
        assert len(found) == (option is not None)
        for place, question in found.items():
            labels = [*map(annotator.terminology.label, question.candidates), "none of these"]
            for options in (labels, [labels[k] for k in turned(len(labels))]):
                prompts.append(prompt(text, mentions[place], options))
                answers.append(option if isinstance(option, int) else options.index(option) + 1)
    return write_answering(tmp_path_factory.mktemp("taught"), prompts, answers)


def write_notes(folder, notes):
    rows = ["note_id,patient_id,institution"]
    folder.mkdir(exist_ok=True)
    for note_id, patient, text, *_ in notes:
        (folder / f"{note_id}.txt").write_text(text, encoding="utf-8")
        rows.append(f"{note_id},{patient},A")
    (folder / "notes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def export(tmp_path):
    return write_notes(tmp_path / "export", NOTES)


@pytest.fixture
def options(vocabulary, model):
    return {"format": "text", "terminology": str(vocabulary), "shard_notes": 2, "verify": str(model)}


def test_verdicts_in_the_output(export, options, tmp_path, capfd):
    result = extract(export, output=tmp_path / "out", **options)
    assert result.rejected == 0
    assert dict(result.verified) == {
        **dict.fromkeys((*WHYS, *VERDICTS), 0),
        "asked": 4,
        "ambiguous": 4,
        **dict.fromkeys(("kept", "changed", "none", "undecided"), 1),
    }
    assert (
        "verified: 4 mentions asked about, 4 ambiguous: 1 kept, 1 changed, 1 none (concept withdrawn), "
        "1 undecided (left as it was)"
    ) in str(result).splitlines()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"] == result.verified
    again = extract(export, output=tmp_path / "out", resume=True, **options)  # read from the manifest
    assert again.verified == result.verified
    assert str(again) == str(result)
    rows = pq.read_table(tmp_path / "out" / "mentions").to_pylist()
    found = {(r["note_id"], r["text"]): (r["concept_id"], r["verified"] and r["verified"]["verdict"]) for r in rows}
    assert found == {
        ("n1", "ASD"): ("T:1", "kept"),
        ("n1", "fever"): ("T:3", None),
        ("n2", "ASD"): ("T:2", "changed"),
        ("n3", "ASD"): (None, "none"),
        ("n4", "ASD"): ("T:1", "undecided"),
        ("n4", "Fever"): ("T:3", None),
        ("n6", "Atrial septal defect"): ("T:1", None),
        ("n6", "ASD"): ("T:1", None),
    }
    asked = [row["verified"] for row in rows if row["verified"] is not None]
    assert all(told["candidates"] == ["T:1", "T:2"] and told["why"] == "ambiguous" for told in asked)
    patients = pq.read_table(tmp_path / "out" / "patients").to_pylist()
    present = {(row["patient_id"], row["concept_id"]) for row in patients if row["state"] == "present"}
    assert present == {("1", "T:1"), ("2", "T:2"), ("4", "T:1"), ("4", "T:3")}
    # Without the verifier: the same mentions at the same places, of the same lanes.
    plain = extract(export, output=tmp_path / "plain", **options | {"verify": None})
    assert plain.verified == {}
    assert "verified" not in str(plain)
    judged = ("concept_id", "concept_label", "score", "verified")
    before = pq.read_table(tmp_path / "plain" / "mentions").to_pylist()
    assert [{k: v for k, v in row.items() if k not in judged} for row in rows] == [
        {k: v for k, v in row.items() if k not in judged} for row in before
    ]
    unasked = [row["verified"] is None or row["verified"]["verdict"] in ("kept", "undecided") for row in rows]
    assert [r for r, same in zip(before, unasked, strict=True) if same] == [
        r | {"verified": None} for r, same in zip(rows, unasked, strict=True) if same
    ]
    assert MARKER not in "".join(capfd.readouterr())


def test_workers_and_spark_give_the_same_bytes(export, options, tmp_path):
    extract(export, output=tmp_path / "one", **options)
    extract(export, output=tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    pytest.importorskip("pyspark")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("needs Java")
    extract(export, output=tmp_path / "spark", engine="spark", **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "spark")


KILL = """
import json, os, signal, sys
from clinical_nlp.extraction import extract
export, output, options, moment, shard = sys.argv[1:]
replace, name = os.replace, f"{int(shard):06d}.json"
def replacing(source, target):
    if moment == "before" and str(target).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if moment == "after" and str(target).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replacing
extract(export, output=output, **json.loads(options))
"""


@pytest.mark.parametrize(("moment", "shard", "committed"), [("after", 0, 1), ("before", 2, 2)])
def test_killed_and_resumed_it_is_the_same_bytes(export, options, tmp_path, moment, shard, committed):
    words = [export, tmp_path / "out", json.dumps(options), moment, shard]
    done = subprocess.run([sys.executable, "-c", KILL, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    result = extract(export, output=tmp_path / "out", resume=True, **options)
    assert (result.shards_reused, result.shards) == (committed, 3)
    assert result.verified["asked"] == 4
    extract(export, output=tmp_path / "whole", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_updated_output_equals_a_fresh_one(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    changed = [*NOTES[:3], ("n4", "4", "The echo shows an ASD.", ""), ("n7", "5", "Fever.", "")]
    shutil.rmtree(export)
    write_notes(export, changed)
    result = extract(export, output=tmp_path / "out", update=True, **options)
    fresh = extract(export, output=tmp_path / "fresh", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert dict(result.verified) == dict(fresh.verified)
    assert result.verified["asked"] == 4
    assert result.verified["kept"] == 2


def test_a_changed_verifier_resumes_nothing(export, options, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    options = options | {"verify": str(copy)}
    extract(export, output=tmp_path / "out", **options)
    write_answering(copy)
    with pytest.raises(RunError, match="the model of --verify changed"):
        extract(export, output=tmp_path / "out", resume=True, **options)


def test_a_dapt_run_verifies(export, options, tmp_path, capsys):
    corpus = ["--corpus.name=synthetic_hospitals", "--corpus.options.institutions=2", "--corpus.options.patients=12"]
    run = tmp_path / "dapt"
    words = ["run", "dapt", *corpus, "--base_model", "builtin:tiny", "--max_steps", "1", "--output", str(run)]
    assert cli.main(words) == 0, capsys.readouterr().err
    words = ["extract", str(export), "--format", "text", "--terminology", options["terminology"]]
    code = cli.main([*words, "--verify", str(run), "--output", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "verified: 4 mentions asked about" in told.out
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["verify"]
