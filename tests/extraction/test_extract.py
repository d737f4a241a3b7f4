"""Extraction as a whole: everything accounted for, the same bytes for any number of workers, clear errors."""

import errno
import json
import os
import subprocess
import sys
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COPIED, MARKER, NOTES, poison_processes, tree, write_export
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.errors import ConfigError, InputError, MissingDataError, RunError, UsageError
from clinical_nlp.extraction import extract, outputs, shards
from clinical_nlp.extraction.plan import ExtractionConfig, cut
from clinical_nlp.extraction.shards import DIED
from clinical_nlp.language.mentions import Annotator
from clinical_nlp.notes.schema import Note, Rejected, Skipped
from clinical_nlp.notes.writers.note_nlp import NOTE_NLP_SCHEMA
from clinical_nlp.notes.writers.table import MENTION_SCHEMA
from clinical_nlp.runs import Run

TEXTS = {note[0]: note[-1] for note in NOTES}


def rows(output, folder):
    return pq.read_table(output / folder).to_pylist()


def states(output):
    return {
        (row["patient_id"], *row["institutions"], row["concept_id"]): row["state"] for row in rows(output, "patients")
    }


def test_every_record_is_in_exactly_one_place(export, options, tmp_path):
    result = extract(export, output=tmp_path / "out", **options)
    assert (result.records, result.done, result.skipped, result.rejected) == (14, 11, 1, 2)
    assert result.skipped_by_rule == {"language:de": 1}
    notes = rows(tmp_path / "out", "notes")
    assert [row["number"] for row in notes] == list(range(14))
    outcomes = {row["note_id"]: row["outcome"] for row in notes}
    assert outcomes["a6"] == "skipped"
    assert outcomes["b6"] == outcomes["b7"] == "rejected"
    assert outcomes["b3"] == "done"  # Nothing was found in it, and it was looked at.
    assert {row["note_id"] for row in rows(tmp_path / "out", "rejected")} == {"b6", "b7"}
    assert "14 notes = 11 done + 1 skipped + 2 rejected" in str(result)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["extraction"]["records"] == 14
    assert manifest["outputs_contain_phi"] is True
    assert not (tmp_path / "out" / ".work").exists()


def test_mentions_and_note_nlp(export, options, tmp_path):
    extract(export, output=tmp_path / "out", processed_on="2026-01-02", **options)
    mentions = pq.read_table(tmp_path / "out" / "mentions")
    assert mentions.schema.equals(MENTION_SCHEMA)
    for row in mentions.to_pylist():
        assert TEXTS[row["note_id"]][row["start"] : row["end"]] == row["text"]
    nlp = pq.read_table(tmp_path / "out" / "note_nlp")
    assert nlp.schema.equals(NOTE_NLP_SCHEMA)
    assert nlp["note_nlp_id"].to_pylist() == list(range(1, len(mentions) + 1))
    ids = {row["omop_note_id"]: row["note_id"] for row in rows(tmp_path / "out", "note_id_map.parquet")}
    assert sorted(ids) == list(range(1, 12))
    for mention, row in zip(mentions.to_pylist(), nlp.to_pylist(), strict=True):
        assert ids[row["note_id"]] == mention["note_id"]
        assert int(row["offset"]) == mention["start"]
        assert row["nlp_date"] == date(2026, 1, 2)


