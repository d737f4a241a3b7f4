"""The open corpora, read from small files in their own layouts."""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.notes.corpus import CORPORA, Corpus, corpus_module, load_corpus
from clinical_nlp.notes.schema import CODE_SCHEMA, NOTE_SCHEMA, PAIR_SCHEMA, SPAN_SCHEMA
from clinical_nlp.notes.splitting import split_patients

MARKER = "Zebra-Quagga-77"


def write_csv(file: Path, header: list[str], *rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows([header, *rows])
    content = lines.getvalue().encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def check(corpus: Corpus) -> None:
    """What holds for every corpus: schemas, unique keys, spans that slice, gold that points to notes."""
    assert corpus.notes.schema == NOTE_SCHEMA
    keys = list(zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert set(corpus.parts) <= set(keys)
    assert set(corpus.parts.values()) <= {"train", "development", "test"}
    texts = dict(zip(keys, corpus.notes["text"].to_pylist(), strict=True))
    if corpus.spans is not None:
        assert corpus.spans.schema == SPAN_SCHEMA
        for span in corpus.spans.to_pylist():
            assert texts[span["institution"], span["note_id"]][span["start"] : span["end"]] == span["text"]
    if corpus.codes is not None:
        assert corpus.codes.schema == CODE_SCHEMA
    if corpus.pairs is not None:
        assert corpus.pairs.schema == PAIR_SCHEMA


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "synthetic_hospitals"])
def test_every_card_is_filled_and_missing_data_says_where_to_get_it(name, monkeypatch, tmp_path):
    monkeypatch.delenv("CLINICAL_NLP_DATA", raising=False)
    card = corpus_module(name).CARD
    for field in ("origin", "licence", "citation", "size", "institution_means", "patient_means", "obtain"):
        assert getattr(card, field).strip()
    assert card.name == name
    options = {"format": "text"} if name == "ehr_export" else {}
    with pytest.raises(MissingDataError, match="needs a path"):
        load_corpus(name, **options)
    with pytest.raises(MissingDataError, match="no such file or folder"):
        load_corpus(name, tmp_path / "nowhere", **options)
    if name != "ehr_export":
        with pytest.raises(MissingDataError) as caught:
            load_corpus(name, tmp_path)
        assert card.obtain in str(caught.value)


# mtsamples

MT_HEADER = ["note_id", "description", "medical_specialty", "sample_name", "transcription", "keywords"]


def mt_row(number: int, specialty: str, text: str) -> list[str]:
    return [str(number), "d", specialty, f"sample {number}", text, "k"]


@pytest.mark.parametrize("name", ["mtsamples.csv", "mtsamples.csv.gz"])
def test_mtsamples_keeps_each_text_once_under_its_rarest_specialty(tmp_path, name, capsys):
    rows = [
        mt_row(1, " Surgery", "text one\nline two"),
        mt_row(2, " Surgery", "text two"),
        mt_row(3, " Surgery", "  "),
        mt_row(4, " Urology", "text one\nline two"),
        mt_row(5, " Neurology", "text two"),
        mt_row(6, " Neurology", "text three"),
        mt_row(7, " Neurology", "text three"),
    ]
    write_csv(tmp_path / name, MT_HEADER, *rows)
    corpus = load_corpus("mtsamples", tmp_path)
    check(corpus)
    found = {
        text: (institution, number)
        for text, institution, number in zip(
            *(corpus.notes[column].to_pylist() for column in ("text", "institution", "note_id")), strict=True
        )
    }
    assert found == {
        "text one\nline two": ("Urology", "4"),
        "text two": ("Neurology", "5"),
        "text three": ("Neurology", "6"),
    }
    assert "3 notes; left out of 7 rows: 1 empty, 3 that repeat a text" in corpus.card.size
    assert "3 that repeat a text" in capsys.readouterr().err
    assert len(set(corpus.notes["patient_id"].to_pylist())) == 3
    write_csv(tmp_path / name, MT_HEADER, *rows[::-1])
    again = load_corpus("mtsamples", tmp_path / name)
    assert set(zip(again.notes["text"].to_pylist(), again.notes["institution"].to_pylist(), strict=True)) == {
        (text, institution) for text, (institution, _) in found.items()
    }


