"""IOB files: one token a line, its tag in the last column, a blank line between sentences.

    read_iob(path: Path) -> list[tuple[list[str], list[str]]]            (tokens, tags), one a sentence
    read_iob_documents(path: Path) -> list[list[tuple[list[str], list[str]]]]   sentences grouped by -DOCSTART-
    document(sentences) -> tuple[str, list[tuple[int, int, str]]]        text and (start, end, label) in code points
    token_spans(tags: Sequence[str]) -> list[tuple[int, int, str]]       (first token, end token, label)

Columns are divided by tabs, or by blanks where a line has no tab; the first is the token. Without -DOCSTART- lines
every sentence is a document. The text of a document is its tokens joined by one space, its sentences by a newline:
the original spacing is not in the format. IOB1, IOB2, IOBES and BILOU are told apart tag by tag.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.notes.readers.files import decode, open_bytes, walk
from clinical_nlp.notes.readers.files import reading as breaking
from clinical_nlp.notes.readers.folder import check_institution_from, institution_of, stem
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.over_files import over_files
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected

_SUFFIXES = (".iob", ".iob2", ".bio", ".conll", ".tsv")
_FIRST, _LAST = frozenset("BSU"), frozenset("ESL")

Sentence = tuple[list[str], list[str]]


class _Document(NamedTuple):
    line: int
    sentences: list[Sentence]
    problem: str | None


def files(source: Path) -> Iterator[Path]:
    """Yield the files of tokens."""
    if source.is_file():
        yield source
    else:
        yield from (path for path in walk(source) if _plain_suffix(path) in _SUFFIXES)


def _plain_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_iob(path: Path, *, encoding: str = "utf-8") -> list[Sentence]:
    """Return (tokens, tags) of every sentence of a file.

    Raises
    ------
    MissingDataError : no such file.
    InputError : a line without a tag, or a tag that is not O or PREFIX-LABEL; the message has file and line.
    """
    return [sentence for sentences in read_iob_documents(path, encoding=encoding) for sentence in sentences]


def read_iob_documents(path: Path, *, encoding: str = "utf-8") -> list[list[Sentence]]:
    """Return the sentences of every document of a file; see `read_iob` for the errors."""
    if not path.is_file():
        raise MissingDataError(f"no such file: {path}")
    documents = []
    for found in _documents(path, path.name, encoding):
        if found.problem:
            raise InputError(f"{path.name}:{found.line}: {found.problem}")
        documents.append(found.sentences)
    return documents


def token_spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (first token, end token, label) of the entities of one sentence, in any of the IOB schemes.

    An entity begins at B, S or U, at any other prefix after O or after another label, and after an entity that E, S
    or L ended.
    """
    spans: list[tuple[int, int, str]] = []
    begun: int | None = None
    label = ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, current = tag.partition("-")
        if begun is not None and (prefix == "O" or prefix in _FIRST or current != label):
            spans.append((begun, position, label))
            begun = None
        if prefix == "O":
            continue
        if begun is None:
            begun, label = position, current
        if prefix in _LAST or prefix in ("S", "U"):
            spans.append((begun, position + 1, label))
            begun = None
    return spans


def document(sentences: Sequence[Sentence]) -> tuple[str, list[tuple[int, int, str]]]:
    """Return the text of a document and its entities as (start, end, label) in code points."""
    parts: list[str] = []
    spans: list[tuple[int, int, str]] = []
    position = 0
    for tokens, tags in sentences:
        starts = []
        for token in tokens:
            starts.append(position)
            position += len(token) + 1
        spans.extend((starts[a], starts[b - 1] + len(tokens[b - 1]), label) for a, b, label in token_spans(tags))
        parts.append(" ".join(tokens))
    return "\n".join(parts), spans


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a document; its id is the file and the number of the document in it."""
    options = reading.options
    check_institution_from(options, format="iob")

    def records(path: Path, name: str) -> Iterator[Record]:
        for count, found in enumerate(_documents(path, name, options.encoding), start=1):
            note_id = f"{stem(name)}:{count}"
            source = f"{name}:{found.line}"
            if found.problem:
                yield Rejected(source, found.problem, note_id, note_id)
                continue
            yield Note(
                note_id=note_id,
                patient_id=note_id,
                institution=institution_of(name, options),
                text=document(found.sentences)[0],
                source=source,
                language=options.default_language,
            )

    yield from over_files(list(files(reading.source)), reading, records)


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield nothing: the format has no demographics."""
    yield from ()


def _documents(path: Path, name: str, encoding: str) -> Iterator[_Document]:
    """Yield documents; one with a bad line is yielded with the first problem and the line it is on."""
    marked = _has_docstart(path, name)
    sentences: list[Sentence] = []
    tokens: list[str] = []
    tags: list[str] = []
    begun, problem, bad = 0, None, 0

    def finish() -> Iterator[_Document]:
        nonlocal sentences, tokens, tags, begun, problem, bad
        if sentences or problem:
            yield _Document(bad or begun, sentences, problem)
        sentences, tokens, tags, begun, problem, bad = [], [], [], 0, None, 0

    for number, line in _lines(path, name):
        blank = not line.strip()
        if blank or line.startswith(b"-DOCSTART-"):
            if tokens:
                sentences.append((tokens, tags))
                tokens, tags = [], []
            if not blank or not marked:
                yield from finish()
            continue
        begun = begun or number
        text, wrong = decode(line, default=encoding)
        if text is not None:
            fields = text.split("\t") if "\t" in text else text.split()
            wrong = _problem(fields)
            if wrong is None:
                tokens.append(fields[0])
                tags.append(fields[-1])
        if wrong and problem is None:
            problem, bad = wrong, number
    if tokens:
        sentences.append((tokens, tags))
    yield from finish()


def _problem(fields: list[str]) -> str | None:
    if len(fields) < 2 or not fields[0].strip():
        return "a token and a tag are expected"
    prefix, dash, label = fields[-1].partition("-")
    if fields[-1] == "O" or (prefix in ("B", "I", "E", "S", "L", "U", "M") and dash and label):
        return None
    return "the last column is not an IOB tag (O, or a prefix B, I, E, S, L, U with a label)"


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path, name).stream as stream:
        number = 0
        while True:
            with breaking(name):
                line = stream.readline(1 << 20)
            if not line:
                return
            number += 1
            yield number, line.rstrip(b"\r\n")


def _has_docstart(path: Path, name: str) -> bool:
    return any(line.startswith(b"-DOCSTART-") for _, line in _lines(path, name))
