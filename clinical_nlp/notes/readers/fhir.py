"""FHIR R4 bulk NDJSON: notes in DocumentReference and DiagnosticReport.

Files are known by the resource type in their name (`DocumentReference.000.ndjson.gz`, `Patient/part-1.ndjson`); an
NDJSON file that names no type is read line by line for any of them. Choices, all of them visible in the output:

- note_id is `ResourceType/id`. patient_id is the id of the subject; a logical reference (`Patient?identifier=...`, or
  an identifier) is looked up in the Patient files and is the identifier's value where it is not found there.
- institution: `--institution-from custodian` (default) is the custodian of a DocumentReference and the first
  Organization among the performers of a DiagnosticReport; `serviceProvider` is that of the encounter. The reference's
  id is taken, its display only where it has none. Levels are never mixed: what lacks the level asked for is
  `--institution`, else "unknown", and is counted.
- written_at: effectiveDateTime, effectivePeriod.start or issued; context.period.start or date.
- text: among the attachments in a language that was asked for (all, where none says), the best kind counts
  (text/plain, other text/*, HTML, RTF, XML): attachments of other kinds are the same document again. Several different
  ones of that kind are parts of one document, joined by an empty line. Where one of them cannot be had the next kind
  is tried. `hash` and `size` are not checked: servers compute them over other encodings.
- `entered-in-error` is skipped, and what another document (not itself in error) replaces; `superseded` and
  `preliminary` are read, and stand in `status`. A DiagnosticReport without presentedForm is a panel of results, not a
  note, and is skipped as `no-presentedForm`.
- The same text (white space aside) in both resource types for one patient and encounter is one note.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from clinical_nlp.errors import UsageError, nearest
from clinical_nlp.notes.readers.dates import note_time, parse_date
from clinical_nlp.notes.readers.documents import KINDS, document_text, from_base64, kind_of, shown_type
from clinical_nlp.notes.readers.files import MAX_RECORD_BYTES, Line, UnreadableError, byte_order_mark, lines, walk
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.over_files import over_files
from clinical_nlp.notes.readers.rows import json_object
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected, Skipped

CARRIERS = ("DocumentReference", "DiagnosticReport")
LEVELS = ("custodian", "serviceProvider")
_LINKED = ("Binary", "Encounter", "Organization", "Patient")
_NAMED = re.compile(rf"(?<![A-Za-z])({'|'.join((*CARRIERS, *_LINKED))})(?![A-Za-z])", re.IGNORECASE)
_CANONICAL = {name.lower(): name for name in (*CARRIERS, *_LINKED)}
_RESOURCE_TYPE = re.compile(rb'"resourceType"\s*:\s*"([A-Za-z]+)"')
_FHIR_ID = re.compile(r"[A-Za-z0-9.-]{1,64}")
_SUFFIXES = (".ndjson", ".jsonl", ".ndjson.gz", ".jsonl.gz")


def files(source: Path) -> list[Path]:
    """Return the files that may hold notes or what they refer to."""
    found = _files_by_type(source)
    return sorted({path for paths in found.values() for path in paths})


def _files_by_type(source: Path) -> dict[str, list[Path]]:
    """Return the files of each resource type; under "" those that do not say, which may hold any."""
    found: dict[str, list[Path]] = {name: [] for name in (*CARRIERS, *_LINKED, "")}
    for path in [source] if source.is_file() else walk(source):
        if path != source and not path.name.lower().endswith(_SUFFIXES):
            continue
        below = path.name if path == source else path.relative_to(source).as_posix()
        named = _NAMED.search(path.name) or _NAMED.search(below)
        if named:
            found[_CANONICAL[named[1].lower()]].append(path)
        elif not _holds_another_type(path):
            found[""].append(path)
    return found


def _holds_another_type(path: Path) -> bool:
    """Tell whether the file is named after the type of its first resource, as `Observation.000.ndjson` is."""
    try:
        first = next(lines(path, path.name), None)
    except UnreadableError:
        return False
    resource = json_object(first.data)[0] if first and first.data else None
    kind = resource.get("resourceType") if resource else None
    return isinstance(kind, str) and kind not in _CANONICAL.values() and kind.lower() in path.name.lower()


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a DocumentReference or DiagnosticReport, and one a line that is neither where one should be."""
    options = reading.options
    if options.institution_from not in (None, *LEVELS):
        near = nearest(options.institution_from, LEVELS)
        raise UsageError(f"institution_from {options.institution_from!r} is not known for fhir{near}")
    export = _files_by_type(reading.source)
    _index_replaced(reading, export)
    _index_identifiers(reading, export)
    if options.institution_from == "serviceProvider":
        _index_providers(reading, export)
    carriers = [path for name in (*CARRIERS, "") for path in export[name]]
    with _Binaries(reading, export) as binaries:

        def records(path: Path, name: str) -> Iterator[Record]:
            mixed = path in export[""]
            for line in lines(path, name):
                record = _record(line, name, mixed, reading, binaries)
                if record is not None:
                    yield record

        yield from over_files(carriers, reading, records)


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield the patients of the Patient files."""
    for resource in _resources("Patient", _files_by_type(reading.source), reading):
        patient_id = _string(resource.get("id"))
        if patient_id is None:
            reading.remarks["Patient resources have no id"] += 1
            continue
        sex = _string(resource.get("gender"))
        yield Patient(
            patient_id,
            sex=sex if sex in ("male", "female", "other", "unknown") else None,
            birth_date=parse_date(resource.get("birthDate")),
            death_date=parse_date(resource.get("deceasedDateTime")),
        )


def _resources(kind: str, export: Mapping[str, list[Path]], reading: Reading) -> Iterator[dict[str, Any]]:
    """Yield the good resources of one linked type; a bad line is counted, since it is no note."""
    needle = f'"{kind}"'.encode()
    for path in (*export[kind], *export[""]):
        typed = path in export[kind]
        try:
            for line in lines(path, reading.name(path)):
                if line.data is not None and needle not in line.data and not typed:
                    continue
                resource = json_object(line.data)[0] if line.data is not None else None
                if resource is not None and resource.get("resourceType") == kind:
                    yield resource
                elif typed:
                    reading.remarks[f"lines of {kind} files could not be read"] += 1
        except UnreadableError:
            if typed:
                reading.remarks[f"{kind} files could not be read, or not to their end"] += 1


def _index_replaced(reading: Reading, export: Mapping[str, list[Path]]) -> None:
    """Note which documents are replaced, by id and by identifier."""
    for path in (*export["DocumentReference"], *export[""]):
        try:
            for line in lines(path, reading.name(path)):
                if line.data is None or b'"replaces"' not in line.data:
                    continue
                resource = json_object(line.data)[0]
                if resource is None or resource.get("resourceType") != "DocumentReference" or _in_error(resource):
                    continue
                for relation in _list(resource.get("relatesTo")):
                    code = _get(relation, "code")
                    code = _get(code, "coding", 0, "code") if isinstance(code, dict) else code
                    target = _get(relation, "target")
                    if code != "replaces" or not isinstance(target, dict):
                        continue
                    reference = _reference(target)
                    if reference.id is not None and reference.id != resource.get("id"):
                        reading.index.add("replaced", reference.id)
                    if reference.identifier is not None:
                        reading.index.add("replaced-identifier", reference.identifier)
        except UnreadableError:
            continue  # told when the notes of the file are read


def _index_identifiers(reading: Reading, export: Mapping[str, list[Path]]) -> None:
    """Note which Patient or Organization an identifier belongs to; one that two of them carry belongs to none."""
    for kind in ("Patient", "Organization"):
        for resource in _resources(kind, export, reading):
            own = _string(resource.get("id"))
            for identifier in _list(resource.get("identifier")):
                token = _token(identifier)
                if own and token and reading.index.add("identifier", kind, token, value=own) not in (None, own):
                    reading.index.put("identifier", kind, token, value="")


def _index_providers(reading: Reading, export: Mapping[str, list[Path]]) -> None:
    for resource in _resources("Encounter", export, reading):
        own = _string(resource.get("id"))
        provider = _institution_id(_get(resource, "serviceProvider"), resource, reading)
        if own and provider:
            reading.index.add("provider", own, value=provider)


def _record(line: Line, name: str, mixed: bool, reading: Reading, binaries: _Binaries) -> Record | None:
    """Return what one line becomes; None for a resource of another type in a file that may hold any."""
    source = f"{name}:{line.number}"
    if line.data is None:
        return Rejected(source, str(line.problem))
    if mixed and not any(kind.encode() in line.data for kind in CARRIERS) and _RESOURCE_TYPE.search(line.data):
        return None
    resource, problem = json_object(line.data)
    if resource is None:
        return Rejected(source, str(problem))
    kind = resource.get("resourceType")
    if kind not in CARRIERS:
        if mixed and isinstance(kind, str):
            return None
        return Rejected(source, "resource is neither DocumentReference nor DiagnosticReport")
    return _Carrier(resource, kind, source, reading, binaries).record()


class _Reference(NamedTuple):
    """A reference taken apart: the id, the type where it says one, the identifier of a logical reference."""

    id: str | None = None
    type: str | None = None
    identifier: str | None = None
    contained: str | None = None


def _reference(value: Mapping[str, Any]) -> _Reference:
    reference = _string(value.get("reference"))
    token = _token(value.get("identifier"))
    kind = _string(value.get("type"))
    if reference is None:
        return _Reference(type=kind, identifier=token)
    if reference.startswith("#"):
        return _Reference(contained=reference[1:], type=kind)
    if reference.lower().startswith(("urn:uuid:", "urn:oid:")):
        return _Reference(reference.split(":", 2)[2] or None, kind, token)
    path, _, query = reference.partition("?")
    parts = [part for part in path.split("/") if part]
    if query:
        wanted = [item.split("=", 1)[1] for item in query.split("&") if item.startswith("identifier=")]
        return _Reference(type=parts[-1] if parts else kind, identifier=unquote(wanted[0]) if wanted else None)
    if "_history" in parts:
        parts = parts[: parts.index("_history")]
    if not parts:
        return _Reference(type=kind, identifier=token)
    return _Reference(parts[-1], parts[-2] if len(parts) > 1 else kind, token)


def _token(identifier: Any) -> str | None:
    """Return an identifier as FHIR search writes it: `system|value`."""
    value = _string(_get(identifier, "value"))
    return None if value is None else f"{_string(_get(identifier, 'system')) or ''}|{value}"


def _linked_id(value: Any, kind: str, resource: Mapping[str, Any], reading: Reading) -> str | None:
    """Return the id that a reference means; of a logical one the id found for it, else the identifier's value."""
    if not isinstance(value, dict):
        return None
    reference = _reference(value)
    if reference.type not in (None, kind):
        return None
    token = reference.identifier
    if reference.contained is not None:
        inner = next(
            (item for item in _list(resource.get("contained")) if _get(item, "id") == reference.contained), None
        )
        token = _token(_get(inner, "identifier", 0)) if _get(inner, "resourceType") == kind else None
    if reference.id is not None:
        return reference.id
    if token is None:
        return None
    return reading.index.get("identifier", kind, token) or token.rpartition("|")[2] or None