def test_mtsamples_reads_the_uploaders_unnamed_index_column(tmp_path):
    write_csv(tmp_path / "mtsamples.csv", ["", *MT_HEADER[1:]], mt_row(0, "Surgery", "a"), mt_row(1, "Surgery", "b"))
    assert load_corpus("mtsamples", tmp_path).notes["note_id"].to_pylist() == ["0", "1"]


def test_mtsamples_damaged_files_are_one_clear_line_without_text(tmp_path):
    file = tmp_path / "mtsamples.csv"
    cases = {
        "no column transcription": "note_id,medical_specialty\n1,Surgery\n",
        "line 2: 2 fields under 6": ",".join(MT_HEADER) + f"\n1,{MARKER}\n",
        "not valid CSV": ",".join(MT_HEADER) + f'\n1,d,S,n,"{MARKER}" tail,k\n',
        "is empty": "",
    }
    for message, content in cases.items():
        file.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            load_corpus("mtsamples", tmp_path)
        assert MARKER not in str(caught.value)
    file.write_bytes((",".join(MT_HEADER) + "\n1,d,S,n,").encode() + MARKER.encode() + b"\xff\xfe,k\n")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        load_corpus("mtsamples", tmp_path)
    assert MARKER not in str(caught.value)
    file.unlink()
    write_csv(tmp_path / "mtsamples.csv.gz", MT_HEADER, *(mt_row(n, "S", f"{n} {MARKER * 50}") for n in range(500)))
    whole = (tmp_path / "mtsamples.csv.gz").read_bytes()
    (tmp_path / "mtsamples.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged") as caught:
        load_corpus("mtsamples", tmp_path)
    assert MARKER not in str(caught.value)


# aci-bench and mts-dialog


def aci_folder(folder: Path) -> None:
    write_csv(
        folder / "challenge_data/train.csv",
        ["dataset", "encounter_id", "dialogue", "note"],
        ["virtassist", "D2N001", "[doctor] hi", "HISTORY\n\nfine"],
        ["aci", "D2N002", "[doctor] well", "PLAN\n\nrest"],
    )
    write_csv(
        folder / "challenge_data/valid.csv",
        ["dataset", "encounter_id", "dialogue", "note"],
        ["aci", "D2N003", "x", "y"],
    )
    write_csv(
        folder / "challenge_data/train_metadata.csv",
        ["dataset", "encounter_id", "id"],
        ["virtassist", "D2N001", "VA049"],
        ["aci", "D2N002", "ACI001"],
    )
    write_csv(
        folder / "src/train_aci_asr.csv",
        ["dataset", "id", "dialogue", "note"],
        ["aci", "ACI001", "wel", "PLAN\n\nrest"],
    )


def test_aci_bench_pairs_dialogue_and_note(tmp_path):
    aci_folder(tmp_path)
    corpus = load_corpus("aci_bench", tmp_path)
    check(corpus)
    assert corpus.parts == {
        ("virtassist", "D2N001"): "train",
        ("aci", "D2N002"): "train",
        ("aci", "D2N003"): "development",
    }
    first = corpus.pairs.to_pylist()[0]
    assert (first["kind"], first["source"], first["target"]) == ("dialogue_note", "[doctor] hi", "HISTORY\n\nfine")
    assert first["part"] == "train"
    assert corpus.notes["patient_id"].to_pylist() == ["D2N001", "D2N002", "D2N003"]


def test_aci_bench_other_transcripts_carry_the_challenge_ids(tmp_path):
    aci_folder(tmp_path)
    corpus = load_corpus("aci_bench", tmp_path, transcripts="asr")
    check(corpus)
    assert corpus.notes["note_id"].to_pylist() == ["D2N002"]
    assert corpus.pairs["source"].to_pylist() == ["wel"]


def test_aci_bench_uses_the_chosen_test_set(tmp_path):
    aci_folder(tmp_path)
    for number in (1, 2):
        write_csv(
            tmp_path / f"challenge_data/clinicalnlp_task_test{number}.csv",
            ["dataset", "encounter_id", "dialogue", "note"],
            ["aci", f"D2N10{number}", "d", "n"],
        )
    assert load_corpus("aci_bench", tmp_path).parts["aci", "D2N101"] == "test"
    assert ("aci", "D2N101") not in load_corpus("aci_bench", tmp_path, test_set=2).parts


