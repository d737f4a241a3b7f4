"""Merging a run: scored before and after on the same patients, and usable like any other run."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ModelError
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipes import dapt, merge, ner
from clinical_nlp.tasks.ner import NerPredictor

NOTES = {"corpus.options": {"patients": 40, "institutions": 1}, "max_steps": 8, "seed": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(folder / "decoder")), "encoder": str(write_encoder(folder / "encoder"))}


def trained(recipe, model, strategy, output):
    settings = {"base_model": model, "strategy.name": strategy, "training.learning_rate": 0.01, **NOTES}
    return recipe.run(load_config(recipe.CONFIG, None, settings), output)


@pytest.mark.parametrize("strategy", ["qlora", "ia3"])
def test_a_merged_tagger_scores_and_tags_as_before(models, tmp_path, strategy):
    run = trained(ner, models["decoder"], strategy, tmp_path / "ner")
    merged = merge.run(merge.MergeConfig(run=str(run.path)), tmp_path / "merged")
    assert merged.manifest["merging"]["largest_change_of_a_logit"] < 1e-3
    change = merged.metrics["test.f1_strict_change"]
    assert abs(change["value"]) < 0.01
    assert change["n_patients"] == merged.metrics["test.f1_strict"]["n_patients"] > 0
    assert merged.metrics["test.f1_strict_before"]["value"] == run.metrics["test.f1_strict"]["value"]
    texts = ["Mother denies fever, has cough.", "BP 120/80"]
    first, second = (NerPredictor.load(path).predict(texts) for path in (run.path, merged.path))
    assert [[span[:3] for span in spans] for spans in first] == [[span[:3] for span in spans] for spans in second]
    again = load_base(str(merged.path), bidirectional=True)
    assert (again.quantization, again.resolved.adapters) == ("none", ())


@pytest.mark.parametrize("model", ["decoder", "encoder"])
def test_a_merged_language_model_reads_as_before(models, tmp_path, model):
    run = trained(dapt, models[model], "lora", tmp_path / "dapt")
    merged = merge.run(merge.MergeConfig(run=str(run.path)), tmp_path / "merged")
    metric = "perplexity" if model == "decoder" else "pseudo_perplexity"
    assert merged.metrics[f"test.{metric}_ratio"]["value"] == pytest.approx(1.0, abs=1e-3)
    ids = torch.arange(5, 30).reshape(1, -1)
    with torch.inference_mode():
        first, second = (
            load_base(str(path)).network.eval()(input_ids=ids).last_hidden_state for path in (run.path, merged.path)
        )
    assert torch.allclose(first, second, atol=1e-4)


def test_a_run_without_an_adapter_is_refused(models, tmp_path):
    run = trained(ner, models["decoder"], "head", tmp_path / "ner")
    with pytest.raises(ModelError, match="no adapter"):
        merge.run(merge.MergeConfig(run=str(run.path)), tmp_path / "merged")
