"""The recipe report: every metric beside its baselines, drafts that can be made again, and tuning on preferences."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from tiny_models import write_decoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError
from clinical_nlp.recipes import report
from clinical_nlp.tasks.faithfulness import COUNTS
from clinical_nlp.tasks.generation import Draft
from clinical_nlp.tasks.preferences import Preference
from clinical_nlp.tasks.report import Pair, load_reporter

CORPUS = {"institutions": 1, "patients": 60}
SYSTEMS = ("test", "baseline_copy_longest", "baseline_nearest", "baseline_zero_shot")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Return a randomly initialised decoder of 4,096 positions."""
    folder = write_decoder(tmp_path_factory.mktemp("decoder"), layers=1)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}), "utf-8")
    return str(folder)


def write(output, decoder, *, resume=False, **settings):
    common = {
        "base_model": decoder,
        "strategy.rank": 4,
        "corpus.options": CORPUS,
        "max_steps": 4,
        "max_new_tokens": 200,
        "too_long": "cut_source",
        "zero_shot_notes": 3,
        "training.save_steps": 2,
        "instructions.findings_impression": "Impression.",
    }
    return report.run(load_config(report.CONFIG, None, common | settings), output, resume=resume)


@pytest.fixture(scope="module")
def made(tmp_path_factory, decoder):
    """Return a finished run."""
    return write(tmp_path_factory.mktemp("runs") / "report", decoder)


def test_every_metric_is_reported_for_the_run_and_its_baselines(made):
    for system in SYSTEMS:
        for metric in ("rouge1", "rouge2", "rougeL", "fact_f1", "invention_rate", "flipped_rate", "side_error_rate",
                       "number_error_rate", "section_rougeL"):  # fmt: skip
            entry = made.metrics[f"{system}.{metric}"]
            assert entry["n_patients"] >= 1
            assert entry["value"] is not None or entry["note"].startswith("undefined")
            assert entry["low"] is not None or entry["note"]
    notes = {system: made.metrics[f"{system}.rouge1"]["n_notes"] for system in SYSTEMS}
    assert notes["test"] == notes["baseline_nearest"] == notes["baseline_copy_longest"]
    assert notes["baseline_zero_shot"] == 3
    scores = pq.read_table(made.path / "scores.parquet")
    assert {f"facts_{name}" for name in COUNTS} <= set(scores.column_names)
    assert set(scores["system"].to_pylist()) == set(SYSTEMS)
    assert [name for name in scores.column_names if scores[name].type == "string"] == [
        "system",
        "pair_id",
        "patient_id",
    ]


