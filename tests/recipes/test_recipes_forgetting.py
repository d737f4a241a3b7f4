"""Reading new notes, or learning to tag, while what the base knew is held on to."""

from __future__ import annotations

import pytest
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipes import dapt, ner

SOURCE = {"name": "synthetic_hospitals", "options": {"patients": 25, "institutions": 1, "seed": 3}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(folder / "decoder")), "encoder": str(write_encoder(folder / "encoder"))}


def read(model, output, **settings):
    common = {
        "base_model": model,
        "strategy.name": "full",
        "corpus.options": {"patients": 25, "institutions": 1},
        "max_steps": 8,
        "length": 128,
        "training.learning_rate": 1e-3,
        "training.weight_decay": 0.0,
    }
    return dapt.run(load_config(dapt.CONFIG, None, common | settings), output)


def moved(model, run):
    start = dict(load_base(model).network.named_parameters())
    end = dict(load_base(str(run.path)).network.named_parameters())
    return sum(float((end[name] - value).detach().square().sum()) for name, value in start.items())


@pytest.mark.parametrize("model", ["decoder", "encoder"])
@pytest.mark.parametrize("name", ["ewc", "l2_sp"])
def test_a_penalty_keeps_the_weights_nearer_to_where_they_were(models, tmp_path, model, name):
    plain = moved(models[model], read(models[model], tmp_path / "plain"))
    settings = {"forgetting.name": name, "forgetting.strength": 1000.0}
    settings |= {"forgetting.corpus": SOURCE, "forgetting.notes": 5} if name == "ewc" else {}
    held = moved(models[model], read(models[model], tmp_path / name, **settings))
    assert 0 < held < 0.95 * plain, (held, plain)


def test_a_penalty_where_the_base_does_not_move_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="does not move"):
        read(models["decoder"], tmp_path / "run", **{"strategy.name": "lora", "forgetting.name": "l2_sp"})


def tag(model, output, **settings):
    common = {
        "base_model": model,
        "strategy.name": "full",
        "corpus.options": {"patients": 40, "institutions": 1},
        "max_steps": 8,
        "training.learning_rate": 1e-3,
        "training.weight_decay": 0.0,
    }
    return ner.run(load_config(ner.CONFIG, None, common | settings), output)


@pytest.mark.parametrize("name", ["ewc", "l2_sp"])
def test_a_tagger_is_held_near_its_base_too(models, tmp_path, name):
    plain = moved(models["decoder"], tag(models["decoder"], tmp_path / "plain"))
    settings = {"forgetting.name": name, "forgetting.strength": 1000.0}
    settings |= {"forgetting.corpus": SOURCE, "forgetting.notes": 5} if name == "ewc" else {}
    held = moved(models["decoder"], tag(models["decoder"], tmp_path / name, **settings))
    assert 0 < held < 0.95 * plain, (held, plain)


def test_ewc_for_a_tagger_needs_a_base_that_can_read(models, tmp_path):
    with pytest.raises(ConfigError, match="l2_sp"):
        tag(models["encoder"], tmp_path / "run", **{"forgetting.name": "ewc", "forgetting.corpus": SOURCE})
