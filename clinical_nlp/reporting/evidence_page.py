"""One page a patient: what was found, and the notes it was found in with every mention marked where it stands.

The page holds whole notes. It is one HTML file that loads nothing and runs no script; whatever comes from a note or
its record is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from clinical_nlp.errors import MissingDataError
from clinical_nlp.extraction.patients import evidence_kind
from clinical_nlp.extraction.rereading import NoteKey, config_of, reread
from clinical_nlp.notes.schema import Note
from clinical_nlp.notes.writers.phenopacket import file_name
from clinical_nlp.reporting.page import template
from clinical_nlp.runs import write_atomic

_MARK = '<mark class="{tone}" title="{why}">{text}{label}</mark>'
_KEY = (
    ("affirmed", "affirmed"),
    ("denied", "denied"),
    ("uncertain", "uncertain"),
    ("family", "of the family"),
    ("other", "planned, hypothetical, of somebody else, or without a concept"),
    ("cue", "cue that decided"),
)
_INVISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


def write_evidence(output: Path, patients: Sequence[str]) -> list[Path]:
    """Write the evidence pages of some patients of a finished extraction.

    Parameters
    ----------
    output : its directory; the export must still be where it was.
    patients : ids, or `institution/id` where one id stands for several people (a bare id then gives a page of each).

    Returns
    -------
    The pages, `evidence/ID.html`.

    Raises
    ------
    MissingDataError : a patient is not in the output, or the export is gone.
    RunError : the output is not finished, or a note has changed since.
    """
    config_of(output)
    people = _find(output, patients)
    chosen = pc.field("patient_id").isin([patient_id for _, patient_id in people])
    notes = [row for row in _read(output, "notes", chosen) if row["outcome"] == "done"]
    mentions, concepts = _read(output, "mentions", chosen), _read(output, "patients", chosen)
    wanted: dict[NoteKey, str] = {
        (row["institution"], row["note_id"]): row["text_sha256"]
        for row in notes
        if any(_is_of(row, person) for person in people)
    }
    texts = {(note.institution, note.note_id): note for note in reread(output, wanted)}
    written = []
    for person in people:
        own = [row for row in notes if _is_of(row, person)]
        page = evidence_page(
            _name(person),
            [row for row in concepts if not person[0] or row["institutions"] == [person[0]]],
            [texts[row["institution"], row["note_id"]] for row in own],
            [row for row in mentions if _is_of(row, person)],
        )
        path = output / "evidence" / file_name(_name(person)).replace(".json", ".html")
        write_atomic(path, page)
        written.append(path)
    return written


def _read(output: Path, table: str, chosen: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / table, filters=chosen).to_pylist()
    return rows


def _find(output: Path, patients: Sequence[str]) -> list[tuple[str, str]]:
    """Return (scope, patient id) of everyone who is asked for."""
    register = pq.read_table(output / "ledger" / "people.parquet", columns=["scope", "patient_id"]).to_pylist()
    by_name: dict[str, list[tuple[str, str]]] = {}
    for row in register:
        person = (row["scope"], row["patient_id"])
        for name in {row["patient_id"], _name(person)}:
            by_name.setdefault(name, []).append(person)
    missing = [name for name in patients if name not in by_name]
    if missing:
        raise MissingDataError(f"patient {missing[0]!r} has no note in {output}")
    return list(dict.fromkeys(person for name in patients for person in by_name[name]))


def _name(person: tuple[str, str]) -> str:
    return "/".join(part for part in person if part)


def _is_of(row: Mapping[str, Any], person: tuple[str, str]) -> bool:
    return row["patient_id"] == person[1] and person[0] in ("", row["institution"])


def evidence_page(
    patient: str, concepts: Sequence[Mapping[str, Any]], notes: Sequence[Note], mentions: Iterable[Mapping[str, Any]]
) -> str:
    """Render the page of one patient.

    Parameters
    ----------
    patient : how the patient is called on the page.
    concepts : rows of `patients`.
    notes : all notes of the patient.
    mentions : rows of `mentions` of these notes.
    """
    by_note: dict[NoteKey, list[Mapping[str, Any]]] = {}
    for mention in mentions:
        by_note.setdefault((mention["institution"], mention["note_id"]), []).append(mention)
    dated = sorted(
        notes, key=lambda note: (note.written_at is None, str(note.written_at), note.institution, note.note_id)
    )
    shown = [note for note in dated if (note.institution, note.note_id) in by_note]
    anchors = {(note.institution, note.note_id): f"note-{number}" for number, note in enumerate(shown, start=1)}
    return template("evidence_page.html").render(
        title=f"Patient {_plain(patient)}",
        subtitle=f"{len(concepts)} concepts in {len(shown)} of {len(notes)} notes. Read by software, unreviewed.",
        concepts=[_concept_row(row, anchors) for row in concepts],
        key=_KEY,
        notes=[_note_block(note, by_note[note.institution, note.note_id], anchors) for note in shown],
        silent=[_plain(note.note_id) for note in dated if (note.institution, note.note_id) not in by_note],
        footer="Holds whole notes. Dates are those of the notes, never of an onset. Not for clinical decisions.",
    )


def _concept_row(row: Mapping[str, Any], anchors: Mapping[NoteKey, str]) -> dict[str, Any]:
    first, last = (f"{row[name]:%Y-%m-%d}" if row[name] else "" for name in ("first_documented", "last_documented"))
    keys = dict.fromkeys((item["institution"], item["note_id"]) for item in row["evidence"])
    return {
        "label": row["label"],
        "concept_id": row["concept_id"],
        "state": row["state"].replace("_", " "),
        "documented": first if first == last else f"{first} to {last}",
        "n_mentions": row["n_mentions"],
        "n_copied": row["n_copied"],
        "counts": f"{row['n_affirmed']}, {row['n_denied']}, {row['n_uncertain']}, {row['n_family']}",
        "notes": [(_plain(key[1]), anchors[key]) for key in keys if key in anchors],
        "propagated": ", ".join(row["propagated_from"]),
    }


def _note_block(note: Note, mentions: Sequence[Mapping[str, Any]], anchors: Mapping[NoteKey, str]) -> dict[str, Any]:
    from spacy import displacy

    # Marks may not overlap; the longest of those that do is drawn, and the others are listed below the note.
    chosen: list[dict[str, Any]] = []
    more = []
    for mention in sorted(mentions, key=lambda row: (row["start"] - row["end"], row["start"])):
        mark = {"start": mention["start"], "end": mention["end"], "label": _label(mention), "params": _look(mention)}
        if _is_free(chosen, mark):
            chosen.append(mark)
        else:
            covered = note.text[mention["start"] : mention["end"]]
            more.append(f"{mention['start']}-{mention['end']} “{_plain(covered)}”: {_said(mention)}")
    for mention in mentions:
        for cue in mention["cues"] or ():
            params = {"tone": "cue", "why": html.escape(f"cue of: {cue['value']}")}
            mark = {"start": cue["start"], "end": cue["end"], "label": "", "params": params}
            if cue["start"] < cue["end"] and _is_free(chosen, mark):
                chosen.append(mark)
    document = {
        # The same number of characters, so that every offset holds.
        "text": note.text.translate(_INVISIBLE).replace("\r\n", "\u200b\n").replace("\r", "\n"),
        "ents": sorted(chosen, key=lambda mark: mark["start"]),
    }
    marked = displacy.render(document, style="ent", manual=True, jupyter=False, options={"template": _MARK})
    facts = [note.institution, note.note_type, note.written_at and f"{note.written_at:%Y-%m-%d %H:%M}"]
    return {
        "anchor": anchors[note.institution, note.note_id],
        "note_id": _plain(note.note_id),
        "about": _plain(" · ".join(fact for fact in facts if fact)),
        "marked": marked,
        "more": more,
    }


def _is_free(chosen: Sequence[Mapping[str, Any]], mark: Mapping[str, Any]) -> bool:
    return all(mark["end"] <= other["start"] or other["end"] <= mark["start"] for other in chosen)


def _label(mention: Mapping[str, Any]) -> str:
    return f"<b>{html.escape(mention['concept_label'] or mention['label'])}</b>"


def _look(mention: Mapping[str, Any]) -> dict[str, str]:
    kind = evidence_kind(mention["presence"], mention["temporality"], mention["modality"], mention["experiencer"])
    tone = kind if kind and mention["concept_id"] else "other"
    return {"tone": tone, "why": html.escape(_said(mention))}


def _said(mention: Mapping[str, Any]) -> str:
    """Return in words what a mention says."""
    usual = {"temporality": "current", "modality": "actual", "experiencer": "patient"}
    axes = [mention["presence"], *(mention[axis] for axis, value in usual.items() if mention[axis] != value)]
    concept = f"{mention['concept_label']} ({mention['concept_id']})" if mention["concept_id"] else mention["label"]
    facts = [
        concept,
        ", ".join(axes),
        mention["section"] and f"section {mention['section']}",
        f"lane {mention['lane']}",
    ]
    if mention["copied_from"]:
        facts.append(f"copied from {_plain(mention['copied_from'])}")
    return "; ".join(fact for fact in facts if fact)


def _plain(text: str) -> str:
    """Return text with control characters made visible."""
    return text.translate(_INVISIBLE)
