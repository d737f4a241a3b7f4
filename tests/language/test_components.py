import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import spacy
from spacy.language import Language
from spacy.tokens import Span

import clinical_nlp.language.components  # noqa: F401
from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.language.sentences import find_sentences

PIPES = ("clinical_sections", "clinical_sentences", "clinical_phenotypes", "clinical_assertion")
TEXT = "HPI:\nNo fever. Dr. Smith saw seizures.\n\nFAMILY HISTORY:\ncleft palate\n"


def pipeline(*names):
    nlp = spacy.blank("en")
    for name in names:
        nlp.add_pipe(name)
    return nlp


def test_whole_pipeline():
    nlp = pipeline(*PIPES)
    docs = list(nlp.pipe([TEXT, "", "Fever."]))
    doc = docs[0]
    assert doc.text == TEXT
    assert [(e.text, e.label_, e.kb_id_, e._.concept_id) for e in doc.ents] == [
        ("fever", "phenotype", "HP:0001945", "HP:0001945"),
        ("seizures", "phenotype", "HP:0001250", "HP:0001250"),
        ("cleft palate", "phenotype", "HP:0000175", "HP:0000175"),
    ]
    assert [e._.assertion.presence for e in doc.ents] == ["absent", "present", "present"]
    assert [e._.assertion.experiencer for e in doc.ents] == ["patient", "patient", "family"]
    assert [e._.section for e in doc.ents] == ["history_of_present_illness"] * 2 + ["family_history"]
    assert [s.text for s in doc.spans["phenotypes"]] == ["fever", "seizures", "cleft palate"]
    assert len(doc._.sections) == 2
    assert [s.text.strip() for s in doc.sents] == [TEXT[a:b] for a, b in find_sentences(TEXT)]
    assert list(docs[1].sents) == []


def test_assertion_in_someone_elses_pipeline():
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PROBLEM", "pattern": "zebra gait"}])
    nlp.add_pipe("clinical_assertion")
    doc = nlp("No zebra gait.")
    assert doc.ents[0]._.assertion == assert_spans(doc.text, [(3, 13)])[0]


def test_entities_of_others_stay():
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PROBLEM", "pattern": "high fever"}])
    nlp.add_pipe("clinical_phenotypes")
    doc = nlp("high fever and seizures")
    assert [(e.text, e.label_) for e in doc.ents] == [("high fever", "PROBLEM"), ("seizures", "phenotype")]


def test_own_terminology(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("id,label\nZ:1,zebra gait\n")
    nlp = spacy.blank("en")
    nlp.add_pipe("clinical_phenotypes", config={"terminology": str(path), "set_ents": False})
    doc = nlp("A zebra gait.")
    assert doc.ents == ()
    assert [s._.concept_id for s in doc.spans["phenotypes"]] == ["Z:1"]
    assert isinstance(doc.spans["phenotypes"][0], Span)


@pytest.mark.parametrize(
    "text", ["No zebra gait\u2019s, m\u00fcde \U0001f600 fever.", "fever\n\n\tno  fever ", "\u0130 no fever"]
)
def test_places_are_those_of_the_text(text):
    """Cues and sections are given in code points of the doc's text, whatever stands before them."""
    nlp = spacy.blank("en")
    nlp.add_pipe("clinical_sections")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "PROBLEM", "pattern": "fever"}])
    nlp.add_pipe("clinical_assertion")
    doc = nlp(text)
    assert doc.text == text
    assert doc.ents
    for entity in doc.ents:
        assert text[entity.start_char : entity.end_char] == "fever"
        for value, start, end in entity._.assertion.cues:
            assert (value, text[start:end].lower()) == ("absent", "no")
    assert any(entity._.assertion.presence == "absent" for entity in doc.ents)
    assert "".join(text[s.start : s.end] for s in doc._.sections) == text


def test_sentences_of_others_may_stay():
    """Assertion reads the text itself, so a pipeline may keep its own sentences, or have none."""
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "PROBLEM", "pattern": "fever"}])
    nlp.add_pipe("clinical_assertion")
    doc = nlp("Denies:\n- fever\nFever. Mother had fever.")
    assert [e._.assertion.presence for e in doc.ents] == ["absent", "present"]
    assert [e._.assertion.experiencer for e in doc.ents] == ["patient", "family"]
    assert len(list(doc.sents)) == 2


def test_span_groups_that_overlap():
    nlp = spacy.blank("en")
    nlp.add_pipe("clinical_assertion")
    doc = nlp.make_doc("No chest pain but pain in the leg.")
    doc.spans["problems"] = [doc[1:3], doc[2:3], doc[4:8]]
    doc = nlp.get_pipe("clinical_assertion")(doc)
    assert [span._.assertion.presence for span in doc.spans["problems"]] == ["absent", "absent", "present"]


def test_spacy_finds_the_components_by_name():
    """The package declares them as entry points, so that `add_pipe` works without an import."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["project"]["entry-points"]["spacy_factories"]
    assert set(declared) == set(PIPES)
    for name, target in declared.items():
        module, _, attribute = target.partition(":")
        assert callable(getattr(import_module(module), attribute))
        assert Language.has_factory(name)