def _institution_id(value: Any, resource: Mapping[str, Any], reading: Reading) -> str | None:
    found = _linked_id(value, "Organization", resource, reading)
    return found or _string(_get(value, "display"))


class _Text(NamedTuple):
    text: str
    language: str | None
    title: str | None


class _Carrier:
    """One DocumentReference or DiagnosticReport on its way to a record."""

    def __init__(self, resource: dict[str, Any], kind: str, source: str, reading: Reading, binaries: _Binaries) -> None:
        self._resource, self._kind, self._source = resource, kind, source
        self._reading, self._binaries = reading, binaries
        own = _string(resource.get("id"))
        self._note_id = f"{kind}/{own}" if own else None
        self._patient_id = _linked_id(resource.get("subject"), "Patient", resource, reading)

    def record(self) -> Record:
        resource = self._resource
        if self._note_id is None:
            return self._rejected("no id")
        if _in_error(resource):
            return self._skipped("entered-in-error")
        if self._kind == "DocumentReference" and self._is_replaced():
            return self._skipped("replaced")
        if self._patient_id is None:
            return self._rejected("no patient: subject is missing, is no Patient, or cannot be resolved")
        if self._kind == "DiagnosticReport" and not _list(resource.get("presentedForm")):
            return self._skipped("no-presentedForm")
        found, problem = self._text()
        if found is None:
            return self._rejected(str(problem))
        encounter_id = self._encounter_id()
        if encounter_id is not None and found.text.strip():
            digest = hashlib.sha256(" ".join(found.text.split()).encode("utf-8", "surrogatepass")).hexdigest()
            carrier = self._reading.index.add("text", self._patient_id, encounter_id, digest, value=self._kind)
            if carrier not in (None, self._kind):
                return self._skipped("same-text-same-encounter")
        return Note(
            note_id=self._note_id,
            patient_id=self._patient_id,
            institution=self._institution(encounter_id),
            text=found.text,
            source=self._source,
            encounter_id=encounter_id,
            note_type=_concept(resource.get("type" if self._kind == "DocumentReference" else "code")),
            written_at=note_time(self._date(), self._reading),
            title=found.title or _string(resource.get("description")),
            language=found.language or _string(resource.get("language")) or self._reading.options.default_language,
            status=self._status(),
        )

    def _rejected(self, reason: str) -> Rejected:
        return Rejected(self._source, reason, self._note_id, self._patient_id)

    def _skipped(self, rule: str) -> Skipped:
        return Skipped(self._source, rule, self._note_id, self._patient_id)

    def _is_replaced(self) -> bool:
        resource, index = self._resource, self._reading.index
        if index.get("replaced", str(resource["id"])) is not None:
            return True
        tokens = (_token(item) for item in (*_list(resource.get("identifier")), resource.get("masterIdentifier")))
        return any(index.get("replaced-identifier", token) is not None for token in tokens if token)

    def _encounter_id(self) -> str | None:
        context = self._resource.get("context")
        if self._kind == "DiagnosticReport":
            candidates = [self._resource.get("encounter")]
        elif isinstance(context, list):  # R5
            candidates = context
        else:
            candidates = _list(_get(context, "encounter"))
        found = (_linked_id(item, "Encounter", self._resource, self._reading) for item in candidates)
        return next((item for item in found if item), None)

    def _institution(self, encounter_id: str | None) -> str:
        options = self._reading.options
        if options.institution and options.institution_from is None:
            return options.institution
        found: str | None = None
        if options.institution_from == "serviceProvider":
            found = self._reading.index.get("provider", encounter_id) if encounter_id else None
        elif self._kind == "DocumentReference":
            found = _institution_id(self._resource.get("custodian"), self._resource, self._reading)
        else:
            for performer in _list(self._resource.get("performer")):
                kind = _reference(performer).type if isinstance(performer, dict) else None
                if kind == "Organization" and (found := _institution_id(performer, self._resource, self._reading)):
                    break
        return found or options.fallback_institution()

    def _date(self) -> Any:
        resource = self._resource
        if self._kind == "DocumentReference":
            return _get(resource, "context", "period", "start") or resource.get("date")
        return (
            resource.get("effectiveDateTime")
            or resource.get("effectiveInstant")
            or _get(resource, "effectivePeriod", "start")
            or resource.get("issued")
        )

    def _status(self) -> str | None:
        for key in ("status", "docStatus"):
            status = _string(self._resource.get(key))
            if status not in (None, "current", "final"):
                return status
        return None

    def _text(self) -> tuple[_Text | None, str | None]:
        if self._kind == "DocumentReference":
            attachments = [_get(item, "attachment") for item in _list(self._resource.get("content"))]
        else:
            attachments = _list(self._resource.get("presentedForm"))
        attachments = [item for item in attachments if isinstance(item, dict)]
        if not attachments:
            return None, "no attachment"
        attachments = self._in_language(attachments)
        problem: str | None = None
        for kind in (*KINDS, "", None):
            group = [item for item in attachments if kind_of(_string(item.get("contentType"))) == kind]
            if not group:
                continue
            if kind is None:
                problem = problem or f"no readable attachment ({shown_type(_string(group[0].get('contentType')))})"
                continue
            text, wrong = self._joined(group)
            if text is not None:
                return _Text(text, _string(group[0].get("language")), _string(group[0].get("title"))), None
            problem = problem or wrong
        return None, problem

    def _in_language(self, attachments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        wanted = {language.split("-")[0].lower() for language in self._reading.options.languages}
        fitting = [
            item for item in attachments if (_string(item.get("language")) or "").split("-")[0].lower() in wanted
        ]
        return fitting or attachments

    def _joined(self, group: list[dict[str, Any]]) -> tuple[str | None, str | None]:
        texts: list[str] = []
        for attachment in group:
            data, content_type, problem = self._binaries.bytes_of(attachment, self._resource)
            if data is None:
                return None, problem
            text, problem = document_text(data, content_type)
            if text is None:
                return None, problem
            if text not in texts:
                texts.append(text)
        return "\n\n".join(texts), None


class _Binaries:
    """The bytes of attachments: inline, contained, in Binary files, or in the attachments folder; never from afar.

    Only where each Binary stands is remembered, on disk. Lines of compressed files go to an unnamed temporary file
    in the scratch folder, since gzip cannot be entered in the middle.
    """

    def __init__(self, reading: Reading, export: Mapping[str, list[Path]]) -> None:
        self._reading = reading
        self._paths = [*export["Binary"], *export[""]]
        self._typed = len(export["Binary"])
        self._spill: BinaryIO | None = None
        self._open: tuple[int, BinaryIO] | None = None

    def __enter__(self) -> _Binaries:
        for number, path in enumerate(self._paths):
            self._index(number, path)
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self._spill, self._open and self._open[1]):
            if stream:
                stream.close()

    def _index(self, number: int, path: Path) -> None:
        plain = _is_plain(path)
        try:
            for line in lines(path, self._reading.name(path)):
                if line.data is None or b'"Binary"' not in line.data:
                    continue
                resource = json_object(line.data)[0]
                own = _string(resource.get("id")) if resource and resource.get("resourceType") == "Binary" else None
                if own is None:
                    continue
                if plain:
                    place = f"{number} {line.offset} {len(line.data)}"
                else:
                    if self._spill is None:
                        self._spill = tempfile.TemporaryFile(dir=self._reading.index.folder)  # noqa: SIM115
                    place = f"-1 {self._spill.seek(0, io.SEEK_END)} {len(line.data)}"
                    self._spill.write(line.data)
                self._reading.index.add("binary", own, value=place)
        except UnreadableError:
            self._reading.remarks["Binary files could not be read, or not to their end"] += number < self._typed

    def bytes_of(
        self, attachment: Mapping[str, Any], resource: Mapping[str, Any]
    ) -> tuple[bytes | None, str | None, str | None]:
        """Return (bytes, content type, None) or (None, None, reason)."""
        content_type = _string(attachment.get("contentType"))
        if attachment.get("data") is not None:
            data, problem = from_base64(attachment["data"])
            return data, content_type, problem
        url = _string(attachment.get("url"))
        if url is None:
            return None, None, "attachment has neither data nor url"
        binary = self._binary(url, resource)
        if binary is not None:
            data, problem = from_base64(binary.get("data"))
            return data, content_type or _string(binary.get("contentType")), problem
        return self._from_folder(url, content_type)

    def _binary(self, url: str, resource: Mapping[str, Any]) -> dict[str, Any] | None:
        reference = _reference({"reference": url})
        if reference.contained is not None:
            found = (item for item in _list(resource.get("contained")) if _get(item, "id") == reference.contained)
            return next((item for item in found if isinstance(item, dict)), None)
        if reference.id is None or reference.type not in (None, "Binary"):
            return None
        place = self._reading.index.get("binary", reference.id)
        if place is None:
            return None
        number, offset, length = map(int, place.split())
        stream = self._stream(number)
        stream.seek(offset)
        return json_object(stream.read(length))[0]

    def _stream(self, number: int) -> BinaryIO:
        if number == -1 and self._spill is not None:
            return self._spill
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = (number, self._paths[number].open("rb"))
        return self._open[1]

    def _from_folder(self, url: str, content_type: str | None) -> tuple[bytes | None, str | None, str | None]:
        folder = self._reading.options.attachments
        reference = _reference({"reference": url})
        known = reference.type == "Binary" and reference.id is not None and _FHIR_ID.fullmatch(reference.id)
        what = f"Binary/{reference.id}" if known else "what its url names"
        if folder is None:
            return None, None, f"attachment has only a url; {what} is not in the export and --attachments is not given"
        root = folder.resolve()
        for candidate in _candidates(url):
            path = (root / candidate).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                continue
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_RECORD_BYTES + 1)
            except OSError as error:
                return None, None, f"the attachment's file cannot be read ({error.strerror})"
            if len(data) > MAX_RECORD_BYTES:
                return None, None, f"the attachment's file is larger than {MAX_RECORD_BYTES >> 20} MiB"
            return data, content_type or _ENDINGS.get(path.suffix.lower()), None
        return None, None, f"attachment has only a url; {what} is in neither the export nor the attachments folder"


