import spacy
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
