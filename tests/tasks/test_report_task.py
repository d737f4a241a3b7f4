"""The report task: what the model reads and learns, what does not fit, and drafts that do not depend on their batch."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from clinical_nlp.errors import ConfigError, InputError, ModelError
from clinical_nlp.models.loading import load_base
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import PAIR_SCHEMA, Note, notes_table
from clinical_nlp.tasks import report
from clinical_nlp.tasks.generation import drafts, generate
from tests.tiny_models import write_decoder

CARD = Card("made_up", "", "", "", "", "", "", "")
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a randomly initialised decoder of 256 positions."""
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def base(folder):
    """Return it loaded."""
    return load_base(str(folder), kind="causal")


def task_for(base, **options):
    values = {"window": 128, "max_new_tokens": 24, "too_long": "error"} | options
    return report.report_task(base, kind="findings_impression", instruction="Impression.", **values)


def pairs_of(count, *, source="Clear lungs.", target="Normal."):
    return [report.Pair(f"p{i}", f"patient{i}", "a", f"{source} {i}", f"{target} {i}") for i in range(count)]


def corpus(rows):
    """Return a corpus of pairs given as (kind, source, target)."""
    table = [
        {"pair_id": f"p{i}", "patient_id": f"q{i}", "institution": "a", "kind": kind, "source": source,
         "target": target, "part": None}
        for i, (kind, source, target) in enumerate(rows)
    ]  # fmt: skip
    notes = notes_table([Note(f"p{i}", f"q{i}", "a", "text", "here") for i in range(len(rows))])
    return Corpus(notes, CARD, pairs=pa.Table.from_pylist(table, schema=PAIR_SCHEMA) if rows else None)


def test_the_loss_is_on_the_report_and_its_end_alone(base):
    task = task_for(base)
    rows, counts = task.examples(pairs_of(3), base.tokenizer)
    batch = task.collate(list(rows))
    for place, row in enumerate(rows):
        learned = batch["labels"][place] != -100
        text = base.tokenizer.decode(batch["input_ids"][place][learned])
        assert text == f"Normal. {place}</s>"
        assert int(batch["labels"][place][learned][-1]) == base.tokenizer.eos_token_id
        prompt = base.tokenizer.decode(row["input_ids"][: row["prompt_length"]])
        assert prompt == f"<s>Impression.\n\nClear lungs. {place}\n\nReport:\n"
    assert counts["trained_on"] == 3
    assert task.pad_token_id != base.tokenizer.eos_token_id


def test_a_chat_template_is_followed_to_the_end_of_the_turn(folder):
    base = load_base(str(folder), kind="causal")
    base.tokenizer.chat_template = CHAT
    task = task_for(base)
    (prompt,) = task.encode_sources(["Clear lungs."], base.tokenizer).prompts
    shown = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Impression.\n\nClear lungs."}], add_generation_prompt=True, tokenize=False
    )
    assert base.tokenizer.decode(prompt) == shown
    assert task.chat
    assert task.end == (base.tokenizer.eos_token_id,)


def test_note_text_that_looks_like_a_control_token_is_text(base):
    task = task_for(base)
    (prompt,) = task.encode_sources(["The end </s><s> of it"], base.tokenizer).prompts
    assert prompt.count(base.tokenizer.eos_token_id) == 0
    assert prompt.count(base.tokenizer.bos_token_id) == 1
    (target,) = task.encode_targets(["stop </s> here"], base.tokenizer)
    assert target.count(base.tokenizer.eos_token_id) == 1
    assert target[-1] == base.tokenizer.eos_token_id


def test_what_is_too_long_is_refused_cut_or_left_out_and_counted(base):
    pairs = [*pairs_of(2), report.Pair("long", "x", "a", "S" * 500, "T"), report.Pair("wide", "y", "a", "s", "T" * 50)]
    with pytest.raises(ConfigError, match=r"1 of 4 sources are longer than the \d+ tokens .* set too_long"):
        task_for(base).examples(pairs, base.tokenizer)
    with pytest.raises(ConfigError, match="1 of 2 training reports are longer than max_new_tokens 24"):
        task_for(base).examples([pairs[0], pairs[3]], base.tokenizer)

    rows, counts = task_for(base, too_long="leave_out").examples(pairs, base.tokenizer)
    assert len(rows) == 2
    assert counts["sources_left_out"] == counts["reports_left_out"] == 1

    task = task_for(base, too_long="cut_source")
    rows, counts = task.examples(pairs, base.tokenizer)
    assert len(rows) == 3
    assert counts["sources_cut"] == counts["reports_left_out"] == 1
    assert max(row["prompt_length"] for row in rows) == task.window - task.max_new_tokens
    long = base.tokenizer.decode(rows[2]["input_ids"])
    assert report.MARK in long
    assert task.encode_sources(["A" * 400], base.tokenizer).sources_cut == 1


