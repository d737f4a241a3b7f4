"""Assertion as marked-up sentences: `No <span presence=absent>fever</span>.` Add a line to the file to add a case."""

import json
import re
from pathlib import Path

import pytest

from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY

AXES = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}
PLAIN = {"presence": "present", "temporality": "current", "modality": "actual", "experiencer": "patient"}
MARK = re.compile(r"<span((?: \w+=\w+)*)>(.*?)</span>", re.DOTALL)


def parse(marked):
    """Return the plain text and [(start, end, expected axes)]; what a mark does not say is plain."""
    text, spans, last = "", [], 0
    for found in MARK.finditer(marked):
        text += marked[last : found.start()]
        expected = PLAIN | dict(pair.split("=") for pair in found[1].split())
        assert all(value in AXES[axis] for axis, value in expected.items())
        spans.append((len(text), len(text) + len(found[2]), expected))
        text += found[2]
        last = found.end()
    return text + marked[last:], spans


CASES = [json.loads(line)["text"] for line in (Path(__file__).parent / "assertion_cases.jsonl").open(encoding="utf-8")]


def test_there_are_enough_cases():
    assert len(CASES) >= 300
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("marked", CASES)
def test_case(marked):
    text, spans = parse(marked)
    results = assert_spans(text, [span[:2] for span in spans])
    for (start, end, expected), result in zip(spans, results, strict=True):
        got = {axis: getattr(result, axis) for axis in AXES}
        assert got == expected, text[start:end]
        for axis, plain in PLAIN.items():
            if got[axis] != plain:  # every departure from plain shows its evidence
                assert any(cue[0] == got[axis] and 0 <= cue[1] < cue[2] <= len(text) for cue in result.cues)
