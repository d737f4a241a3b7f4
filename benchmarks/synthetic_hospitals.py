"""Speed of the synthetic hospitals on one core: `python benchmarks/synthetic_hospitals.py > result.json`.

Processor time is measured, the best of several rounds, so that other work on the machine counts as little as it can.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time

from clinical_nlp.corpora.synthetic_hospitals import generate, load

ROUNDS, PATIENTS, INSTITUTIONS = 5, 400, 3


def main() -> None:
    """Time generation note by note and as tables; print one JSON object."""
    streaming, tables, words = [], [], 0
    n_notes = n_spans = 0
    for _ in range(ROUNDS):
        began = time.process_time()
        n_notes = n_spans = words = 0
        for item in generate(institutions=INSTITUTIONS, patients=PATIENTS):
            n_notes += 1
            n_spans += len(item.spans)
            words += len(item.note.text.split())
        streaming.append(n_notes / (time.process_time() - began))
    after_streaming = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(ROUNDS):
        began = time.process_time()
        corpus = load(institutions=INSTITUTIONS, patients=PATIENTS)
        tables.append(corpus.notes.num_rows / (time.process_time() - began))
    result = {
        "benchmark": "synthetic_hospitals",
        "machine": {"processor": _processor(), "python": platform.python_version(), "system": platform.platform()},
        "notes": n_notes,
        "words_per_note": round(words / n_notes, 1),
        "spans_per_note": round(n_spans / n_notes, 1),
        "generate_notes_per_second": round(max(streaming)),
        "load_notes_per_second": round(max(tables)),
        "rounds": ROUNDS,
        "peak_memory_streaming_mib": round(after_streaming / 1024),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