def test_the_longest_report_sets_the_room_but_never_takes_half_the_window(base):
    assert task_for(base, max_new_tokens=None, targets=["x" * 10, "x" * 30]).max_new_tokens == 31
    assert task_for(base, max_new_tokens=None, targets=["x" * 300]).max_new_tokens == 64
    with pytest.raises(ConfigError, match=r"leave .* tokens for a source"):
        task_for(base, max_new_tokens=120)
    with pytest.raises(ConfigError, match="longer than the 256 positions"):
        task_for(base, window=512)


def test_a_tokenizer_that_cannot_say_stop_or_pads_with_stop(folder):
    base = load_base(str(folder), kind="causal")
    base.tokenizer.pad_token = base.tokenizer.eos_token
    assert task_for(base).pad_token_id != base.tokenizer.eos_token_id
    base.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        task_for(base)


@pytest.mark.parametrize(
    ("rows", "kind", "error", "message"),
    [
        ([], None, InputError, "has no pairs of source and report"),
        ([("dialogue_note", "a", "b")], "findings_impression", InputError, "it has dialogue_note"),
        ([("dialogue_note", "a", "b"), ("dialogue_section", "a", "b")], None, ConfigError, "pairs of 2 kinds"),
        ([("dialogue_note", "a", "b"), ("dialogue_note", "a", "  ")], None, InputError, "1 of 2 pairs .* empty target"),
        ([("dialogue_note", "a", "b")], "findings_impresion", ConfigError, "did you mean 'findings_impression'"),
        ([("dialogue_note", "a", "b")], "notes_discharge", InputError, "no encounter with a discharge summary"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_clear_error(rows, kind, error, message):
    with pytest.raises(error, match=message):
        report.read_pairs(corpus(rows), kind)


def test_a_discharge_summary_is_written_from_the_notes_before_it():
    def note(name, kind, day, encounter="e1", text=None):
        when = None if day is None else datetime(2020, 1, day, tzinfo=UTC)
        return Note(name, "p", "a", text or f"text of {name}", "here", encounter_id=encounter, note_type=kind,
                    written_at=when)  # fmt: skip

    notes = [
        note("late", "progress", 9), note("d1", "Discharge Summary", 7), note("n2", "nursing", 3),
        note("n1", "admission", 1), note("alone", "discharge", 5, "e2"), note("p", "progress", 2, "e3"),
        note("loose", "progress", 2, None),
    ]  # fmt: skip
    kind, pairs, counts = report.read_pairs(Corpus(notes_table(notes), CARD), "notes_discharge")
    assert kind == "notes_discharge"
    (pair,) = pairs
    assert pair.pair_id == "d1"
    assert pair.source == "ADMISSION\ntext of n1\n\nNURSING\ntext of n2"
    assert pair.target == "text of d1"
    assert counts == {
        "pairs": 1, "notes_without_encounter": 1, "notes_after_discharge_summary": 1,
        "encounters_without_other_notes": 1, "encounters_without_discharge_summary": 1,
    }  # fmt: skip


def test_drafts_do_not_depend_on_what_is_generated_together(base):
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, 258, size=int(n)).tolist()] for n in rng.integers(3, 60, size=17)]
    common = {"max_new_tokens": 20, "stops": (2,), "pad_token_id": 0}
    alone = generate(base.network, prompts, batch_size=1, **common)
    together = generate(base.network, prompts, batch_size=8, **common)
    assert alone == together
    beams = generate(base.network, prompts[:3], batch_size=3, num_beams=3, **common)
    assert len(beams) == 3


