"""The page of a report run: what is doubtful is marked where it stands and named, and text is escaped."""

from __future__ import annotations

import numpy as np

from clinical_nlp.config import Config
from clinical_nlp.reporting.page import Marked
from clinical_nlp.reporting.report_page import report_page
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.tasks.faithfulness import compare_facts
from clinical_nlp.tasks.generation import Draft
from clinical_nlp.tasks.report import Pair, write_drafts
from clinical_nlp.tasks.report_scores import Measured, write_scores


class Empty(Config):
    """A config for a run of a test."""

    seed: int = 0


def page_of(tmp_path, source, reference, generated):
    pairs = [Pair("p1", "q1", "a", source, reference), Pair("p2", "q2", "a", source, reference)]
    texts = [reference, generated]
    facts = np.array([compare_facts(text, reference, source=source).counts() for text in texts])
    with Run.open(tmp_path / "run", Empty(), recipe="report") as run:
        write_drafts(run.path, pairs, [Draft(text, text is generated, 5) for text in texts])
        found = Measured(facts=facts, rouge=np.ones((2, 3)), sections=np.zeros((2, 4)))
        write_scores(run.path, [("test", ["p1", "p2"], ["q1", "q2"], found)])
        nan = float("nan")
        run.record(
            {
                "test.fact_f1": Estimate(0.5, nan, nan, 2, 2, note="fewer than 20 patients"),
                "test.side_error_rate": Estimate(
                    nan, nan, nan, 2, 2, note="undefined: no side is stated in both texts"
                ),
                "baseline_nearest.fact_f1": Estimate(0.25, nan, nan, 2, 2, note="fewer than 20 patients"),
            }
        )
        run.note(kind="findings_impression")
    return report_page(run)


def test_every_doubtful_statement_is_marked_and_named(tmp_path):
    page = page_of(
        tmp_path,
        "There is a left pleural effusion. No pneumothorax. Calcium <b>9</b> mg/dL.",
        "Left pleural effusion. No pneumothorax.",
        "Right pleural effusion. Pneumothorax. Pneumonia.",
    )
    assert '<mark class="bad" title="not in the source: present">Pneumonia</mark>' in page
    assert "The source says otherwise" in page
    assert "Another side" in page
    assert "&lt;b&gt;9&lt;/b&gt;" in page
    assert "<b>9</b>" not in page
    assert "draft, unreviewed" in page
    assert "side error rate (no side is stated in both texts)" in page
    assert page.index("Note p2") < page.index("Note p1"), "the worst comes first"
    assert "<script" not in page
    assert "Below a baseline" not in page


def test_a_run_that_copying_beats_is_not_to_be_used(tmp_path):
    page_of(tmp_path, "No effusion.", "No effusion.", "Effusion.")
    run = Run.load(tmp_path / "run")
    run.record({"baseline_copy_longest.fact_f1": Estimate(0.9, 0.8, 0.95, 30, 30)})
    page = report_page(run)
    assert "does no better than: longest part copied (0.900 (0.800 to 0.950))" in page


def test_marked_passages_do_not_overlap_and_keep_the_text():
    marked = Marked("no pleural effusion", [(3, 10, "bad", "a"), (0, 5, "caution", "b"), (11, 19, "good", "c")])
    assert "".join(text for text, _, _ in marked.pieces) == "no pleural effusion"
    assert [why for _, tone, why in marked.pieces if tone] == ["b", "c"]