_ENDINGS = {".txt": "text/plain", ".html": "text/html", ".htm": "text/html", ".rtf": "text/rtf", ".xml": "text/xml"}


def _candidates(url: str) -> list[str]:
    """Return the names below the attachments folder that a URL may mean, the most exact first."""
    try:
        parts = [part for part in PurePosixPath(unquote(urlsplit(url).path)).parts if part not in ("/", "..", ".")]
    except ValueError:
        return []
    if not parts or "\0" in "".join(parts) or len(parts[-1]) > 200:
        return []
    names = ["/".join(parts[-depth:]) for depth in range(min(len(parts), 4), 0, -1)]
    return [name + ending for name in names for ending in ("", *_ENDINGS)]


def _is_plain(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return not head.startswith(b"\x1f\x8b") and byte_order_mark(head) is None


def _in_error(resource: Mapping[str, Any]) -> bool:
    return "entered-in-error" in (resource.get("status"), resource.get("docStatus"))


def _concept(value: Any) -> str | None:
    """Return what a CodeableConcept says: a coding's display, its text, or a code."""
    codings = [item for item in _list(_get(value, "coding")) if isinstance(item, dict)]
    shown = [_string(item.get("display")) for item in codings]
    codes = [_string(item.get("code")) for item in codings]
    return next((item for item in (*shown, _string(_get(value, "text")), *codes) if item), None)


def _get(value: Any, *path: str | int) -> Any:
    """Return the value at a path, None where anything on the way is missing or of another kind."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _string(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
