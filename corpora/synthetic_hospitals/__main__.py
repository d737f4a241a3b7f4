"""Write a synthetic export: `python -m clinical_nlp.corpora.synthetic_hospitals --format fhir --output DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clinical_nlp.corpora.synthetic_hospitals import load
from clinical_nlp.corpora.synthetic_hospitals.content import BANKS
from clinical_nlp.corpora.synthetic_hospitals.exports import write_fhir, write_gold, write_omop, write_table
from clinical_nlp.errors import ClinicalNlpError


def main(arguments: list[str] | None = None) -> int:
    """Generate a corpus and write it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clinical_nlp.corpora.synthetic_hospitals",
                                     description="Write a synthetic export of clinical notes.")  # fmt: skip
    parser.add_argument("--format", choices=("fhir", "omop", "table"), default="fhir")
    parser.add_argument("--output", type=Path, required=True,
                        help="a new folder; for a table a file that ends in .csv, .parquet or .jsonl")  # fmt: skip
    parser.add_argument("--gold", type=Path, help="a new folder for the gold, with the note ids of the export")
    parser.add_argument("--parquet", action="store_true", help="OMOP tables as Parquet instead of CSV")
    parser.add_argument("--institutions", type=int, default=3)
    parser.add_argument("--patients", type=int, default=60, help="patients in each institution")
    parser.add_argument("--notes-per-patient", type=int, nargs=2, default=(2, 6), metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    for knob, default in (("covariate", 0.5), ("label", 0.0), ("concept", 0.0)):
        parser.add_argument(f"--{knob}", type=float, default=default, help="0 to 1")
    parser.add_argument("--spurious", type=float, nargs="+", default=[0.0], help="0 to 1, one or one an institution")
    parser.add_argument("--bank", choices=BANKS, default="development")
    chosen = parser.parse_args(arguments)
    try:
        corpus = load(
            institutions=chosen.institutions, patients=chosen.patients,
            notes_per_patient=tuple(chosen.notes_per_patient), seed=chosen.seed, covariate=chosen.covariate,
            label=chosen.label, concept=chosen.concept, bank=chosen.bank,
            spurious=chosen.spurious[0] if len(chosen.spurious) == 1 else chosen.spurious,
        )  # fmt: skip
        if chosen.format == "fhir":
            write_fhir(corpus, chosen.output)
        elif chosen.format == "omop":
            write_omop(corpus, chosen.output, parquet=chosen.parquet)
        else:
            write_table(corpus, chosen.output)
        if chosen.gold:
            write_gold(corpus, chosen.gold, format=chosen.format)
    except ClinicalNlpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {chosen.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{corpus.notes.num_rows} notes of {chosen.institutions * chosen.patients} patients from "
          f"{chosen.institutions} institutions written to {chosen.output}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
