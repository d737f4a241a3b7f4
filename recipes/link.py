"""Make a linker for spans that the dictionary misses: an encoder of names, and a verifier that knows when to abstain.

No label is needed. Names that are hidden from the encoder and the dictionary stand for what clinicians write and the
terminology does not list; spans of unlabelled notes that the dictionary does not match, and phrases that names of
unrelated concepts share, stand for what is no concept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.errors import InputError, ModelError, TrainingError
from clinical_nlp.language.terminology import Matcher, Terminology, load_terminology
from clinical_nlp.language.terminology.candidates import FLOOR, Lexicon
from clinical_nlp.models.adapters import ADAPTER, has_adapter, save_adapter
from clinical_nlp.models.loading import BaseModel, backbone_prefix, load_base, read_task
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.statistics.intervals import patient_bootstrap
from clinical_nlp.tasks import linking
from clinical_nlp.training.trainer import TrainingConfig, train


class LinkConfig(Config):
    """Make a linker from a terminology and unlabelled notes."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder or earlier run; a sentence encoder is best."""
    terminology: str = "hpo"
    """hpo, icd10cm, or a file of your own (.obo, .json, .csv); extraction has to name the same."""
    strategy: StrategyConfig = StrategyConfig(name="full")
    """What of the base model may move."""
    corpus: CorpusConfig = CorpusConfig()
    """Unlabelled notes, for what is no concept; best your own. Gold is not read."""
    spans: int = Field(default=12_000, ge=100)
    """Distinct spans of the notes that are looked at, at most."""
    held_out: float = Field(default=0.12, gt=0, lt=0.5)
    """Share of the names other than labels that are hidden from encoder and dictionary, to judge by."""
    pairs: int = Field(default=96, ge=2)
    """Pairs of names that are told apart at a time."""
    missed: float = Field(default=0.15, gt=0, lt=1)
    """Share of the spans in question that are taken to name a concept; the precision is stated for it."""
    precision: float = Field(default=0.8, gt=0, lt=1)
    """Precision that the threshold is chosen for."""
    tagger: str | None = None
    """Directory of an ner run whose spans are linked as well."""
    seed: int = 0
    """One seed for hidden names, pairs, their order and the verifier."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop training the encoder after this many optimiser steps."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop training the encoder after this many minutes."""
    training: TrainingConfig = TrainingConfig(epochs=2, batch_size=1, learning_rate=1e-4, save_steps=100)
    """How the encoder's weights are moved; an example is a row of pairs."""


CONFIG = LinkConfig
PARTS = ("fit", "threshold", "test")
_SHARED = 4000
"""Phrases that unrelated names share, at most."""
_SHARE_OF_SHARED = 0.2
"""What they count for among what is no concept."""


