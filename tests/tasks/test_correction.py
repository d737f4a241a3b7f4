"""A draft is set right in its own words; what cannot be is replaced by the reference."""

from __future__ import annotations

import pytest

from clinical_nlp.tasks.correction import corrected
from clinical_nlp.tasks.faithfulness import compare_facts

SOURCE = "Again seen: left pleural effusion. There is cardiomegaly. There is no evidence of pneumothorax."
REFERENCE = "- Left pleural effusion.\n- Enlarged heart.\n- No pneumothorax."


@pytest.mark.parametrize(
    ("draft", "wanted"),
    [
        (
            "- Left pleural effusion, as described above.\n- Cardiomegaly.\n- Pneumothorax.",
            "- Left pleural effusion, as described above.\n- Cardiomegaly.\n- No pneumothorax.",
        ),
        (
            "- Right pleural effusion.\n- Cardiomegaly.\n- Without pneumothorax.",
            "- Left pleural effusion.\n- Cardiomegaly.\n- Without pneumothorax.",
        ),
        (
            "- Left pleural effusion.\n- Pneumonia.\n- Without pneumothorax.",
            "- Left pleural effusion.\n- Enlarged heart.\n- Without pneumothorax.",
        ),
        (
            "- Left pleural effusion.\n- Cardiomegaly.\n- Pneumonia.\n- Without pneumothorax.",
            "- Left pleural effusion.\n- Cardiomegaly.\n- Without pneumothorax.",
        ),
    ],
)
def test_only_the_wrong_sentence_changes(draft, wanted):
    assert corrected(draft, REFERENCE, SOURCE) == wanted


def test_what_comes_out_has_no_error():
    for draft in ("", "Asthma.", "- Left pleural effusion.", "- Pneumothorax. Right pleural effusion."):
        text = corrected(draft, REFERENCE, SOURCE)
        assert not compare_facts(text, REFERENCE, source=SOURCE).errors
