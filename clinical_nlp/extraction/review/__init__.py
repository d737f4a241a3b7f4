"""The loop with people: a sample for readers, their corrections back, and what they say about the extraction.

    export_review(output, folder, ...) -> Drawn
    import_review(output, folder, ...) -> Reviewed

`sampling` draws patients and notes with known probabilities, `exchange` writes and reads what readers work on,
`accuracy` turns their corrections into agreement and design-weighted estimates.
"""

from __future__ import annotations

from clinical_nlp.extraction.review.exchange import Drawn, Reviewed, export_review, import_review

__all__ = ["Drawn", "Reviewed", "export_review", "import_review"]
