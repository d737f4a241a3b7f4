"""What a reader needs to judge an evaluation, as TRIPOD-LLM asks for it; one section for every evaluation page.

Each item is what the run recorded. Where it recorded nothing, the section says so and what to do. What no software can
know (intended use, what a base model had read) is stated by people, in `statements.yaml` of the run directory, and
taken up when the page is rendered again.

References
----------
Gallifant et al. 2025, The TRIPOD-LLM reporting guideline for studies using large language models, Nature Medicine 31.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from clinical_nlp.errors import InputError, UsageError, nearest
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.reporting.page import Section, Table, Text
from clinical_nlp.runs import Run

SMALLEST_CELL = 11
STATEMENTS = "statements.yaml"
STATED = {
    "intended_use": "who would use the result, for what, and who checks it",
    "pretraining": "what the base model had read before, and until when",
    "protocol": "where the protocol was written down before the patients were scored",
    "missing_data": "why text, dates or columns are missing, and how that was dealt with",
}
"""What people state, and what belongs there."""
_COLUMNS = {"written_at": "date", "note_type": "note type", "encounter_id": "encounter"}
_OF_PATIENTS = {"sex": "sex", "birth_date": "birth date"}


# Collecting, when the suite runs --------------------------------------------------------------------------------------


def notes_record(
    notes: pa.Table,
    parts: Mapping[str, Sequence[int] | np.ndarray],
    *,
    patients: pa.Table | None = None,
    trained: str | None = None,
) -> dict[str, Any]:
    """Say which notes and patients each part of an evaluation had, over which months, and what was missing of them.

    Parameters
    ----------
    notes : see `NOTE_SCHEMA`.
    parts : rows of `notes` by the name of the part, in the order of the flow.
    patients : table of the corpus, if it has one.
    trained : the part that weights were fitted to; copies of its texts and its patients are looked for in the others.

    Returns
    -------
    JSON-ready; months are left out where a part has fewer than 11 patients.
    """
    rows = {name: [int(row) for row in part] for name, part in parts.items()}
    ids, texts = notes["patient_id"].to_pylist(), notes["text_sha256"].to_pylist()
    written = notes["written_at"].to_pylist()
    people = {name: {ids[row] for row in part} for name, part in rows.items()}
    used = sorted({row for part in rows.values() for row in part})
    everyone = set().union(*people.values()) if people else set()
    missing = []
    for column, name in _COLUMNS.items():
        values = notes[column].to_pylist()
        missing.append({"what": name, "n": sum(values[row] is None for row in used), "of": len(used), "unit": "notes"})
    if patients is not None:
        for column, name in _OF_PATIENTS.items():
            known = set()
            if column in patients.column_names:
                pairs = zip(patients["patient_id"].to_pylist(), patients[column].to_pylist(), strict=True)
                known = {patient for patient, value in pairs if value is not None}
            missing.append({"what": name, "n": len(everyone - known), "of": len(everyone), "unit": "patients"})
    found: dict[str, Any] = {
        "parts": [
            {"part": name, "n_patients": len(people[name]), "n_notes": len(part)}
            | _months([written[row] for row in part], len(people[name]))
            for name, part in rows.items()
        ],
        "n_notes_unused": notes.num_rows - len(used),
        "missing": missing,
        "patients_known": patients is not None,
    }
    if trained is not None:
        known_texts = {texts[row] for row in rows[trained]}
        others = [name for name in rows if name != trained]
        found["overlap"] = {
            "trained": trained,
            "patients": sum(len(people[name] & people[trained]) for name in others),
            "copies": sum(texts[row] in known_texts for name in others for row in rows[name]),
            "n_notes": sum(len(rows[name]) for name in others),
        }
    return found


def counted_decisions(where: str, counts: np.ndarray, n_patients: int) -> dict[str, Any]:
    """Return decisions from counts of what is right, said and true (n, 3); what was rightly not said is not counted."""
    right, said, true = (int(total) for total in counts.sum(axis=0))
    return {
        "where": where,
        "true_positives": right,
        "false_positives": said - right,
        "true_negatives": None,
        "false_negatives": true - right,
        "n_patients": n_patients,
    }


def corpus_record(
    corpus: Corpus,
    parts: Mapping[str, Sequence[int] | np.ndarray],
    *,
    judged: str | Path | None = None,
    trained: str | None = "train",
) -> dict[str, Any]:
    """Collect what a corpus and its split say; see `notes_record` for `parts` and `trained`.

    Parameters
    ----------
    judged : the run or base model that is evaluated; None where there is none.
    """
    return {
        "notes": notes_record(corpus.notes, parts, patients=corpus.patients, trained=trained),
        "judged": None if judged is None else judged_run(judged),
        "open_text": text_origin(corpus.card),
    }


def _months(dates: Sequence[datetime | None], n_patients: int) -> dict[str, str | None]:
    known = [date for date in dates if date is not None]
    if not known or n_patients < SMALLEST_CELL:
        return {"first": None, "last": None}
    return {"first": f"{min(known):%Y-%m}", "last": f"{max(known):%Y-%m}"}


def decisions(where: str, gold: np.ndarray, said: np.ndarray, patients: Sequence[str]) -> dict[str, Any]:
    """Count decisions against gold.

    Parameters
    ----------
    where : what was decided, and at which institution.
    gold : (n,) 0 or 1.
    said : (n,) 0 or 1; NaN where the model abstains.
    patients : (n,) whose decision it is.
    """
    yes, no, silent = said == 1, said == 0, np.isnan(said)
    return {
        "where": where,
        "true_positives": int((yes & (gold == 1)).sum()),
        "false_positives": int((yes & (gold == 0)).sum()),
        "true_negatives": int((no & (gold == 0)).sum()),
        "false_negatives": int((no & (gold == 1)).sum()),
        "abstained_positive": int((silent & (gold == 1)).sum()),
        "abstained_negative": int((silent & (gold == 0)).sum()),
        "n_patients": len(set(patients)),
    }


def text_origin(card: Card) -> str:
    """Say whether a base model can have read the notes of a corpus."""
    if card.contains_phi:
        return f"The notes are not public ({card.origin.rstrip('.')})."
    return f"The notes are open ({card.origin.rstrip('.')}), so that a base model may have read them."


def judged_run(path: str | Path) -> dict[str, Any]:
    """Say what a judged run (or a bare base model) is, and what it and the runs below it have read."""
    if not (Path(path) / "manifest.json").is_file():
        return {"recipe": None, "steps": [], "base": str(path), "revision": None, "packages": {}}
    run = Run.load(path)
    steps: list[dict[str, Any]] = []
    folder = run.path
    while (folder / "manifest.json").is_file():
        manifest = Run.load(folder).manifest
        inputs = manifest.get("inputs") or {}
        steps.append(
            {"recipe": manifest.get("recipe"), "corpus": inputs.get("corpus"), "n_notes": inputs.get("n_notes")}
        )
        below = manifest.get("base_model")
        if not isinstance(below, dict) or not below.get("name"):
            break
        beside = (folder / below["relative"]).resolve() if below.get("relative") else None
        folder = beside if beside is not None and beside.is_dir() else Path(str(below["name"]))
    named = run.manifest.get("base_model")
    base = named if isinstance(named, dict) else {}
    return {
        "recipe": run.manifest.get("recipe"),
        "steps": steps,
        "base": base.get("name"),
        "revision": base.get("revision") or base.get("digest"),
        "packages": run.manifest.get("packages") or {},
    }


# Writing, when the page is rendered -----------------------------------------------------------------------------------


def tripod_section(run: Run, results: Mapping[str, Any]) -> Section:
    """Say what a reader needs to judge the numbers above.

    Parameters
    ----------
    run : the evaluation's own run, with its config and versions.
    results : its `results.json`; `record` holds what was collected (`notes`, `decisions`, `thresholds`, `judged`,
        `decided_on`, `open_text`, `trained`), each where the suite has it.

    Raises
    ------
    InputError : `statements.yaml` cannot be read.
    UsageError : it holds something that is not asked for.
    """
    record, stated = results.get("record") or {}, _statements(run.path)
    intro = "Asked for by TRIPOD-LLM."
    if set(STATED) - set(stated):
        intro += (
            f" What is not recorded, people know: write it into {STATEMENTS} in the run's directory, under the key in "
            "brackets, and render the page again with clinical-nlp report."
        )
    blocks: list[Any] = [Text(intro)]
    notes = record.get("notes")
    if notes and notes["parts"]:
        dated = [[part["part"], part["n_patients"], part["n_notes"], _span(part)] for part in notes["parts"]]
        blocks.append(Table(["patients and notes", "patients", "notes", "months of the notes"], dated, _unused(notes)))
    if record.get("decisions"):
        blocks.append(_decisions(record["decisions"], record.get("decided_on", "")))
    rows = [
        ("intended use", stated.get("intended_use") or _unstated("intended_use")),
        ("frozen protocol", _protocol(run, results, stated)),
        ("thresholds", _thresholds(record)),
        ("missing data", _missing(notes, stated)),
        ("trained and scored", record.get("trained") or _overlap(notes)),
        ("pretraining", _pretraining(record, stated)),
        ("versions", _versions(run, record)),
    ]
    return Section("For judging this evaluation", [*blocks, Table([], rows)])


def _statements(folder: Path) -> dict[str, str]:
    file = folder / STATEMENTS
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{file} is not YAML; write lines such as `intended_use: ...`") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no statements; write lines such as `intended_use: ...`")
    for key, value in found.items():
        if key not in STATED:
            raise UsageError(f"{file}: {str(key)!r} is not asked for{nearest(str(key), STATED)}")
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{file}: {key} must be a sentence ({STATED[key]})")
    return {key: value.strip() for key, value in found.items()}


def _unstated(key: str) -> str:
    return f"Not recorded ({key}): {STATED[key]}."


def _span(part: Mapping[str, Any]) -> str:
    if part["first"] is None:
        few = part["n_patients"] < SMALLEST_CELL
        return f"fewer than {SMALLEST_CELL} patients" if few else "not recorded: the notes have no date"
    return part["first"] if part["first"] == part["last"] else f"{part['first']} to {part['last']}"


def _unused(notes: Mapping[str, Any]) -> str:
    left = notes["n_notes_unused"]
    if left is None:
        return "The notes that were sampled."
    return f"{left} notes of the corpus were not used." if left else "All notes of the corpus are in one of these."


def _decisions(rows: Sequence[Mapping[str, Any]], decided_on: str) -> Table:
    columns = ["decisions", "true positive", "false positive", "true negative", "false negative"]
    keys = ["true_positives", "false_positives", "true_negatives", "false_negatives"]
    caption = f"Counts of decisions, not of patients. {decided_on}".strip()
    abstains = any("abstained_positive" in row for row in rows)
    if abstains:
        columns += ["abstained, outcome there", "abstained, not there"]
        keys += ["abstained_positive", "abstained_negative"]
    if any(row["true_negatives"] is None for row in rows):
        caption += " A dash: what was not marked cannot be counted."
    table = [[row["where"], *(row.get(key) for key in keys), row["n_patients"]] for row in rows]
    return Table([*columns, "patients"], table, caption)


def _protocol(run: Run, results: Mapping[str, Any], stated: Mapping[str, str]) -> str:
    config = run.path / "config.yaml"
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:12] if config.is_file() else "not recorded"
    version = f"Version {results['version']} of suite" if "version" in results else "Recipe"
    said = f"{version} {run.manifest.get('recipe')}; every setting is in config.yaml (sha256 {digest}…)."
    if chosen := (results.get("protocol") or {}).get("selection"):
        said += f" Selection: {chosen}."
    return f"{said} {stated.get('protocol') or _unstated('protocol')}"


def _thresholds(record: Mapping[str, Any]) -> str:
    found = record.get("thresholds")
    if not found:
        return "None: nothing is decided about a patient here."
    return "; ".join(found) + "."


def _missing(notes: Mapping[str, Any] | None, stated: Mapping[str, str]) -> str:
    said = "Not recorded: the predictions came without their notes; evaluate the run to see it."
    if notes:
        gaps = [f"{row['what']} of {row['n']} of {row['of']} {row['unit']}" for row in notes["missing"] if row["n"]]
        said = f"Not there: {'; '.join(gaps)}." if gaps else "Nothing that was looked for is missing."
        if not notes["patients_known"]:
            said += " No table of patients was read, so that their sex and birth dates are not known."
    return f"{said} {stated.get('missing_data') or _unstated('missing_data')}"


def _overlap(notes: Mapping[str, Any] | None) -> str:
    overlap = (notes or {}).get("overlap")
    if not overlap:
        return "Not recorded: what trained the model is not known here. Keep its patients out of those that are scored."
    people = f"{overlap['patients']} patients are in the {overlap['trained']} part and in another"
    copies = (
        f"{overlap['copies']} of {overlap['n_notes']} other notes are word for word in the {overlap['trained']} part"
    )
    remedy = "" if not overlap["copies"] else " (divide with deduplicate to keep copies together)"
    return f"{people}; {copies}{remedy}."


def _pretraining(record: Mapping[str, Any], stated: Mapping[str, str]) -> str:
    judged, open_text = record.get("judged"), record.get("open_text")
    said = []
    if judged:
        for step in judged["steps"]:
            amount = f" ({step['n_notes']} notes)" if step["n_notes"] else ""
            said.append(f"{step['recipe']} on {step['corpus'] or 'inputs listed in its manifest'}{amount}")
        said = [f"Known: {'; then below it '.join(said)}."] if said else []
    elif judged is None and "judged" in record:
        said = ["No pretrained model is used."]
    if open_text:
        said.append(open_text)
    if stated.get("pretraining"):
        said.append(stated["pretraining"])
    elif judged or "judged" not in record:
        said.append(_unstated("pretraining"))
    return " ".join(said)


def _versions(run: Run, record: Mapping[str, Any]) -> str:
    def listed(packages: Mapping[str, str]) -> str:
        shown = ("clinical_nlp", "python", "torch", "transformers", "peft", "numpy")
        return ", ".join(f"{name} {packages[name]}" for name in shown if name in packages) or "not recorded"

    said = [f"This page: {listed(run.manifest.get('packages') or {})}."]
    if judged := record.get("judged"):
        if judged["base"]:
            revision = f" ({judged['revision'][:12]}…)" if judged["revision"] else ""
            name = str(judged["base"])
            short = "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name
            said.append(f"Base model: {short}{revision}.")
        if judged["recipe"]:
            said.append(f"The judged {judged['recipe']} run: {listed(judged['packages'])}.")
    return " ".join(said)