def test_omop_concepts_from_athena(export, options, tmp_path, capsys):
    athena = tmp_path / "athena"
    athena.mkdir()
    (athena / "CONCEPT.csv").write_text(
        "concept_id\tconcept_name\tdomain_id\tvocabulary_id\tconcept_class_id\tstandard_concept\tconcept_code\t"
        "valid_start_date\tvalid_end_date\tinvalid_reason\n"
        "1790001\tFever\tObservation\tHPO\tClass\t\tHP_0001945\t20081117\t20991231\t\n"
        "1790002\tCough\tObservation\tHPO\tClass\t\tHP_0012735\t20081117\t20991231\t\n"
        "437663\tFever\tCondition\tSNOMED\tDisorder\tS\t386661006\t20020131\t20991231\t\n"
    )
    (athena / "CONCEPT_RELATIONSHIP.csv").write_text(
        "concept_id_1\tconcept_id_2\trelationship_id\tvalid_start_date\tvalid_end_date\tinvalid_reason\n"
        "1790001\t437663\tMaps to\t20260201\t20991231\t\n"
    )
    extract(export, output=tmp_path / "out", vocabulary=athena, **options)
    assert "of 8 concepts of hpo, 2 are OMOP concepts and 1 have one standard concept" in capsys.readouterr().err
    mapped = {
        row["lexical_variant"].lower(): (row["note_nlp_concept_id"], row["note_nlp_source_concept_id"])
        for row in rows(tmp_path / "out", "note_nlp")
    }
    assert mapped == {"fever": (437663, 1790001), "cough": (0, 1790002), "seizure": (0, 0), "cleft palate": (0, 0)}
    short = ExtractionConfig(source="x", format="text", terminology=f"athena:{athena}")
    assert (short.terminology, short.vocabulary) == ("hpo", str(athena))
    for wrong in ({"terminology": "athena:"}, {"terminology": f"athena:{athena}", "vocabulary": "other.csv"}):
        with pytest.raises(ConfigError, match="give one of them"):
            extract(export, output=tmp_path / "no", **{**options, **wrong})
    (athena / "CONCEPT.csv").write_text("concept_id\n")
    with pytest.raises(RunError, match="the vocabulary changed"):
        extract(export, output=tmp_path / "out", vocabulary=athena, resume=True, **options)
    with pytest.raises(UsageError, match="no column vocabulary_id"):
        extract(export, output=tmp_path / "no", vocabulary=athena, **options)
    assert not (tmp_path / "no").exists()


def test_integer_note_ids_stay_what_they_are(tmp_path, options):
    (tmp_path / "export").mkdir()
    for number in (900, 17):
        (tmp_path / "export" / f"{number}.txt").write_text("Fever.")
    extract(tmp_path / "export", output=tmp_path / "out", **options)
    ids = {row["note_id"]: row["omop_note_id"] for row in rows(tmp_path / "out", "note_id_map.parquet")}
    assert ids == {"900": 900, "17": 17}


def test_patients_and_phenopackets(export, options, tmp_path):
    from google.protobuf.json_format import Parse
    from phenopackets import Phenopacket, Sex

    extract(export, output=tmp_path / "out", **options)
    found = states(tmp_path / "out")
    assert found["1", "A", "HP:0001945"] == "present"  # Resolved, not a conflict.
    assert found["1", "A", "HP:0001250"] == "uncertain"
    assert found["1", "B", "HP:0001250"] == "excluded"  # Another person: ids of a hand-made table are local.
    assert found["1", "B", "HP:0001945"] == "family_only"
    assert found["2", "A", "HP:0000175"] == "conflicting"
    assert found["5", "B", "HP:0001250"] == "present"
    packets = {}
    for path in (tmp_path / "out" / "phenopackets").iterdir():
        packet = Parse(path.read_bytes(), Phenopacket())
        packets[packet.id] = packet
    assert set(packets) == {"A/1", "A/2", "A/3", "B/1", "B/4 / ü", "B/5"}
    assert {f.type.id: f.excluded for f in packets["A/1"].phenotypic_features} == {
        "HP:0001945": False,
        "HP:0012735": False,
    }
    assert {f.type.id: f.excluded for f in packets["A/2"].phenotypic_features} == {"HP:0001945": True}
    assert {f.type.id: f.excluded for f in packets["B/1"].phenotypic_features} == {
        "HP:0001250": True,
        "HP:0012735": False,
    }
    assert packets["A/2"].subject.sex == Sex.FEMALE
    assert packets["A/1"].subject.sex == packets["B/1"].subject.sex == Sex.UNKNOWN_SEX  # Whose sex is not known.
    assert packets["A/1"].meta_data.created.ToJsonString() == "2020-02-01T00:00:00Z"
    (fever,) = [f for f in packets["A/1"].phenotypic_features if f.type.id == "HP:0001945"]
    assert [item.reference.id for item in fever.evidence] == ["a1", "a2"]


