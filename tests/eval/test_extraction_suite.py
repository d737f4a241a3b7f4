"""The suite `extraction` runs from one command, and another seed of the corpus changes its figures."""

from __future__ import annotations

from clinical_nlp.config import load_config
from clinical_nlp.recipe import find_recipe, list_recipes
from clinical_nlp.recipes.adapt import estimate


def evaluate(output, seed):
    suite = find_recipe("extraction", "eval")
    options = {"institutions": 2, "patients": 12, "seed": seed, "bank": "held_out"}
    config = load_config(suite.load().CONFIG, None, {"corpus.options": options})
    return suite.load().run(config, output)


def test_the_suite_scores_what_it_extracted(tmp_path):
    assert "extraction" in {suite.name for suite in list_recipes("eval")}
    run = evaluate(tmp_path / "a", 1)
    found = {name: estimate(entry) for name, entry in run.metrics.items()}
    assert found["patient_f1"].n_patients == 24
    assert found["patient_f1"].low < found["patient_f1"].value < found["patient_f1"].high
    assert found["presence_accuracy"].value > 0.5
    page = (run.path / "report.html").read_text("utf-8")
    assert "For judging this evaluation" in page
    assert "Nothing is trained." in page
    assert not (run.path / "notes.parquet").exists()
    again = evaluate(tmp_path / "b", 1)
    assert again.metrics == run.metrics
    assert evaluate(tmp_path / "c", 2).metrics != run.metrics
