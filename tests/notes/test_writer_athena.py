"""OMOP concepts from a folder as Athena writes it: tabs, no quoting, `Maps to`, what is no longer valid."""

import pytest

from clinical_nlp.errors import MissingDataError, UsageError
from clinical_nlp.notes.writers.athena import read_athena

CONCEPT = [
    *("concept_id", "concept_name", "domain_id", "vocabulary_id", "concept_class_id", "standard_concept"),
    *("concept_code", "valid_start_date", "valid_end_date", "invalid_reason"),
]
RELATIONSHIP = [
    *("concept_id_1", "concept_id_2", "relationship_id"),
    *("valid_start_date", "valid_end_date", "invalid_reason"),
]
DATES = ("20081117", "20991231")


def concept(id_, code, vocabulary="HPO", *, name="x", standard="", invalid=""):
    kind = ("Condition", vocabulary, "Disorder") if standard else ("Observation", vocabulary, "Phenotype")
    return (id_, name, *kind, standard, code, *DATES, invalid)


def link(source, target, kind="Maps to", invalid=""):
    return (source, target, kind, *DATES, invalid)


CONCEPTS = [
    concept(1, "HP_0001250", name="Seizure"),
    concept(2, "HP_0001945", name='Fever, "high" 5"'),  # Athena quotes nothing, so quotes need not pair
    concept(3, "HP_0012735"),
    concept(4, "HP_0000175"),
    concept(5, "HP_0000202"),
    concept(6, "HP_0000707", invalid="U"),
    concept(7, "HP_0000118"),
    concept(8, "HP_0000118", invalid="D"),
    concept(9, "HP_0000001"),
    concept(10, "HP:0000002"),
    concept(20, "E11.9", "ICD10CM"),
    concept(21, "E11.9", "ICD10"),
    concept(100, "91175000", "SNOMED", name="Seizure", standard="S"),
    concept(101, "386661006", "SNOMED", standard="S"),
    concept(102, "1", "SNOMED", standard="S", invalid="D"),
    concept(103, "2", "SNOMED", standard="C"),
    concept(104, "3", "SNOMED", standard="S"),
    concept(105, "4", "SNOMED", standard="S"),
]
LINKS = [
    link(1, 100),
    link(1, 104, "Is a"),
    link(100, 100),
    link(100, 1, "Mapped from"),
    link(2, 101),
    link(2, 104, invalid="D"),
    link(3, 102),
    link(4, 104),
    link(4, 105),
    link(5, 104),
    link(5, 105, "Maps to value"),
    link(6, 104),
    link(7, 103),
    link(20, 105),
    link(21, 101),
]


@pytest.fixture
def athena(tmp_path):
    def written(concepts=CONCEPTS, links=LINKS, *, header=CONCEPT, end="\n"):
        folder = tmp_path / f"it's {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, columns, rows in (("CONCEPT", header, concepts), ("CONCEPT_RELATIONSHIP", RELATIONSHIP, links)):
            lines = ["\t".join(map(str, row)) for row in (columns, *rows)]
            (folder / f"{name}.csv").write_bytes((end.join(lines) + end).encode())
        return folder

    return written


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_concept_is_found_by_its_code_and_mapped_to_its_one_standard_concept(athena, end):
    ids = [row[6].replace("_", ":") for row in CONCEPTS[:10]] + ["HP:9999999", "local"]
    assert read_athena(athena(end=end), ids, bare=None) == {
        "HP:0001250": (100, 1),
        "HP:0001945": (101, 2),  # the other link is no longer valid
        "HP:0012735": (0, 3),  # its target is no longer valid
        "HP:0000175": (0, 4),  # two targets: neither alone is what the note says
        "HP:0000202": (0, 5),  # half of it is a value, for which NOTE_NLP has no room
        "HP:0000707": (104, 6),  # deprecated, and still mapped
        "HP:0000118": (0, 7),  # the valid one of two; a classification is no standard concept
        "HP:0000001": (0, 9),  # known, mapped to nothing
        "HP:0000002": (0, 10),  # the code as HPO itself writes it
    }


def test_other_vocabularies(athena):
    folder = athena()
    assert read_athena(folder, ["E11.9"], bare="ICD10CM") == {"E11.9": (105, 20)}
    found = read_athena(folder, ["snomed:91175000", "SNOMED:3", "LOINC:1", "E11.9"], bare=None)
    assert found == {"snomed:91175000": (100, 100), "SNOMED:3": (104, 104)}  # standard without a link to itself


def test_what_is_wrong_is_told_in_one_line(athena, tmp_path):
    folder = athena()
    with pytest.raises(UsageError, match=r"holds no concept of vocabulary HPO; choose it"):
        read_athena(athena(CONCEPTS[10:]), ["HP:0001250"], bare=None)
    (folder / "CONCEPT_RELATIONSHIP.csv").rename(folder / "concept_relationship.CSV")
    assert read_athena(folder, ["HP:0001250"], bare=None) == {"HP:0001250": (100, 1)}
    (folder / "concept_relationship.CSV").unlink()
    with pytest.raises(MissingDataError, match=r"has no CONCEPT_RELATIONSHIP\.csv; give the folder"):
        read_athena(folder, ["HP:0001250"], bare=None)
    with pytest.raises(MissingDataError, match="does not exist"):
        read_athena(tmp_path / "none", ["HP:0001250"], bare=None)
    with pytest.raises(UsageError, match=r"CONCEPT\.csv has no column concept_code and no column invalid_reason"):
        read_athena(athena(header=[*CONCEPT[:6], "code", *CONCEPT[7:9], "x"]), ["HP:0001250"], bare=None)
    with pytest.raises(UsageError, match="a column twice"):
        read_athena(athena(header=[*CONCEPT, "domain_id"]), ["HP:0001250"], bare=None)
    for broken in ([("one", *CONCEPTS[0][1:])], [(*CONCEPTS[0], "one more", "more")]):
        with pytest.raises(UsageError, match="unpack the download again"):
            read_athena(athena(broken), ["HP:0001250"], bare=None)