def test_how_a_trait_is_inherited_is_no_finding_of_the_patient(tmp_path):
    (tmp_path / "notes.csv").write_text(
        "note_id,patient_id,institution,text\n"
        "n,p,h,Autosomal dominant inheritance. Childhood onset seizures. No fever.\n"
    )
    extract(tmp_path / "notes.csv", output=tmp_path / "out", format="table", terminology="hpo_wide")
    inheritance, onset, seizure, fever = "HP:0000006", "HP:0011463", "HP:0001250", "HP:0001945"
    assert {row["concept_id"] for row in rows(tmp_path / "out", "patients")} == {inheritance, onset, seizure, fever}
    (packet,) = (tmp_path / "out" / "phenopackets").iterdir()
    features = json.loads(packet.read_bytes())["phenotypicFeatures"]
    assert {feature["type"]["id"] for feature in features} == {seizure, fever}
    conditions = (tmp_path / "out" / "fhir" / "Condition.ndjson").read_text()
    assert {id_ for id_ in (inheritance, onset, seizure) if id_ in conditions} == {seizure}


@pytest.mark.parametrize("workers", [1, 2])
def test_measured_values_on_request(tmp_path, workers):
    (tmp_path / "notes.csv").write_text(
        "note_id,patient_id,institution,text\n"
        "n1,p,h,A 54-year-old man. Na 118 mmol/L on arrival. Goal LVEF > 55 %.\n"
        "n2,q,h,A 54-year-old man. Na 140 mmol/L. No hyponatremia.\n"
    )
    common = {"format": "table", "workers": workers, "shard_notes": 1}
    extract(tmp_path / "notes.csv", output=tmp_path / "plain", **common)
    extract(tmp_path / "notes.csv", output=tmp_path / "out", measurements=True, **common)
    assert "measurement" not in {row["lane"] for row in rows(tmp_path / "plain", "mentions")}
    (found,) = [row for row in rows(tmp_path / "out", "mentions") if row["lane"] == "measurement"]
    assert (found["note_id"], found["concept_id"], found["presence"]) == ("n1", "HP:0002902", "present")
    assert "118" in found["text"]
    assert states(tmp_path / "out") == {
        ("p", "h", "HP:0002902"): "present",
        ("q", "h", "HP:0002902"): "excluded",  # said, not measured
    }
    with pytest.raises(UsageError, match="concepts of HPO"):
        extract(tmp_path / "notes.csv", output=tmp_path / "icd", terminology="icd10cm", measurements=True, **common)
    assert not (tmp_path / "icd").exists()


