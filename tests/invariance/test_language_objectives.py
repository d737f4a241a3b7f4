"""Objectives on language models: pretraining and report writing, of what institution each document is, what is read."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, TooFewPatientsError
from clinical_nlp.invariance.language_attachment import MarkedRows, _read_causal, _read_masked, _read_states
from clinical_nlp.invariance.objectives import ObjectiveConfig
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipes import dapt, report
from clinical_nlp.tasks.report import load_reporter

NAMES = ("coral", "dann", "group_dro", "irm", "mmd", "vrex")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("models")
    encoder = write_encoder(root / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.save_pretrained(encoder)
    writer = write_decoder(root / "writer", layers=1)
    settings = json.loads((writer / "config.json").read_text("utf-8"))
    (writer / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}), "utf-8")
    return {"decoder": str(write_decoder(root / "decoder")), "encoder": str(encoder), "writer": str(writer)}


# Rows -----------------------------------------------------------------------------------------------------------------

PACKED = pa.table(
    {
        "institution": [["b", "a"], ["a"], ["replayed", "a"]],
        "patient_id": [["p", "p"], ["q"], ["p", "p"]],
    }
)
ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]},
    {"input_ids": [6, 7], "seq_lengths": [2]},
    {"input_ids": [8, 9, 9], "seq_lengths": [1, 2]},
]


def test_each_document_of_a_row_has_its_institution_and_patient():
    rows = MarkedRows(ROWS, PACKED, counted=2)
    assert rows.names == ["a", "b"]
    assert rows.n_patients == [2, 1]
    assert rows.balance is None
    documents = [rows[place][1] for place in range(3)]
    assert [[(length, where) for length, where, _ in row] for row in documents] == [
        [(2, 1), (3, 0)],
        [(2, 0)],
        [(1, -1), (2, -1)],
    ]
    people = {who for row in documents[:2] for _, _, who in row}
    assert len(people) == 3  # p of one institution is not p of the other
    assert min(people) >= 0


def test_rows_of_one_document_each_can_be_balanced():
    table = pa.table({"institution": ["b", "a", "b"], "patient_id": ["1", "2", "3"]})
    assert MarkedRows(ROWS, table).balance == [1, 0, 1]
    listed = pa.table({"institution": [["b"], ["a"], ["b"]], "patient_id": [["1"], ["2"], ["3"]]})
    assert MarkedRows(ROWS, listed).balance == [1, 0, 1]
    assert MarkedRows(ROWS, listed, counted=2).balance is None


def batch(rows=ROWS[:2], counted=2):
    def plain(items):
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.tensor([item["input_ids"] + [0] * (width - len(item["input_ids"])) for item in items])
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}

    marked = MarkedRows(ROWS, PACKED, counted=counted)
    return MarkedRows.collate(plain)([marked[place] for place in range(len(rows))]) | {"step": 0}


def test_pooled_states_are_the_means_of_documents_and_padding_belongs_to_nobody():
    inputs, hidden = batch(), torch.randn(2, 5, 4)
    found = _read_states(ObjectiveConfig(name="mmd"), hidden, inputs, 0, prompts=False)
    wanted = torch.stack([hidden[0, :2].mean(0), hidden[0, 2:].mean(0), hidden[1, :2].mean(0)])
    assert torch.allclose(found["representation"], wanted)
    assert found["institution"].tolist() == [1, 0, 0]
    tokens = _read_states(ObjectiveConfig(name="mmd", level="token"), hidden, inputs, 0, prompts=False)
    assert tokens["representation"].shape == (7, 4)
    assert tokens["institution"].tolist() == [1, 1, 0, 0, 0, 0, 0]


def test_of_a_prompt_and_its_report_the_prompt_is_aligned():
    inputs, hidden = batch(), torch.randn(2, 5, 4)
    inputs["labels"][0, :1] = -100
    inputs["labels"][0, 2:4] = -100
    inputs["labels"][1, :1] = -100
    found = _read_states(ObjectiveConfig(name="mmd"), hidden, inputs, 0, prompts=True)
    wanted = torch.stack([hidden[0, :1].mean(0), hidden[0, 2:4].mean(0), hidden[1, :1].mean(0)])
    assert torch.allclose(found["representation"], wanted)


def test_losses_of_tokens_are_those_of_the_model():
    inputs, hidden, head = batch(), torch.randn(2, 5, 4), torch.nn.Linear(4, 11, bias=False)
    found = _read_causal(head, hidden, inputs, 0)
    each = torch.nn.functional.cross_entropy(
        head(hidden)[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
    )
    there = inputs["labels"][:, 1:] != -100
    assert torch.allclose(found["losses"](found["logits"]), each[there])
    assert found["label"].tolist() == inputs["labels"][:, 1:][there].tolist()
    assert found["institution"].tolist() == inputs["institution"][:, :-1][there].tolist()
    masked = _read_masked(head(hidden)[inputs["labels"] != -100], inputs, shift=False)
    assert masked["institution"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert len(masked["losses"](masked["logits"])) == 7


# Pretraining ----------------------------------------------------------------------------------------------------------


def adapt(output, base, **keys):
    options = {
        "base_model": base,
        "strategy": {"name": "lora", "rank": 4},
        "corpus.options": {"institutions": 2, "patients": 10, "notes_per_patient": [1, 1]},
        "length": 64,
        "deduplicate": None,
        "max_steps": 3,
        "training.batch_size": 6,
        **keys,
    }
    return dapt.run(load_config(dapt.CONFIG, None, options), output)


def weights(run):
    return load_file(next((run.path / "adapter").glob("*.safetensors")))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def attached(monkeypatch):
    """Attach objectives of weight 0 too, so that it is the penalty that must be nothing."""
    monkeypatch.setattr(ObjectiveConfig, "is_active", property(lambda config: config.name != "erm"))


@pytest.fixture(scope="module")
def erm(tmp_path_factory, models):
    root = tmp_path_factory.mktemp("erm")
    return {base: weights(adapt(root / base, models[base])) for base in ("decoder", "encoder")}


@pytest.mark.parametrize(
    ("base", "name"), [*(("decoder", name) for name in NAMES), ("encoder", "dann"), ("encoder", "irm")]
)
def test_pretraining_with_weight_0_is_erm_bit_for_bit_and_with_a_weight_it_is_not(
    tmp_path, models, erm, attached, base, name
):
    nothing = adapt(tmp_path / "nothing", models[base], objective={"name": name, "weight": 0.0})
    assert same(weights(nothing), erm[base])
    asked = adapt(tmp_path / "asked", models[base], objective={"name": name, "weight": 5.0, "warmup": 0.0})
    assert not same(weights(asked), erm[base])
    assert all(torch.isfinite(value).all() for value in weights(asked).values())
    assert asked.manifest["invariance"] == {"name": name, "between": ["hospital-1", "hospital-2"]}
    checkpoint = load_file(asked.checkpoints / "checkpoint-3" / "trainable.safetensors")
    assert bool([key for key in checkpoint if key.startswith("objective.")]) == (name in ("dann", "group_dro"))
    assert not [key for key in weights(asked) if "objective" in key]


@pytest.mark.parametrize(
    ("keys", "base"),
    [
        ({"strategy": {"name": "qlora", "rank": 4}}, "decoder"),
        ({"strategy": "full"}, "decoder"),
        ({"strategy": "full", "batching": "bucketed"}, "encoder"),
        ({"attention": "bidirectional"}, "decoder"),
        ({"replay": {"name": "synthetic_hospitals", "ratio": 0.3, "options": {"seed": 5, "patients": 6}}}, "decoder"),
    ],
    ids=["qlora", "full", "bucketed", "bidirectional", "replay"],
)
def test_it_goes_with_every_way_to_pretrain(tmp_path, models, keys, base):
    objective = {"name": "vrex" if "attention" in keys else "dann", "weight": 1.0}
    run = adapt(tmp_path / "run", models[base], objective=objective, **keys)
    assert run.manifest["invariance"]["between"] == ["hospital-1", "hospital-2"]
    loaded = load_base(str(run.path), kind="backbone")
    assert not [name for name, _ in loaded.network.named_parameters() if "objective" in name]


def test_streamed_notes_are_aligned_from_the_file_they_are_read_from(tmp_path, models):
    lines = ["note_id,patient_id,institution,note_type,text"]
    lines += [f"{n},p{n // 2},{'AB'[n // 2 % 2]},progress,note {n} says fever and cough" for n in range(80)]
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n", "utf-8")
    corpus = {"name": "ehr_export", "path": str(tmp_path / "notes.csv"), "options": {"format": "table"}}
    keys = {"corpus": corpus, "corpus.options": {"format": "table"}, "stream": True}
    run = adapt(tmp_path / "run", models["decoder"], objective="coral", **keys)
    assert run.manifest["invariance"] == {"name": "coral", "between": ["A", "B"]}
    plain = adapt(tmp_path / "plain", models["decoder"], **keys)
    assert not same(weights(run), weights(plain))


def test_what_a_language_model_has_no_labels_for_is_refused(tmp_path, models):
    target = {"name": "synthetic_hospitals"}
    for objective, message in (
        ({"name": "cdan"}, "use dann, mmd"),
        ({"name": "mcd", "target": target}, "use dann, mmd"),
        ({"name": "dann", "conditional": True}, "no label to align within"),
        ({"name": "dann", "target": target}, "put the notes into the corpus"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(tmp_path / "run", models["decoder"], objective=objective)
    with pytest.raises(TooFewPatientsError, match="compares institutions"):
        alone = {"corpus.options": {"institutions": 1, "patients": 10, "notes_per_patient": [1, 1]}}
        adapt(tmp_path / "run", models["decoder"], objective="dann", **alone)
    with pytest.raises(ConfigError, match="set at least 4"):
        keys = {"batching": "bucketed", "training.batch_size": 2}
        adapt(tmp_path / "run", models["decoder"], objective="dann", **keys)


# Reports --------------------------------------------------------------------------------------------------------------


def write(output, base, **keys):
    options = {
        "base_model": base,
        "strategy": {"name": "lora", "rank": 4},
        "corpus.options": {"institutions": 2, "patients": 20},
        "max_steps": 2,
        "max_new_tokens": 120,
        "too_long": "cut_source",
        "zero_shot_notes": 0,
        "scored_notes": 2,
        "instructions.findings_impression": "Impression.",
        **keys,
    }
    return report.run(load_config(report.CONFIG, None, options), output)


def test_reports_are_written_after_aligning_their_sources(tmp_path, models, attached):
    erm = weights(write(tmp_path / "erm", models["writer"], **{"training.batch_size": 6}))
    common = {"training.batch_size": 6, "objective.balanced": False, "objective.warmup": 0.0}
    for name in ("coral", "irm"):
        named = {**common, "objective.name": name}
        nothing = write(tmp_path / f"{name} 0", models["writer"], **named, **{"objective.weight": 0.0})
        assert same(weights(nothing), erm)
        asked = write(tmp_path / name, models["writer"], **named, **{"objective.weight": 50.0})
        assert not same(weights(asked), erm)
        assert asked.manifest["objective"] == {"name": name, "between": ["hospital-1", "hospital-2"]}
        assert load_reporter(asked.path)


def test_reports_with_a_four_bit_base_and_what_does_not_go(tmp_path, models):
    run = write(tmp_path / "run", models["writer"], strategy={"name": "qlora", "rank": 4}, objective="dann")
    assert run.manifest["objective"]["name"] == "dann"
    with pytest.raises(ConfigError, match="goes with learning to write"):
        write(tmp_path / "other", models["writer"], objective="dann", preference={})
