"""Drafts checked against their source: marked, or without the sentences that it does not bear out."""

from __future__ import annotations

from clinical_nlp.tasks.generation import Draft, verified

SOURCE = "There is a left pleural effusion. No pneumothorax. The heart is normal in size."
TEXT = "Left pleural effusion. Pneumonia. No pneumothorax."


def marked(text, verify="mark"):
    """Return the draft, and the words that are marked in it."""
    draft = verified(Draft(text, True, 10), SOURCE, verify)
    return draft, [draft.text[start:end].lower() for start, end, _ in draft.unsupported]


def test_a_marked_draft_keeps_its_text():
    draft, words = marked(TEXT)
    assert draft.text == TEXT
    assert words == ["pneumonia"]
    assert draft.dropped == 0


def test_what_the_source_says_otherwise_is_marked_too():
    draft, words = marked("Left pleural effusion. Pneumothorax.")
    assert words == ["pneumothorax"]
    assert draft.unsupported[0][2] == "the source says otherwise"


def test_dropped_sentences_are_counted_and_the_rest_stays_as_it_was():
    draft, words = marked(TEXT, "drop")
    assert draft.text == "Left pleural effusion. No pneumothorax."
    assert words == []
    assert draft.dropped == 1
    lines, _ = marked("- Left pleural effusion.\n- Pneumonia.\n- No pneumothorax.", "drop")
    assert lines.text == "- Left pleural effusion.\n- No pneumothorax."


def test_a_draft_that_holds_nothing_else_becomes_empty():
    draft, _ = marked("Pneumonia.", "drop")
    assert (draft.text, draft.dropped) == ("", 1)