def test_copied_sentences_point_to_the_first_note(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    copied = {(row["note_id"], row["text"]): row["copied_from"] for row in rows(tmp_path / "out", "mentions")}
    assert copied["a1", "fever"] is None
    assert copied["a2", "fever"] == "a1"
    assert {key: value for key, value in copied.items() if value} == {("a2", "fever"): "a1"}
    assert len(COPIED) > 40


def test_the_earlier_note_is_earlier_by_date(options, tmp_path):
    (tmp_path / "export").mkdir()
    for name in "abc":
        (tmp_path / "export" / f"{name}.txt").write_text(COPIED)
    (tmp_path / "export" / "notes.csv").write_text(
        "note_id,patient_id,written_at\na,1,2020-05-01\nb,1,2020-01-01\nc,2,2019-01-01\n"
    )
    extract(tmp_path / "export", output=tmp_path / "out", **options)
    assert {row["note_id"]: row["copied_from"] for row in rows(tmp_path / "out", "mentions")} == {
        "a": "b",
        "b": None,
        "c": None,
    }


def test_any_number_of_workers_gives_the_same_bytes(export, options, tmp_path):
    for workers in (1, 3):
        extract(export, output=tmp_path / str(workers), workers=workers, propagate=True, **options)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    assert len(list((tmp_path / "1" / "ledger").glob("*.json"))) == 5


@pytest.mark.parametrize("at_once", [1, 2, 200])
def test_patients_that_are_gathered_in_workers_give_the_same_bytes(export, options, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(outputs, "_AT_ONCE", at_once)
    extract(export, output=tmp_path / "1", propagate=True, **options)
    monkeypatch.setattr(outputs, "_FOR_WORKERS", 0)
    extract(export, output=tmp_path / "3", propagate=True, workers=3, **options)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_a_worker_that_dies_while_patients_are_gathered(export, options, tmp_path, monkeypatch):
    extract(export, output=tmp_path / "whole", **options)
    monkeypatch.setattr(outputs, "_FOR_WORKERS", 0)
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "sitecustomize.py").write_text(
        "import os\nfrom clinical_nlp.extraction.gathering import Gatherer\n"
        "Gatherer.gather = lambda self, patients: os.kill(os.getpid(), 9)\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "patched"), prepend=os.pathsep)
        with pytest.raises(RunError, match="a worker process died while patients were gathered"):
            extract(export, output=tmp_path / "out", workers=2, **options)
    extract(export, output=tmp_path / "out", workers=2, resume=True, **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_shard_size_does_not_change_what_is_found(export, options, tmp_path):
    extract(export, output=tmp_path / "a", **options)
    extract(export, output=tmp_path / "b", **{**options, "shard_notes": 1})
    for folder in ("mentions", "note_nlp", "patients", "notes"):
        assert rows(tmp_path / "a", folder) == rows(tmp_path / "b", folder)


def test_a_folder_name_with_signs_of_a_pattern(export, options, tmp_path):
    result = extract(export, output=tmp_path / "o[1]*'?", **options)
    assert result.done == 11
    assert rows(tmp_path / "o[1]*'?", "patients")


@pytest.fixture
def poison(monkeypatch):
    """Make the annotator fail on the marked note, with the note in the message."""
    annotate = Annotator.annotate

    def failing(self, text, extra_spans=()):
        if MARKER in text:
            raise ValueError(text)
        return annotate(self, text, extra_spans)

    monkeypatch.setattr(Annotator, "annotate", failing)


@pytest.mark.usefixtures("poison")
def test_a_note_that_fails_is_rejected_and_its_text_is_nowhere(export, options, tmp_path, capfd):
    result = extract(export, output=tmp_path / "out", **options)
    assert (result.done, result.rejected) == (10, 3)
    assert result.rejected_by_reason["ValueError"] == 1
    (row,) = [row for row in rows(tmp_path / "out", "rejected") if row["note_id"] == "a7"]
    assert row["reason"] == "ValueError"
    assert row["stage"] == "extraction"
    for name, content in tree(tmp_path / "out").items():
        assert MARKER.encode() not in content, name
        if name.endswith(".parquet"):
            assert MARKER not in str(pq.read_table(tmp_path / "out" / name).to_pylist()), name
    assert MARKER not in "".join(capfd.readouterr())


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "print(text, file=sys.stderr); os.abort()"])
def test_a_note_that_kills_its_worker_is_rejected_and_the_rest_go_on(
    export, options, tmp_path, monkeypatch, capfd, how
):
    poison_processes(tmp_path / "patched", monkeypatch, how)
    result = extract(export, output=tmp_path / "out", workers=2, **options)
    assert (result.done, result.rejected) == (10, 3)
    (row,) = [row for row in rows(tmp_path / "out", "rejected") if row["note_id"] == "a7"]
    assert row["reason"] == DIED
    assert {row["note_id"] for row in rows(tmp_path / "out", "notes") if row["outcome"] == "done"} == {
        note[0] for note in NOTES
    } - {"a6", "a7"}
    assert MARKER not in "".join(capfd.readouterr())


def test_with_one_worker_such_a_note_ends_the_batch_once(export, options, tmp_path, monkeypatch):
    extract(export, output=tmp_path / "whole", **options)
    poison_processes(tmp_path / "patched", monkeypatch, "os.kill(os.getpid(), 9)")
    told = json.dumps({**options, "terminology": str(options["terminology"])})
    run = (
        "import json, sys; from clinical_nlp.extraction import extract; "
        "extract(sys.argv[1], output=sys.argv[2], **json.loads(sys.argv[3]))"
    )
    died = subprocess.run([sys.executable, "-c", run, str(export), str(tmp_path / "out"), told], check=False)
    assert died.returncode == -9
    result = extract(export, output=tmp_path / "out", resume=True, **options)
    assert (result.done, result.rejected_by_reason[DIED]) == (10, 1)
    again = extract(export, output=tmp_path / "out", retry_rejected=True, **options)
    assert again.rejected_by_reason[DIED] == 1
    (tmp_path / "patched" / "sitecustomize.py").unlink()
    healed = extract(export, output=tmp_path / "out", retry_rejected=True, **options)
    assert (healed.done, healed.rejected) == (11, 2)
    assert healed.update.added == 1
    assert healed.update.patients_touched == ("A/3",)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert extract(export, output=tmp_path / "out", retry_rejected=True, **options).done == 11
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest


def test_rejected_notes_of_an_interrupted_batch_are_retried(export, options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison_processes(tmp_path / "patched", patch, "os.kill(os.getpid(), 9)")
        patch.setattr(outputs, "write_outputs", lambda *_, **__: (_ for _ in ()).throw(RunError("stopped")))
        with pytest.raises(RunError, match="stopped"):
            extract(export, output=tmp_path / "out", workers=2, **options)
    result = extract(export, output=tmp_path / "out", retry_rejected=True, **options)
    assert (result.done, result.rejected, result.shards - result.shards_reused) == (11, 2, 1)


def interrupted(export, options, output, monkeypatch):
    """Run until the second shard is to be written, and fail there."""
    from clinical_nlp.extraction import shards

    write, count = shards.write_table, 0

    def full(path, table):
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_table", full)
        with pytest.raises(RunError, match=r"no space left .* --resume"):
            extract(export, output=output, **options)


def test_a_full_disk_is_one_clear_line_and_can_be_resumed(export, options, tmp_path, monkeypatch):
    extract(export, output=tmp_path / "whole", **options)
    interrupted(export, options, tmp_path / "out", monkeypatch)
    with pytest.raises(RunError, match="--resume"):
        extract(export, output=tmp_path / "out", **options)
    result = extract(export, output=tmp_path / "out", resume=True, workers=2, **options)
    assert result.shards_reused == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    again = extract(export, output=tmp_path / "out", resume=True, **options)
    assert (again.records, again.mentions, again.shards) == (result.records, result.mentions, result.shards)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(RunError, match="finished"):
        extract(export, output=tmp_path / "out", **options)
    (export / "a2.txt").write_text("Something else.")
    with pytest.raises(RunError, match="the export changed"):
        extract(export, output=tmp_path / "out", resume=True, **options)


def test_a_damaged_shard_is_done_again(export, options, tmp_path, monkeypatch):
    extract(export, output=tmp_path / "whole", **options)
    interrupted(export, options, tmp_path / "out", monkeypatch)
    part = tmp_path / "out" / "notes" / "part-000000.parquet"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    (tmp_path / "out" / "notes" / ".part-000009.parquet.1.tmp").write_bytes(b"left by a crash")
    result = extract(export, output=tmp_path / "out", resume=True, **options)
    assert result.shards_reused == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_resume_refuses_what_is_not_the_same(export, options, tmp_path, monkeypatch):
    interrupted(export, options, tmp_path / "out", monkeypatch)
    with pytest.raises(RunError, match="another config"):
        extract(export, output=tmp_path / "out", resume=True, **{**options, "shard_notes": 5})
    (export / "a2.txt").write_text("Something else.")
    with pytest.raises(RunError, match="the export changed"):
        extract(export, output=tmp_path / "out", resume=True, **options)
    (export / "a2.txt").write_bytes(TEXTS["a2"].encode())
    with open(options["terminology"], "a") as handle:
        handle.write("\n[Term]\nid: HP:0000999\nname: Pyoderma\nis_a: HP:0000118\n")
    with pytest.raises(RunError, match="the terminology changed"):
        extract(export, output=tmp_path / "out", resume=True, **options)


def test_an_output_in_use_is_refused(export, options, tmp_path):
    config = ExtractionConfig(source=str(export), format="text")
    with Run.open(tmp_path / "out", config, recipe="extract"), pytest.raises(RunError, match="in use"):
        extract(export, output=tmp_path / "out", **options)


def test_wrong_usage_leaves_nothing_behind(export, options, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="engine"):
        extract(export, output=out, engine="dask", **options)
    with pytest.raises(ConfigError, match="did you mean 'languages'"):
        extract(export, output=out, langauges=["en"], **options)
    with pytest.raises(MissingDataError):
        extract(tmp_path / "nothing", output=out, **options)
    with pytest.raises(ConfigError, match="source"):  # an unset variable is not the working folder
        extract("", output=out, **options)
    with pytest.raises(UsageError, match="format"):
        extract(export, output=out, **{**options, "format": "fihr"})
    with pytest.raises(MissingDataError):
        extract(export, output=out, vocabulary=tmp_path / "none.csv", **options)
    with pytest.raises(UsageError, match="inside the export"):
        extract(export, output=export / "out", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        extract(tmp_path / "empty", output=out, **options)
    assert not out.exists() or not list(out.iterdir())
    assert extract(export, output=out, **options).done == 11


def test_a_note_that_is_one_sentence_takes_linear_time(options, monkeypatch):
    read = []
    digest = shards._sentence_digest
    monkeypatch.setattr(shards, "_sentence_digest", lambda *given: read.append(given[1]) or digest(*given))
    note = Note("n", "p", "A", text="no fever and seizure " * 500, source="f:1")
    outcome = shards.Extractor(str(options["terminology"]), None).annotate([note])[0]
    assert len(outcome.rows) >= 500
    assert len(read) == len(set(read)) < 500


def test_a_foreign_folder_is_left_alone(export, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        extract(export, output=tmp_path / "out", **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


records = st.one_of(
    st.builds(Note, *[st.text(max_size=3)] * 3, text=st.text(max_size=30), source=st.just("f:1")),
    st.builds(Skipped, st.just("f:1"), st.just("rule")),
    st.builds(Rejected, st.just("f:1"), st.just("reason"), st.text(max_size=3)),
)


@given(st.lists(records, max_size=30), st.integers(1, 7), st.integers(1, 60))
def test_shards_cover_the_records_in_order(stream, shard_notes, shard_characters):
    shards = list(cut(stream, shard_notes=shard_notes, shard_characters=shard_characters))
    flat = [record for shard in shards for record in shard.records]
    assert [record.source for record in flat] == [record.source for record in stream]
    assert [shard.index for shard in shards] == list(range(len(shards)))
    first = 0
    for shard in shards:
        assert shard.first == first
        assert 1 <= len(shard.records) <= shard_notes
        first += len(shard.records)


def test_ids_that_are_not_unicode_are_rejected_not_written():
    (shard,) = cut([Note("n\ud800", "p", "i", "text", "f:1")], shard_notes=5, shard_characters=5)
    (record,) = shard.records
    assert isinstance(record, Rejected)
    pa.array([record.note_id, record.reason]).validate(full=True)


def test_digest_sees_every_change():
    note = Note("n", "p", "i", "text", "f:1")
    digests = set()
    for other in (
        note,
        Note("n", "p", "i", "tex", "f:1"),
        Note("n", "p", "j", "text", "f:1"),
        Note("n", "q", "i", "text", "f:1"),
        Rejected("f:1", "x", "n", "p"),
        Skipped("f:1", "x", "n", "p"),
    ):
        (shard,) = cut([other], shard_notes=1, shard_characters=9)
        digests.add(shard.digest)
    assert len(digests) == 6


def test_the_export_fixture_is_what_the_tests_say(tmp_path):
    assert len(list(write_export(tmp_path / "x").glob("*.txt"))) == 14
