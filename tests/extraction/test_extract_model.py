"""The model lane: its entities join the dictionary's, and a text that the model fails on costs only itself."""

import pyarrow.parquet as pq
import pytest
from conftest import MARKER, tree

from clinical_nlp.errors import MissingDataError
from clinical_nlp.extraction import extract


class Predictor:
    """Marks every "arrival" and "cough", and fails on any batch with the marked note in it."""

    def predict(self, texts):
        if any(MARKER in text for text in texts):
            raise RuntimeError(texts)
        found = []
        for text in texts:
            places = [(text.find(word), word) for word in ("arrival", "cough")]
            found.append([(start, start + len(word), "problem", 0.87654321) for start, word in places if start >= 0])
        return found


@pytest.fixture
def model(tmp_path, monkeypatch):
    from clinical_nlp.tasks.ner import NerPredictor

    monkeypatch.setattr(NerPredictor, "load", classmethod(lambda cls, run: Predictor()))
    folder = tmp_path / "ner"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "task.json").write_text('{"task": "ner"}')
    return folder


def test_lanes(export, options, model, tmp_path, capfd):
    result = extract(export, output=tmp_path / "out", model=model, **options)
    assert result.rejected_by_reason["RuntimeError"] == 1
    mentions = pq.read_table(tmp_path / "out" / "mentions").to_pylist()
    lanes = {(row["note_id"], row["text"]): row for row in mentions}
    assert lanes["a1", "arrival"]["lane"] == "model"
    assert lanes["a1", "arrival"]["concept_id"] is None
    assert lanes["a1", "arrival"]["score"] == 0.8765
    assert lanes["a1", "cough"]["lane"] == "both"
    assert lanes["a1", "cough"]["concept_id"] == "HP:0012735"
    assert lanes["a1", "fever"]["lane"] == "dictionary"
    assert not any(row["note_id"] == "a7" for row in mentions)
    # A mention without a concept is in no patient's list.
    assert None not in {row["concept_id"] for row in pq.read_table(tmp_path / "out" / "patients").to_pylist()}
    assert MARKER not in "".join(capfd.readouterr())
    extract(export, output=tmp_path / "again", model=model, **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_a_model_that_is_not_there(export, options, tmp_path):
    with pytest.raises(MissingDataError):
        extract(export, output=tmp_path / "out", model=tmp_path / "none", **options)
