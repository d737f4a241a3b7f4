"""The pairs of the synthetic hospitals: what an impression may say."""

from collections import Counter

import pytest

from clinical_nlp.corpora.synthetic_hospitals import generate


@pytest.mark.parametrize("bank", ["development", "held_out"])
def test_an_impression_states_only_what_its_findings_state(bank):
    kinds, sides = Counter(), Counter()
    for item in generate(institutions=2, patients=200, bank=bank):
        for pair in item.pairs:
            stated = []
            for part in pair[4:6]:
                start = item.note.text.rindex(part)
                stated.append({row[13] for row in item.spans if start <= row[2] and row[3] <= start + len(part)})
            assert stated[1] <= stated[0], item.note.note_id
            assert stated[1], item.note.note_id
            concluded = [row for row in item.facts if row[0] in stated[1]]
            kinds.update(row[8] for row in concluded)
            sides.update(row[12] for row in concluded)
    assert min(kinds[name] for name in ("present", "absent", "uncertain")) > 20
    assert min(sides[name] for name in ("left", "right", None)) > 10
