"""Propose codes for new notes with a finished coding run: each with its probability and the places it rests on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.errors import ConfigError
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.progress import progress, say
from clinical_nlp.recipes.coding import gather, listed
from clinical_nlp.recipes.ner import digest
from clinical_nlp.runs import Run, write_csv
from clinical_nlp.tasks import coding


class CodeConfig(Config):
    """Propose codes for new notes."""

    model: str = ""
    """Directory of the finished coding run."""
    corpus: CorpusConfig = CorpusConfig(name="ehr_export")
    """The new notes; ehr_export reads FHIR, OMOP, MIMIC and tables."""
    note_types: list[str] = Field(default_factory=list)
    """Only notes of these types are read, as in training; default all."""
    seed: int = 0
    """Part of every config; nothing is drawn here."""


CONFIG = CodeConfig
_AT_ONCE = 32


def run(config: CodeConfig, output: Path, *, resume: bool = False) -> Run:
    """Read the notes, propose codes for what the run was trained to code, and write proposals and review list."""
    if not config.model:
        raise ConfigError("code needs a finished coding run: --model RUN")
    with Run.open(output, config, recipe="code", resume=resume) as run:
        coder = coding.Coder.load(config.model)
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        unit = coder.task.unit
        note_rows, members, left_out = gather(corpus, unit, config.note_types)
        say(f"{len(members)} {unit}s to code; left out: {listed(left_out)}")
        texts = corpus.notes["text"]
        rows: list[dict[str, Any]] = []
        cut = 0
        with progress("code", len(members), unit=f"{unit}s") as bar:
            everything = list(members.items())
            for begin in range(0, len(everything), _AT_ONCE):
                group = everything[begin : begin + _AT_ONCE]
                documents = [[str(texts[note].as_py()) for note in notes] for _, notes in group]
                encoded = coder.encode(documents)
                cut += sum(document.cut > 0 for document in encoded)
                for (name, notes), proposed in zip(group, coder.predict(documents), strict=True):
                    patient = note_rows[notes[0]]["patient_id"]
                    about = {"institution": name[0], "unit_id": name[1], "patient_id": patient}
                    ids = [note_rows[note]["note_id"] for note in notes]
                    rows += [{**about, **line} for line in coding.proposal_rows(proposed, ids)]
                bar.advance(len(group))
        coding.write_proposals(run.path, rows, unit=unit)
        times = Counter((row["code"], row["label"]) for row in rows)
        lines = [{"code": code, "label": label, "proposed": count} for (code, label), count in times.most_common()]
        write_csv(run.path / "codes.csv", ["code", "label", "proposed"], lines)
        coded = len({(row["institution"], row["unit_id"]) for row in rows})
        counts = {f"{unit}s": len(members), f"{unit}s_without_a_code": len(members) - coded}
        counts |= {"proposed": len(rows), "to_review": sum(row["review"] for row in rows), f"{unit}s_cut": cut}
        say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        run.note(
            inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows, "notes_sha256": digest(corpus)},
            base_model=str(config.model),
            predictions=counts,
            left_out=dict(left_out),
        )
    from clinical_nlp.reporting.page import run_report

    run_report(run)
    return run


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.model_card import making, origin, phi_text
    from clinical_nlp.reporting.page import Notice, Section, Table, Text, page

    manifest = run.manifest
    counts = [[name.replace("_", " "), count] for name, count in manifest["predictions"].items()]
    left_out = [[f"left out: {name}", count] for name, count in manifest["left_out"].items()]
    doubt = Notice(
        "Proposed codes are drafts: a coder decides. review.csv lists the doubtful ones, least probable first."
    )
    return page(
        f"code: {run.path.name}",
        [
            Section("What was proposed", [doubt, Table([], [*counts, *left_out])]),
            Section("What it was made from", [Table([], origin(run))]),
            Section("How it was made", [Table([], making(run)), Text(phi_text(run))]),
        ],
        footer="predictions.parquet has each code with its probability and the places in the notes that it rests on.",
    )
