"""OMOP concepts from a folder that was downloaded from Athena (athena.ohdsi.org) and unpacked.

Athena writes tables that are separated by tabs and quote nothing. HPO came to it in 2026 as a vocabulary without
standard concepts, whose codes have an underscore (`HP_0001250`); what is standard is behind `Maps to`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clinical_nlp.errors import MissingDataError, UsageError

_NEEDED = {
    "CONCEPT.csv": ("concept_id", "vocabulary_id", "standard_concept", "concept_code", "invalid_reason"),
    "CONCEPT_RELATIONSHIP.csv": ("concept_id_1", "concept_id_2", "relationship_id", "invalid_reason"),
}


def athena_files(folder: Path) -> dict[str, Path]:
    """Return CONCEPT.csv and CONCEPT_RELATIONSHIP.csv of a folder, however their names are spelled.

    Raises
    ------
    MissingDataError : the folder or one of the two is not there.
    """
    if not folder.is_dir():
        raise MissingDataError(f"vocabulary folder {folder} does not exist")
    there = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    missing = [name for name in _NEEDED if name.lower() not in there]
    if missing:
        raise MissingDataError(
            f"vocabulary folder {folder} has no {' and no '.join(missing)}; "
            "give the folder into which a download of athena.ohdsi.org was unpacked"
        )
    return {name: there[name.lower()] for name in _NEEDED}


def read_athena(folder: Path, concept_ids: Iterable[str], *, bare: str | None) -> dict[str, tuple[int, int]]:
    """Find the OMOP concepts of the concepts of a terminology.

    Parameters
    ----------
    folder : holds CONCEPT.csv and CONCEPT_RELATIONSHIP.csv.
    concept_ids : `HP:0001250` is code HP_0001250 or HP:0001250 of vocabulary HPO; any other `NAME:CODE` is that code
        of vocabulary NAME, in whatever case.
    bare : vocabulary of ids without a colon (ICD10CM); None leaves them out.

    Returns
    -------
    concept id -> (standard concept or 0, source concept), for what the folder knows.

    Notes
    -----
    A source concept that Athena calls invalid is taken where no valid one has the code. The standard concept is the
    valid, standard target of a valid `Maps to`, or the concept itself where it is standard and maps nowhere else. One
    row of NOTE_NLP has room for one concept and none for a value: where a concept maps to several, or also has a
    `Maps to value`, any single one would say something else than the note, so it is 0, and the source concept leads to
    them all.

    Raises
    ------
    MissingDataError : a file is not there.
    UsageError : a file lacks a column, cannot be read, or none of the concepts is in it.
    """
    import duckdb
    import pyarrow as pa

    files = athena_files(folder)
    wanted = [(id_, *code) for id_ in concept_ids for code in _codes(id_, bare)]
    names = ("id", "vocabulary", "code")
    table = pa.table({name: pa.array([row[at] for row in wanted], pa.string()) for at, name in enumerate(names)})
    with duckdb.connect(":memory:", config={"autoinstall_known_extensions": False}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.register("wanted", table)
        concept, relationship = (_rows_of(files[name], columns) for name, columns in _NEEDED.items())
        try:
            connection.execute(_SOURCES.format(concept=concept))
            connection.execute(_LINKS.format(relationship=relationship))
            connection.execute(_TARGETS.format(concept=concept))
            rows = connection.execute(_FOUND).fetchall()
        except duckdb.Error:
            raise UsageError(
                f"vocabulary folder {folder}: {' or '.join(_NEEDED)} cannot be read as text separated by tabs with "
                "whole numbers as concept ids; unpack the download again"
            ) from None
    if not rows:
        vocabularies = sorted({row[1] for row in wanted}) or ["of this terminology"]
        raise UsageError(
            f"vocabulary folder {folder} holds no concept of vocabulary {' or '.join(vocabularies[:5])}; "
            "choose it in the download of athena.ohdsi.org"
        )
    return {id_: (standard, source) for id_, standard, source in rows}


def _codes(concept_id: str, bare: str | None) -> list[tuple[str, str]]:
    """Return the (vocabulary in capitals, code) pairs that may stand for a concept id."""
    prefix, colon, code = concept_id.partition(":")
    if not colon:
        return [(bare.upper(), concept_id)] if bare else []
    if prefix == "HP":
        return [("HPO", f"HP_{code}"), ("HPO", concept_id)]
    return [(prefix.upper(), code)]


def _rows_of(path: Path, needed: tuple[str, ...]) -> str:
    """Return a table of Athena as a source of SQL, every column as text."""
    with open(path, encoding="utf-8-sig", errors="replace") as handle:
        header = [name.strip().lower() for name in handle.readline(1 << 16).split("\t")]
    missing = [name for name in needed if name not in header]
    if missing:
        raise UsageError(
            f"vocabulary file {path} has no column {' and no column '.join(missing)} in its first line, which has to "
            "be separated by tabs, as Athena writes it"
        )
    columns = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in header)
    if len(set(header)) != len(header):
        raise UsageError(f"vocabulary file {path} has a column twice in its first line")
    options = "header = true, auto_detect = false, quote = '', escape = '', delim = '\t'"
    return f"read_csv({_literal(str(path))}, columns = {{{columns}}}, {options})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_VALID = "coalesce(trim({}, ' \r'), '') = ''"
_SOURCES = f"""CREATE TABLE source AS
    SELECT wanted.id AS id, min({{{{
             'invalid': NOT {_VALID.format("concept.invalid_reason")}, 'id': concept.concept_id::BIGINT
           }}}}).id AS concept_id
    FROM {{concept}} AS concept JOIN wanted
      ON upper(concept.vocabulary_id) = wanted.vocabulary AND concept.concept_code = wanted.code
    GROUP BY wanted.id"""
_LINKS = f"""CREATE TABLE link AS
    SELECT source.id AS id, link.relationship_id AS kind, link.concept_id_2::BIGINT AS target
    FROM {{relationship}} AS link JOIN source ON link.concept_id_1::BIGINT = source.concept_id
    WHERE link.relationship_id IN ('Maps to', 'Maps to value') AND {_VALID.format("link.invalid_reason")}"""
_TARGETS = f"""CREATE TABLE standard AS
    SELECT concept_id::BIGINT AS concept_id FROM {{concept}} AS concept
    WHERE standard_concept = 'S' AND {_VALID.format("invalid_reason")}
      AND concept_id::BIGINT IN (SELECT target FROM link UNION SELECT concept_id FROM source)"""
_FOUND = """WITH mapped AS (
      SELECT link.id, count(DISTINCT standard.concept_id) FILTER (kind = 'Maps to') AS targets,
             min(standard.concept_id) FILTER (kind = 'Maps to') AS target,
             bool_or(kind = 'Maps to value') AS has_value
      FROM link LEFT JOIN standard ON link.target = standard.concept_id GROUP BY link.id)
    SELECT source.id,
           CASE WHEN mapped.targets = 1 AND NOT mapped.has_value THEN mapped.target
                WHEN coalesce(mapped.targets, 0) = 0 AND standard.concept_id IS NOT NULL THEN source.concept_id
                ELSE 0 END,
           source.concept_id
    FROM source LEFT JOIN mapped USING (id) LEFT JOIN standard USING (concept_id) ORDER BY source.id"""