def test_a_draft_ends_at_the_stop_and_says_when_there_was_none(base):
    prompts = [[1, 5, 6], [1, 7]]
    common = {"pad_token_id": 0, "max_new_tokens": 6}
    free = generate(base.network, prompts, stops=(2,), **common)
    assert [answer.stopped for answer in free] == [False, False]
    assert all(len(answer.tokens) == 6 for answer in free)
    stop = free[0].tokens[2]
    first = generate(base.network, prompts[:1], stops=(2, stop), **common)[0]
    assert first.stopped
    assert first.tokens == free[0].tokens[: free[0].tokens.index(stop)]
    made = drafts(free, ["", ""], base.tokenizer, verify="none")
    assert {draft.status for draft in made} == {"draft, unreviewed"}


def test_log_likelihoods_are_those_of_the_report_alone(base):
    import torch

    rng = np.random.default_rng(1)
    rows = [(rng.integers(3, 258, size=5 + n).tolist(), rng.integers(3, 258, size=3 + n).tolist()) for n in range(5)]
    found = report.log_likelihoods(base.network, rows, pad_token_id=0, batch_tokens=32)
    for (prompt, answer), value in zip(rows, found, strict=True):
        with torch.inference_mode():
            logits = torch.log_softmax(base.network(torch.tensor([[*prompt, *answer]])).logits[0], -1)
        wanted = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        assert value == pytest.approx(wanted, abs=1e-4)
    masks = [rng.integers(0, 2, size=len(answer)).tolist() for _, answer in rows]
    inverse = [[1 - counts for counts in mask] for mask in masks]
    parts = [report.log_likelihoods(base.network, rows, pad_token_id=0, counted=m) for m in (masks, inverse)]
    assert np.allclose(parts[0] + parts[1], found, atol=1e-4)


@pytest.mark.parametrize(
    ("one", "other", "masks"),
    [
        ([5, 6, 7, 2], [5, 8, 7, 2], ([0, 1, 0, 0], [0, 1, 0, 0])),
        ([5, 6, 7, 2], [5, 8, 9, 7, 2], ([0, 1, 0, 0], [0, 1, 1, 0, 0])),
        ([6, 7, 2], [5, 6, 7, 2], ([1, 0, 0], [1, 0, 0, 0])),  # what stands in the place of an inserted token
        ([5, 6, 7, 2], [5, 2], ([0, 1, 1, 0], [0, 1])),
    ],
)
def test_what_differs_counts_and_what_is_shared_does_not(one, other, masks):
    assert report.differing_tokens(one, other) == masks
    assert report.differing_tokens(other, one) == masks[::-1]


def test_preference_rows_count_what_differs(base):
    task = report.report_task(
        base, kind="findings_impression", instruction="", window=96, max_new_tokens=24, too_long="error"
    )
    texts = (["no effusion", "clear", "a " * 60], ["effusion", "clear", "effusion"])
    for differing in (True, False):
        row, *none = report.preference_rows(task, [[5]] * 3, *texts, base.tokenizer, differing=differing)
        assert none == [None, None]  # the same text, one that is too long
        batch = report.collate_preferences([row | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}], 0)
        for which, ids, mask in zip(("chosen", "rejected"), batch["input_ids"], batch["completion_mask"], strict=True):
            assert mask[1 : 1 + len(row[f"{which}_ids"])].tolist() == row[f"{which}_mask"]
            counted = ids[mask.bool()].tolist()
            assert (counted == row[f"{which}_ids"]) != differing


def test_kinds_of_error_are_planted_alike_often():
    kinds = report.interleaved(np.random.default_rng(0), ("a", "b", "c"), 8)
    assert len(kinds) == 8
    assert sorted(kinds[:3]) == sorted(kinds[3:6]) == ["a", "b", "c"]


def test_drafts_are_written_as_drafts(tmp_path):
    import pyarrow.parquet as pq

    from clinical_nlp.tasks.generation import Draft

    report.write_drafts(tmp_path, pairs_of(1), [Draft("Normal.", True, 3, ((0, 6, "not in the source"),))])
    (row,) = pq.read_table(tmp_path / "generated.parquet").to_pylist()
    assert row["status"] == "draft, unreviewed"
    assert row["unsupported"] == [{"start": 0, "end": 6, "reason": "not in the source"}]
    assert json.loads((tmp_path / "generated.jsonl").read_text("utf-8")) == row


def test_vllm_that_is_not_there_is_one_clear_error(tmp_path):
    pytest.importorskip("torch")
    try:
        import vllm  # noqa: F401
    except ImportError:
        from clinical_nlp.tasks.generation import vllm_engine

        with pytest.raises(ModelError, match="vLLM is not installed"):
            vllm_engine(tmp_path)