def test_what_is_written_is_marked_as_draft_and_declared(made):
    assert made.manifest["outputs_contain_phi"]
    assert made.manifest["generated_text"] == "draft, unreviewed"
    rows = pq.read_table(made.path / "generated.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"draft, unreviewed"}
    page = (made.path / "report.html").read_text("utf-8")
    assert "Drafts, unreviewed" in page
    assert "longest part copied" in page
    assert (made.path / "model_card.md").is_file()
    counts = made.manifest["training"]
    assert counts["pairs"] >= counts["trained_on"] > 0
    assert made.manifest["generation"]["n_notes"] == len(rows)


def test_a_finished_run_drafts_the_same_again(made):
    rows = pq.read_table(made.path / "generated.parquet").to_pylist()
    reporter = load_reporter(made.path)
    found = reporter([row["source"] for row in rows], batch_size=3)
    assert [draft.text for draft in found] == [row["generated"] for row in rows]
    assert {draft.status for draft in found} == {"draft, unreviewed"}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, decoder, monkeypatch):
    from clinical_nlp.training import trainer

    original = trainer.LossTerms.training_step
    steps = []

    def dies(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    whole = write(tmp_path / "whole", decoder)
    monkeypatch.setattr(trainer.LossTerms, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", decoder)
    monkeypatch.undo()
    resumed = write(tmp_path / "cut", decoder, resume=True)
    for name in ("adapter/adapter_model.safetensors", "generated.jsonl", "metrics.json"):
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes(), name


def test_preferences_are_tuned_from_a_report_run_on_the_same_patients(tmp_path, decoder, made, capsys):
    tuned = {"base_model": str(made.path), "preference.pairs": 12, "preference.own": 3}
    run = write(tmp_path / "dpo", decoder, **tuned)
    counts = run.manifest["training"]
    assert counts["preference_pairs"] > 0
    assert any(name.startswith("planted_") for name in counts)
    for name in ("flipped_rate", "rougeL", "fact_f1", "invention_rate"):
        assert run.metrics[f"change.{name}"]["n_notes"] == run.metrics[f"before.{name}"]["n_notes"]
    assert run.metrics["before.rouge1"]["value"] == made.metrics["test.rouge1"]["value"]
    assert "After tuning minus before" in (run.path / "report.html").read_text("utf-8")
    shown = capsys.readouterr()
    for row in pq.read_table(made.path / "generated.parquet").to_pylist():
        for line in [*row["source"].splitlines(), *row["generated"].splitlines()]:
            assert len(line) < 12 or line not in shown.out + shown.err
    assert load_reporter(run.path)(["Clear lungs."])

    hard = {"base_model": str(made.path), "preference.pairs": 6, "preference.candidates": 3,
            "preference.tokens": "differing", "preference.errors": ["finding_swapped", "negation"]}  # fmt: skip
    counts = write(tmp_path / "hard", decoder, **hard).manifest["training"]
    assert counts["preference_pairs"] == 6
    assert counts["preference_pairs"] == sum(n for name, n in counts.items() if name.startswith("planted_"))

    with pytest.raises(ConfigError, match="seed differs from that of run"):
        write(tmp_path / "seed", decoder, **tuned, seed=1)
    with pytest.raises(InputError, match="turned no finding round in 2 drafts"):
        write(tmp_path / "blank", decoder, **{"base_model": str(made.path), "preference.pairs": 0, "preference.own": 2})
    with pytest.raises(ConfigError, match="nothing to learn from: set pairs"):
        write(tmp_path / "empty", decoder, **{"base_model": str(made.path), "preference.pairs": 0})
    with pytest.raises(ConfigError, match="is none; run report without preference first"):
        write(tmp_path / "no", decoder, **{"preference.pairs": 3})


def test_what_a_model_turned_round_is_rejected_with_its_mirror_image():
    pair = Pair("1", "p1", "h", "Moderate hydronephrosis. No renal stone.", "Hydronephrosis.\nNo renal stone.")
    right = Draft("Hydronephrosis.\nNo renal stone.", stopped=True, tokens=8)
    turned = Draft("Hydronephrosis, as seen.\nNo hydronephrosis.", stopped=True, tokens=8)
    assert report.own_errors([pair, pair], [right, None]) == []
    one, image = report.own_errors([pair, pair], [turned, turned])
    assert one == Preference(pair.source, pair.target, "Hydronephrosis.\nNo hydronephrosis.")
    assert image == Preference(
        "Moderate renal stone. No hydronephrosis.", "Renal stone.\nNo hydronephrosis.", "Renal stone.\nNo renal stone."
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strategy.name": "head"}, ConfigError, "use qlora"),
        ({"training.patience": 1}, ConfigError, "patience"),
        ({"kind": "dialogue_notes"}, ConfigError, "did you mean 'dialogue_note'"),
        ({"kind": "dialogue_note"}, InputError, "it has findings_impression"),
        ({"instructions.letter": "Write."}, ConfigError, "kind 'letter' is not known"),
        ({"too_long": "error", "window": 160, "max_new_tokens": 100}, ConfigError, "sources are longer than the"),
        (
            {"too_long": "error", "max_new_tokens": 20},
            ConfigError,
            "training reports are longer than max_new_tokens 20",
        ),
    ],
)
def test_what_cannot_work_is_one_clear_error(tmp_path, decoder, settings, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "run", decoder, **settings)
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_pairs_is_refused(tmp_path, decoder):
    (tmp_path / "notes.csv").write_text("note_id,patient_id,institution,text\n1,1,a,Clear.\n", "utf-8")
    with pytest.raises(InputError, match="has no pairs of source and report"):
        write(tmp_path / "run", decoder, corpus={"name": "ehr_export", "path": str(tmp_path / "notes.csv"),
                                                       "options": {"format": "table"}})  # fmt: skip


def test_discharge_summaries_are_written_from_the_notes_of_a_stay(tmp_path, decoder):
    settings = {
        "corpus.options": CORPUS | {"notes_per_patient": [4, 6]},
        "kind": "notes_discharge",
        "max_steps": 1,
        "max_new_tokens": 1500,
        "zero_shot_notes": 0,
        "scored_notes": 2,
        "training.batch_size": 2,
    }
    run = write(tmp_path / "run", decoder, **settings)
    assert run.manifest["kind"] == "notes_discharge"
    assert run.manifest["inputs"]["encounters_without_discharge_summary"] > 0
    assert run.manifest["generation"]["n_notes"] == 2
    assert run.manifest["generation"]["sources_cut"] + run.manifest["training"]["sources_cut"] > 0
