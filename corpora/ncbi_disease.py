"""NCBI disease corpus: PubMed abstracts with disease mentions, in IOB form."""

from __future__ import annotations

from pathlib import Path

from clinical_nlp.corpora import _iob
from clinical_nlp.notes.corpus import Card, Corpus

CARD = Card(
    name="ncbi_disease",
    origin="https://github.com/cambridgeltl/MTL-Bioinformatics-2016 (data/NCBI-disease-IOB)",
    licence="CC BY 4.0 as stated by that repository",
    citation="Dogan RI, Leaman R, Lu Z. NCBI disease corpus. J Biomed Inform 2014;47:1-10; Crichton G et al. BMC "
    "Bioinformatics 2017;18:368.",
    size="793 abstracts: train 593, development 100, test 100; one label, Disease. The spacing of the abstracts is not "
    "in the files: tokens are joined by one space.",
    institution_means="one constant, ncbi_disease: PubMed abstracts have no institution",
    patient_means=_iob.PATIENT_MEANS,
    obtain="get train.tsv and devel.tsv from https://github.com/cambridgeltl/MTL-Bioinformatics-2016",
    folder="ncbi-disease",
)


def load(path: Path | None = None) -> Corpus:
    """Read `train.tsv`, `devel.tsv` and, where it is there, `test.tsv`: notes, spans, official parts."""
    return _iob.load(CARD, path)