def run(config: LinkConfig, output: Path, *, resume: bool = False) -> Run:
    """Train the encoder, embed the names, fit the verifier, choose the threshold, and report on what is left."""
    with Run.open(output, config, recipe="link", resume=resume) as run:
        terminology = load_terminology(config.terminology)
        lexicon = Lexicon(terminology)
        resolve_model(config.base_model)  # what is wrong is told before anything takes time
        tagger = tagger_of(config, run)
        hidden = hide(lexicon, config)
        notes = read(config.corpus)
        asked_about = gather(config, notes, lexicon, terminology, hidden)

        base = load_base(config.base_model, quantization=config.strategy.quantization, bidirectional=True)
        base = fit_encoder(config, run, resume, base, visible(lexicon, hidden), terminology)
        encoder = linking.Encoder(base.network, base.tokenizer)
        say(f"embedding {len(lexicon.names):,} names")
        vectors = encoder([text for _, text, _ in lexicon.names]).astype(np.float16).astype(np.float32)

        names = linking.Names(terminology, lexicon, vectors, hidden)
        asked = questions(asked_about, names, vectors, encoder)
        verifier = fit(config, asked, vectors, hidden)
        chances = verifier(asked.features, asked.vectors) * asked.looked_at
        threshold = choose(config, asked, chances)
        run.record(score(config, asked, chances, threshold))
        if is_main_process():
            linking.save(run.path, vectors, verifier, terminology, threshold, tagger)
        run.note(
            inputs={"terminology": terminology.version, "terminology_digest": terminology.digest, "notes": len(notes)},
            base_model=provenance(base.resolved, run.path),
            questions={f"{part}_{kind}": asked.count(part, kind) for part in PARTS for kind in KINDS},
            threshold=threshold,
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


# The encoder ----------------------------------------------------------------------------------------------------------


def hide(lexicon: Lexicon, config: LinkConfig) -> list[int]:
    """Return the rows of the names to hide; no label is among them."""
    limit = int(config.held_out * 2**32)
    return [
        row
        for row, (concept_id, text, scope) in enumerate(lexicon.names)
        if scope != "label" and _draw(config.seed, concept_id, text) < limit
    ]


def visible(lexicon: Lexicon, hidden: Sequence[int]) -> dict[str, list[str]]:
    """Return the names of each concept that may be learned from."""
    kept: dict[str, list[str]] = {}
    out = set(hidden)
    for row, (concept_id, text, _) in enumerate(lexicon.names):
        if row not in out:
            kept.setdefault(concept_id, []).append(text)
    return kept


def fit_encoder(
    config: LinkConfig, run: Run, resume: bool, base: BaseModel, names: dict[str, list[str]], terminology: Terminology
) -> BaseModel:
    """Train the encoder on pairs of names and save it."""
    rows = linking.NamePairs(terminology, names, size=config.pairs, seed=config.seed)
    network = apply_strategy(base.network, config.strategy, seed=config.seed)
    model = linking.build_model(network)
    trainable, everything = trainable_count(model)
    say(f"encoder: {trainable:,} of {everything:,} parameters train, on {len(rows)} rows of {config.pairs} pairs")
    outcome = train(
        model,
        rows,
        partial(linking.collate_pairs, tokenizer=base.tokenizer),
        config=config.training,
        run=run,
        seed=config.seed,
        lengths=[1] * len(rows),
        tokenizer=base.tokenizer,
        strategy=config.strategy,
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        resume=resume,
    )
    run.note(training=outcome | {"trainable_parameters": trainable, "parameters": everything})
    if is_main_process():
        if config.strategy.moves_base:
            network.save_pretrained(run.path / "model")
            base.tokenizer.save_pretrained(run.path / "model")
        elif has_adapter(network):
            save_adapter(network, run.path / "adapter", name=ADAPTER, prefix=backbone_prefix(network))
    return replace(base, network=network)


# What the verifier learns from ----------------------------------------------------------------------------------------

KINDS = ("hidden", "note", "shared")


@dataclass(frozen=True)
class Questions:
    """Spans with the concept nearest to each.

    Attributes
    ----------
    kind, part : indices into `KINDS` and `PARTS`.
    right : whether the nearest concept is the one meant; never for what is no concept.
    unit : what is resampled: a concept, a patient, or a phrase.
    weight : what each counts for, so that each part is a mixture of `missed` names and the rest.
    """

    kind: np.ndarray
    part: np.ndarray
    right: np.ndarray
    unit: np.ndarray
    weight: np.ndarray
    features: np.ndarray
    vectors: np.ndarray

    @property
    def looked_at(self) -> np.ndarray:
        """Whether a linker would embed each: a hidden name has to share enough words with one that is not hidden."""
        return (self.kind > 0) | (self.features[:, linking.DICE] >= FLOOR)

    def count(self, part: str, kind: str) -> int:
        """Return how many there are."""
        return int(((self.part == PARTS.index(part)) & (self.kind == KINDS.index(kind))).sum())


@dataclass(frozen=True)
class Asked:
    """What the verifier will be asked about, before anything is known of it.

    Attributes
    ----------
    rows : hidden names that no name left says in the same words.
    spans : spans of notes that the dictionary does not match, each with a patient in whose notes it stands.
    shared : phrases that names of unrelated concepts share.
    kind, part, unit, weight : as in `Questions`, for all of these in turn.
    """

    rows: list[int]
    spans: list[tuple[str, str]]
    shared: list[str]
    kind: np.ndarray
    part: np.ndarray
    unit: np.ndarray
    weight: np.ndarray


def gather(
    config: LinkConfig, notes: Sequence[tuple[str, str]], lexicon: Lexicon, terminology: Terminology,
    hidden: Sequence[int],
) -> Asked:  # fmt: skip
    """Collect hidden names, spans of notes and shared phrases, and divide them; too few are told before training."""
    out = set(hidden)
    plain = {(lexicon.names[row][0], bag) for row, bag in enumerate(lexicon.bags) if row not in out}
    rows = [row for row in hidden if (lexicon.names[row][0], lexicon.bags[row]) not in plain]
    rows = [row for row in rows if 1 < len(lexicon.bags[row]) <= 6]  # what else the dictionary finds, or no span is
    spans = note_spans(config, notes, lexicon, terminology)
    shared = linking.shared_parts(lexicon, terminology)
    shared = sorted(shared, key=lambda text: _draw(config.seed, "shared", text))[:_SHARED]
    say(f"judging by {len(rows):,} hidden names, {len(spans):,} spans of notes and {len(shared):,} shared phrases")
    units = [lexicon.names[row][0] for row in rows] + [patient for _, patient in spans] + shared
    kind = np.repeat(np.arange(3), [len(rows), len(spans), len(shared)])
    part = np.array([_part(config.seed, unit) for unit in units])
    weight = np.zeros(len(units))
    shares = (config.missed, (1 - config.missed) * (1 - _SHARE_OF_SHARED), (1 - config.missed) * _SHARE_OF_SHARED)
    for k, share in enumerate(shares):
        for p in range(len(PARTS)):
            chosen = (kind == k) & (part == p)
            if not chosen.any():
                n_patients = len({patient for patient, _ in notes})
                raise InputError(
                    f"too few {('hidden names', 'spans of notes', 'shared phrases')[k]} for the {PARTS[p]} part: "
                    f"{len(notes)} notes of {n_patients} patients hold {len(spans)} spans that the dictionary does not "
                    "match; give notes of more patients (corpus), or a terminology with more names"
                )
            weight[chosen] = share / chosen.sum()
    return Asked(rows, spans, shared, kind, part, np.array(units), weight)


def questions(asked: Asked, names: linking.Names, vectors: np.ndarray, encoder: linking.Encoder) -> Questions:
    """Ask for the nearest concept of hidden names, of spans of notes, and of phrases that names share."""
    lexicon = names.lexicon
    others = [text for text, _ in asked.spans] + asked.shared
    found_vectors = np.concatenate([vectors[asked.rows], encoder(others)])
    found = names.nearest([lexicon.names[row][1].lower() for row in asked.rows] + others, found_vectors)
    meant = [lexicon.names[row][0] for row in asked.rows] + [None] * len(others)
    return Questions(
        asked.kind,
        asked.part,
        np.array([one.concept_id == concept_id for one, concept_id in zip(found, meant, strict=True)]),
        asked.unit,
        asked.weight,
        np.array([one.features for one in found]),
        found_vectors,
    )


def note_spans(
    config: LinkConfig, notes: Sequence[tuple[str, str]], lexicon: Lexicon, terminology: Terminology
) -> list[tuple[str, str]]:
    """Return distinct spans that the dictionary does not match, each with a patient in whose notes it stands."""
    matcher = Matcher(terminology)
    found: dict[str, str] = {}
    for patient, text in sorted(notes, key=lambda note: (_draw(config.seed, "patient", note[0]), note[1])):
        for span in linking.unmatched([text], [matcher.match(text)], lexicon):
            found.setdefault(span, patient)
        if len(found) >= config.spans:
            break
    return list(found.items())[: config.spans]


def fit(config: LinkConfig, asked: Questions, vectors: np.ndarray, hidden: Sequence[int]) -> linking.Verifier:
    """Fit the verifier on its part; what `denotes` says of a span is learned from other spans."""
    rng = np.random.default_rng(config.seed)
    kept = np.setdiff1d(np.arange(len(vectors)), np.array(hidden, dtype=np.int64))
    some = vectors[rng.choice(kept, min(len(kept), 10_000), replace=False)]
    rows = np.flatnonzero(asked.part == 0)
    others = rows[asked.kind[rows] > 0]
    halves = others[0::2], others[1::2]
    measures = [
        linking.fit_denotes(np.concatenate([some, asked.vectors[half]]), np.repeat([1, 0], [len(some), len(half)]))
        for half in halves
    ]
    denotes = (measures[0] + measures[1]) / 2
    said = asked.vectors @ denotes[:-1] + denotes[-1]
    for half, measure in zip(halves, reversed(measures), strict=True):
        said[half] = asked.vectors[half] @ measure[:-1] + measure[-1]
    values = np.column_stack([asked.features, said])[rows]
    return linking.fit_verifier(values, asked.right[rows], asked.weight[rows], denotes, config.seed)


def choose(config: LinkConfig, asked: Questions, chances: np.ndarray) -> float:
    """Return the lowest threshold from which on the precision is what is asked for, with 20 right names above it."""
    rows = np.flatnonzero(asked.part == 1)
    rows = rows[np.argsort(-chances[rows], kind="stable")]
    right = np.cumsum(asked.weight[rows] * asked.right[rows])
    precision = right / np.cumsum(asked.weight[rows])
    enough = (precision >= config.precision) & (np.cumsum(asked.right[rows]) >= 20)
    if not enough.any():
        raise TrainingError(
            f"no threshold reaches precision {config.precision}; train longer, take a better base_model (a sentence "
            "encoder), or ask for less (--precision)"
        )
    return float(np.floor(chances[rows[np.flatnonzero(enough)[-1]]] * 1e4) / 1e4)


def score(config: LinkConfig, asked: Questions, chances: np.ndarray, threshold: float) -> dict[str, Estimate]:
    """Return precision and recall on the part that nothing was chosen on, concepts and patients resampled."""
    rows = np.flatnonzero(asked.part == 2)
    said, names = chances[rows] >= threshold, asked.kind[rows] == 0
    right, weight = asked.right[rows], asked.weight[rows]
    columns = np.column_stack(
        [weight * said * right, weight * said, names & said & right, names & right, names, ~names & said, ~names]
    ).astype(float)
    units, place = np.unique(asked.unit[rows], return_inverse=True)
    counts = np.zeros((len(units), columns.shape[1]))
    np.add.at(counts, place, columns)

    def share(top: int, bottom: int) -> Any:
        def statistic(summed: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(summed[..., top] / summed[..., bottom])

        return statistic

    measures = {"precision": (0, 1), "recall": (2, 4), "nearest_right": (3, 4), "linked_of_notes": (5, 6)}
    note = (
        f"hidden names as {config.missed:.0%} of what is asked; the rest, unmatched spans of notes and phrases shared "
        "by names, counts as false; resampled by concept, patient and phrase"
    )
    return {
        f"test.link_{name}": replace(
            patient_bootstrap(counts, share(*pair), n_notes=len(rows), part="test", seed=config.seed), note=note
        )
        for name, pair in measures.items()
    }


def read(corpus: CorpusConfig) -> list[tuple[str, str]]:
    """Return patient and text of every note."""
    loaded = load_corpus(corpus.name, corpus.path, **corpus.options)
    return [(row["patient_id"], row["text"]) for row in loaded.notes.select(["patient_id", "text"]).to_pylist()]


def tagger_of(config: LinkConfig, run: Run) -> dict[str, str] | None:
    """Return where the tagger's run is."""
    if config.tagger is None:
        return None
    folder = Path(config.tagger)
    Run.load(folder)
    if read_task(folder).get("task") != "ner":
        raise ModelError(f"tagger {folder} was trained for {read_task(folder).get('task')}, not for ner")
    import os

    return {"name": str(folder.resolve()), "relative": os.path.relpath(folder.resolve(), run.path.resolve())}


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.page import Notice, Section, training_page

    precision, recall = (run.metrics[f"test.link_{name}"]["value"] for name in ("precision", "recall"))
    wanted = run.manifest["config"]["precision"]
    words = (
        f"Of the names that were hidden, {recall:.0%} are linked to their own concept; of what is linked, "
        f"{precision:.0%} is right (asked for: {wanted:.0%}). The intervals resample concepts, patients and phrases. "
        "Spans of notes are all counted as false, though some name a concept that the dictionary misses."
    )
    tone: Any = "good" if precision >= wanted else "caution"
    return training_page(run, first=Section("What is linked", [Notice(words, tone=tone)]))


def _draw(seed: int, *parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("|".join((str(seed), *parts)).encode(), digest_size=4).digest(), "big")


def _part(seed: int, unit: str) -> int:
    """Half of the units to fit on, a quarter to choose the threshold on, a quarter to report on."""
    return (0, 0, 1, 2)[_draw(seed, "part", unit) % 4]
