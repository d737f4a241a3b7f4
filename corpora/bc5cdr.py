"""BioCreative V CDR: PubMed abstracts with chemical and disease mentions, in IOB form."""

from __future__ import annotations

from pathlib import Path

from clinical_nlp.corpora import _iob
from clinical_nlp.notes.corpus import Card, Corpus

CARD = Card(
    name="bc5cdr",
    origin="https://github.com/cambridgeltl/MTL-Bioinformatics-2016 (data/BC5CDR-IOB)",
    licence="CC BY 4.0 as stated by that repository",
    citation="Li J et al. BioCreative V CDR task corpus. Database 2016:baw068; Crichton G et al. BMC Bioinformatics "
    "2017;18:368.",
    size="1,500 abstracts: train 500, development 500, test 500; labels Chemical and Disease. The spacing of the "
    "abstracts is not in the files: tokens are joined by one space.",
    institution_means="one constant, bc5cdr: PubMed abstracts have no institution",
    patient_means=_iob.PATIENT_MEANS,
    obtain="get train.tsv and devel.tsv from https://github.com/cambridgeltl/MTL-Bioinformatics-2016",
    folder="bc5cdr",
)


def load(path: Path | None = None) -> Corpus:
    """Read `train.tsv`, `devel.tsv` and, where it is there, `test.tsv`: notes, spans, official parts."""
    return _iob.load(CARD, path)