def test_corpus_options_are_checked(tmp_path):
    aci_folder(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'asrcorr'"):
        load_corpus("aci_bench", tmp_path, transcripts="asrcor")
    with pytest.raises(UsageError, match="test_set"):
        load_corpus("aci_bench", tmp_path, test_set=4)
    with pytest.raises(UsageError, match="test_set"):
        load_corpus("mts_dialog", tmp_path, test_set=3)
    for option in ({"patients": "many"}, {"patients": 2.5}, {"patients": True}, {"label": "high"}, {"bank": 3}):
        (name,) = option
        with pytest.raises(UsageError, match=f"option '{name}' is (a|text)"):
            load_corpus("synthetic_hospitals", **option)
    assert len(load_corpus("synthetic_hospitals", patients=np.int64(1), institutions=1, covariate=1).notes)


def test_mts_dialog_sections_keep_their_header_and_equal_dialogues_are_one_patient(tmp_path):
    header = ["ID", "section_header", "section_text", "dialogue"]
    write_csv(
        tmp_path / "MTS-Dialog-TrainingSet.csv",
        header,
        ["0", "GENHX", "He is well.", "same words"],
        ["1", "ROS", "No fever.", "same words"],
        ["2", "CC", "Pain.", "other words"],
    )
    write_csv(tmp_path / "MTS-Dialog-ValidationSet.csv", header, ["0", "PLAN", "Rest.", "same words"])
    corpus = load_corpus("mts_dialog", tmp_path)
    check(corpus)
    assert corpus.notes["note_type"].to_pylist() == ["GENHX", "ROS", "CC", "PLAN"]
    assert corpus.notes["patient_id"].to_pylist() == ["train-0", "train-0", "train-2", "development-0"]
    assert set(corpus.pairs["kind"].to_pylist()) == {"dialogue_section"}
    assert corpus.pairs["part"].to_pylist() == ["train"] * 3 + ["development"]
    split = split_patients(corpus.notes, SplitConfig(development=0), seed=0, parts=corpus.parts)
    assert split.reported_part == "development"
    write_csv(tmp_path / "MTS-Dialog-TrainingSet.csv", header, ["0", "CC", MARKER, "a"], ["0", "CC", MARKER, "b"])
    with pytest.raises(InputError, match="line 3: id 0 is there twice") as caught:
        load_corpus("mts_dialog", tmp_path)
    assert MARKER not in str(caught.value)


# codiesp

DOCUMENTS = ("S0004-06142005000500011-1", "S1130-0108200800080001X-12", "S1130-01082008000800012-2")


def codiesp_folder(folder: Path) -> None:
    for name, part in zip(DOCUMENTS[::2], ("train", "dev"), strict=True):
        write(folder / part / "text_files_en" / f"{name}.txt", f"Case of {part}.\r\n")
        write(folder / part / f"{part}D.tsv", f"{name}\tn44.8\n{name}\tz20.818\n{name}\tn44.8\n")
        write(folder / part / f"{part}P.tsv", f"{name}\tbw03zzz\n")
        write(folder / part / f"{part}X.tsv", f"{name}\tDIAGNOSTICO\tn44.8\t{MARKER}\t1 2\n")


def test_codiesp_codes_are_of_the_case_and_its_journal(tmp_path):
    codiesp_folder(tmp_path)
    corpus = load_corpus("codiesp", tmp_path)
    check(corpus)
    assert corpus.notes["institution"].to_pylist() == ["0004-0614", "1130-0108"]
    assert corpus.notes["text"].to_pylist()[0] == "Case of train.\r\n"
    assert corpus.spans is None
    codes = [(row["note_id"], row["code"], row["system"]) for row in corpus.codes.to_pylist()]
    assert codes[:3] == [
        (DOCUMENTS[0], "N44.8", "ICD-10-CM"),
        (DOCUMENTS[0], "Z20.818", "ICD-10-CM"),
        (DOCUMENTS[0], "BW03ZZZ", "ICD-10-PCS"),
    ]
    assert "left out: 2 repeated code rows" in corpus.card.size
    assert list(corpus.parts.values()) == ["train", "development"]


def test_codiesp_reads_the_released_folder_and_single_parts(tmp_path):
    codiesp_folder(tmp_path / "final_dataset_v4_to_publish")
    assert len(load_corpus("codiesp", tmp_path).notes) == 2
    codiesp_folder(tmp_path / "one")
    shutil.rmtree(tmp_path / "one/dev/text_files_en")
    with pytest.raises(MissingDataError, match=r"dev has code tables and no text_files_en"):
        load_corpus("codiesp", tmp_path / "one")
    shutil.rmtree(tmp_path / "one/dev")
    assert set(load_corpus("codiesp", tmp_path / "one").parts.values()) == {"train"}


def test_codiesp_faults_are_named_by_place(tmp_path):
    codiesp_folder(tmp_path)
    table = tmp_path / "train/trainD.tsv"
    good = table.read_text()
    for message, content in {
        "trainD.tsv, line 4: expected": good + f"{MARKER} no tab\n",
        "trainD.tsv, line 4: its document": good + "S0004-06142005000500099-1\tn1\n",
    }.items():
        table.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            load_corpus("codiesp", tmp_path)
        assert MARKER not in str(caught.value)
    table.unlink()
    with pytest.raises(MissingDataError, match=r"trainD\.tsv is missing"):
        load_corpus("codiesp", tmp_path)
    table.write_text(good)
    write(tmp_path / "train/text_files_en/readme.txt", "x")
    with pytest.raises(InputError, match="document id"):
        load_corpus("codiesp", tmp_path)


# the IOB corpora

SENTENCE = "Familial\tO\nadenomatous\tB-Disease\npolyposis\tI-Disease\n.\tO\n\n"


@pytest.mark.parametrize("name", ["ncbi_disease", "bc5cdr"])
def test_iob_corpora_rebuild_text_with_offsets(tmp_path, name):
    write(tmp_path / "train.tsv", SENTENCE * 45)
    write(tmp_path / "devel.tsv", SENTENCE * 3 + "Aspirin\tB-Chemical\nheadache\tB-Disease\n")
    corpus = load_corpus(name, tmp_path)
    check(corpus)
    assert len(corpus.notes) == 49
    assert corpus.spans["text"].to_pylist()[0] == "adenomatous polyposis"
    assert corpus.spans["text"].to_pylist()[-2:] == ["Aspirin", "headache"]
    assert corpus.spans["label"].to_pylist()[-2:] == ["Chemical", "Disease"]
    assert len(pc.unique(corpus.notes["patient_id"])) == 4  # blocks of 20, 20, 5 sentences, and 4
    split = split_patients(corpus.notes, SplitConfig(), seed=0, parts=corpus.parts)
    assert (len(split.test), split.reported_part) == (4, "development")


def test_iob_corpus_with_a_users_own_test_file(tmp_path):
    for name in ("train", "devel", "test"):
        write(tmp_path / f"{name}.tsv", SENTENCE * 2)
    corpus = load_corpus("ncbi_disease", tmp_path)
    split = split_patients(corpus.notes, SplitConfig(), seed=0, parts=corpus.parts)
    assert (len(split.train), len(split.development), len(split.test)) == (2, 2, 2)
    assert split.reported_part == "test"


def test_iob_corpus_with_document_marks_takes_the_abstract_as_unit(tmp_path):
    write(tmp_path / "train.tsv", ("-DOCSTART-\tO\n\n" + SENTENCE * 3) * 2)
    corpus = load_corpus("ncbi_disease", tmp_path)
    check(corpus)
    assert len(corpus.notes) == len(pc.unique(corpus.notes["patient_id"])) == 2
    assert len(corpus.spans) == 6


def test_iob_corpus_with_a_bad_line_is_refused_by_place(tmp_path):
    write(tmp_path / "train.tsv", SENTENCE + f"{MARKER}\n")
    with pytest.raises(InputError, match=r"train\.tsv:6") as caught:
        load_corpus("ncbi_disease", tmp_path)
    assert MARKER not in str(caught.value)


def test_loading_twice_gives_the_same_bytes(tmp_path):
    aci_folder(tmp_path)
    tables = [load_corpus("aci_bench", tmp_path).notes for _ in range(2)]
    assert tables[0].equals(tables[1])
    assert isinstance(tables[0], pa.Table)
