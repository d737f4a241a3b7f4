"""Learn to code encounters (or notes) from text, and score the codes on patients the model has not seen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import Config, RecipeConfig
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.invariance.attachment import MarkedExamples, attach_objective, read_target
from clinical_nlp.invariance.objectives import ObjectiveConfig, check_objective
from clinical_nlp.language.terminology.code_status import (
    STATUSES,
    CodeBook,
    category,
    group_indices,
    load_code_book,
)
from clinical_nlp.models.loading import can_be_prompted, load_base
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.splitting import Split, split_patients
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.recipes.ner import digest, held_out_patients, n_processes
from clinical_nlp.runs import Estimate, Run, write_csv, write_json
from clinical_nlp.statistics import multilabel
from clinical_nlp.statistics.calibration import fit_calibration
from clinical_nlp.tasks import coding, naming
from clinical_nlp.tasks.ner import most_tokens
from clinical_nlp.training.trainer import TrainingConfig, train

Baseline = Literal["tfidf", "zero_shot", "few_shot", "dictionary"]
BASELINES: tuple[Baseline, ...] = ("tfidf", "zero_shot", "few_shot", "dictionary")


class CodesConfig(Config):
    """Which codes are learned, and what they are checked against."""

    system: str = "ICD-10-CM"
    """Code system, as the corpus names it: ICD-10-CM, ICD-10-PCS, ICD-9-CM, or your own."""
    level: Literal["code", "category"] = "code"
    """category: codes are rolled up to what stands before the dot (ICD-10-PCS: to three characters)."""
    path: str | None = None
    """Your own list of codes, a CSV with id and label; its codes get a score even where no training note has them."""
    releases: dict[str, str] = Field(default_factory=dict)
    """First day in force -> file of that release; a code is checked against the one in force when the encounter ended.
    Default for ICD-10-CM: the bundled release."""
    least: int = Field(default=1, ge=1)
    """Codes with fewer training documents are not learned; where they are gold they count as missed."""


class CodingConfig(RecipeConfig):
    """Learn to code encounters or notes."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="qlora")
    """What may move. See `clinical-nlp list strategies`."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a decoder sees to the right of a word; encoders always do."""
    codes: CodesConfig = CodesConfig()
    """The code list."""
    unit: Literal["auto", "note", "encounter"] = "auto"
    """What is coded. auto: notes where the corpus codes notes, else all notes of an encounter together."""
    note_types: list[str] = Field(default_factory=list)
    """Only notes of these types are read (discharge, ...); default all."""
    head: coding.HeadName = "label_attention"
    """label_attention: each code looks for its own words (LAAT, PLM-ICD). pooled: all codes see the same mean."""
    descriptions: bool = True
    """Start each code from what it is called, which is all that a rare or unseen code has."""
    category_loss: float = Field(default=0.0, ge=0)
    """Weight of a second loss that asks for the right category of a code."""
    chunk: int = Field(default=256, ge=16)
    """Tokens the base model sees at once."""
    max_tokens: int = Field(default=6144, ge=16)
    """Tokens of a document that are read; what is cut is counted."""
    named_codes: bool = True
    """Add to a code where a note names it (ICD-10-CM only): what a dictionary finds, weighed by how often the code was
    given to training documents where it was found."""
    accept: float = Field(default=0.8, ge=0, le=1)
    """Proposed codes whose probability is below this go to the review list."""
    baselines: list[Baseline] = Field(default_factory=lambda: list(BASELINES))
    """What is measured beside the model: bag of words with logistic regression; the base model as it is, prompted
    (an encoder: matched with descriptions) without and with examples; the codes that a note names (ICD-10-CM)."""
    baseline_documents: int = Field(default=50, ge=1)
    """Documents on which prompting is measured, since it is slow."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is asked of the representation, so that the institution counts for less. See `clinical-nlp list
    objectives`."""
    training: TrainingConfig = TrainingConfig(epochs=10, batch_size=8)
    """How the weights are moved."""


CONFIG = CodingConfig


def run(config: CodingConfig, output: Path, *, resume: bool = False) -> Run:
    """Train, choose threshold and calibration on development patients, score on held-out ones, write the run."""
    check_objective(config.objective, config.strategy, task="coding", processes=n_processes())
    with Run.open(output, config, recipe="coding", resume=resume) as run:
        resolved = resolve_model(config.base_model)  # a wrong name is told before the notes are read
        book = load_code_book(config.codes.system, path=config.codes.path, releases=config.codes.releases)
        data = read(config, book)
        codes = codes_to_learn(config, book, data)
        check_development(data)
        prompted = prompting(config, data, codes, tuple(book.label(code) for code in codes))  # before the other model

        base = load_base(
            config.base_model,
            quantization=config.strategy.quantization,
            bidirectional=config.attention == "bidirectional",
        )
        if config.attention == "causal" and not base.is_decoder:
            raise ConfigError(
                f"attention causal: base_model {config.base_model!r} is an encoder, which always sees both sides of a "
                "word; leave attention out, or name a decoder"
            )
        taught = Counter(code for row in data.train for code in data.codes[row])
        task = coding.CodingTask(
            codes=codes,
            labels=tuple(book.label(code) for code in codes),
            seen=tuple(code in taught for code in codes),
            system=config.codes.system,
            unit=data.unit,
            chunk=min(config.chunk, most_tokens(base.network) or config.chunk),
            max_tokens=config.max_tokens,
            bidirectional=config.attention == "bidirectional",
            head=config.head,
        )
        described = coding.embed_descriptions(base, task.labels) if config.descriptions else None
        examples = coding.Documents(task, base.tokenizer)
        for row in data.train:
            examples.add(data.texts(row), data.codes[row])
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        build = partial(
            coding.build_model,
            network,
            task,
            seed=config.seed,
            descriptions=described,
            groups=np.array(group_indices(codes, config.codes.system)),
            group_weight=config.category_loss,
        )
        scores = partial(document_scores, config, data, task, base.tokenizer)
        untrained = None
        if "zero_shot" in config.baselines and described is not None and not base.is_decoder:
            untrained = scores(build()), scores(build(), part="development")
        model = build(counts=examples.counts(), n_documents=len(examples))
        trainable, everything = trainable_count(model)
        say(
            f"{len(data.train)} documents, {len(codes)} codes ({sum(task.seen)} with examples); "
            f"{trainable:,} of {everything:,} parameters train ({config.strategy.name})"
        )
        if examples.cut:
            say(
                f"{examples.cut_documents} training documents are longer than max_tokens; {examples.cut} tokens are cut"
            )
        collate: Any = partial(coding.collate, n_codes=len(codes), pad_token_id=base.tokenizer.pad_token_id or 0)
        learned: Any = examples
        attached = None
        if config.objective.is_active:
            owners = [(data.names[row][0], data.patients[row]) for row in data.train]
            everyone = data.corpus.notes["patient_id"].to_pylist()
            for note in read_target(config.objective, held_out_patients(data.split, everyone)):
                examples.add([note.text], None)
                owners.append((note.institution, note.patient))
            learned = MarkedExamples(examples, *zip(*owners, strict=True))
            attached = attach_objective(
                model,
                config.objective,
                learned,
                task="coding",
                batch_size=config.training.batch_size // n_processes(),
                seed=config.seed,
            )
            collate = MarkedExamples.collate(collate)
        validate = None
        if config.training.patience is not None:
            validate = partial(development_score, scores, model, data)
        outcome = train(
            model,
            learned,
            collate,
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=examples.lengths,
            tokenizer=base.tokenizer,
            strategy=config.strategy,
            head="head",
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
            terms=[] if attached is None else [attached.term],
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
            validate=validate,
        )

        gold = data.gold(data.held_out)
        columns = data.columns
        development, found = scores(model, part="development"), scores(model)
        named = naming.NamedCodes()
        concepts = name_codes(config, data)
        if config.named_codes and concepts:
            named = naming.fit_named_codes(
                codes,
                (concepts["train"], [data.codes[row] for row in data.train]),
                (concepts["development"], development[:, : len(codes)], data.gold(data.development)[:, : len(codes)]),
            )
            development[:, : len(codes)] += named.gained(concepts["development"], len(codes))
            found[:, : len(codes)] += named.gained(concepts["held_out"], len(codes))
        threshold = multilabel.choose_threshold(development, data.gold(data.development))
        calibration = fit_calibration(development[:, : len(codes)], data.gold(data.development)[:, : len(codes)])
        patients = [data.patients[row] for row in data.held_out]
        part, seed = data.split.reported_part, config.seed
        counts = np.array([taught[code] for code in columns])
        run.record(multilabel.score(found, gold, threshold, patients, train_counts=counts, part=part, seed=seed))
        run.record(calibration_error(calibration(found[:, : len(codes)]), gold[:, : len(codes)], patients, part))
        measured = baselines(config, data, task, untrained, concepts) | prompted
        for absent in sorted({*config.baselines} - measured.keys()):
            why = "this base model cannot be prompted: it is an encoder, or no code has a name"
            if absent == "dictionary":
                why = f"there is no dictionary of {config.codes.system}"
            none = Estimate(math.nan, math.nan, math.nan, len(set(patients)), len(patients), part, why)
            run.record({f"test.baseline_{absent}.{key}": none for key in _KEPT})
        for name, (held_out, tuned, rows) in measured.items():
            limit = multilabel.choose_threshold(tuned, data.gold(data.development)[: len(tuned)])
            run.record(
                kept_scores(
                    multilabel.score(
                        held_out, gold[rows], limit, [patients[row] for row in rows], train_counts=counts, part=part,
                        seed=seed, prefix=f"test.baseline_{name}.",
                    )
                )
            )  # fmt: skip

        if is_main_process():
            decided = {
                "calibration": {"slope": calibration.slope, "offset": calibration.offset},
                "threshold": threshold,
                "accept": config.accept,
                "named_codes": named.as_json(),
            }
            coding.save(run.path, model, task, base, full=config.strategy.moves_base, **decided)
            coder = coding.Coder(model, task, base.tokenizer, calibration, threshold, config.accept, named)
            summary = write_predictions(run, coder, data, found[:, : len(codes)])
            by_code = multilabel.label_table(found, gold, threshold, patients, part=part, seed=seed)
            write_codes(run, book, data, columns, taught, by_code)
            run.note(predictions=summary, decided=decided)
        run.note(
            inputs={"corpus": data.corpus.card.name, "n_notes": data.corpus.notes.num_rows}
            | {"notes_sha256": digest(data.corpus), "codes": f"{book.system}, checked against {book.version}"},
            base_model=provenance(resolved, run.path),
            parent_run=None if resolved.parent_run is None else str(resolved.parent_run),
            training=outcome
            | {"trainable_parameters": trainable, "parameters": everything, "documents": len(examples)}
            | {"documents_cut": examples.cut_documents, "tokens_cut": examples.cut},
            codes={"learned": len(codes), "with_examples": int(sum(task.seen)), "not_on_the_list": data.unlisted}
            | {"rows_by_status": data.statuses},
            objective=None if attached is None else {"name": config.objective.name, "between": learned.names},
            left_out=data.left_out,
            split=data.split.describe(),
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.coding_page import coding_page

    return coding_page(run)


@dataclass
class Coded:
    """Documents with their codes, and their split. `columns` are the codes of the list, then gold codes outside it."""

    corpus: Corpus
    unit: Literal["note", "encounter"]
    names: list[tuple[str, str]]
    notes: list[list[int]]
    patients: list[str]
    codes: list[tuple[str, ...]]
    split: Split
    train: list[int]
    development: list[int]
    held_out: list[int]
    statuses: dict[str, int]
    left_out: dict[str, int]
    columns: tuple[str, ...] = ()
    unlisted: int = 0

    def texts(self, row: int) -> list[str]:
        """Return the texts of one document's notes, oldest first."""
        return [str(self.corpus.notes["text"][note].as_py()) for note in self.notes[row]]

    def gold(self, rows: Sequence[int]) -> np.ndarray:
        """Return which of `columns` documents have, (n, k) bool."""
        place = {code: index for index, code in enumerate(self.columns)}
        found = np.zeros((len(rows), len(self.columns)), dtype=bool)
        for index, row in enumerate(rows):
            found[index, [place[code] for code in self.codes[row] if code in place]] = True
        return found


def read(config: CodingConfig, book: CodeBook) -> Coded:
    """Load a corpus that has codes, check them, gather what is coded, and divide the patients."""
    corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
    split = split_patients(corpus.notes, config.split, seed=config.seed, parts=corpus.parts)
    say(f"{corpus.card.name}: {split.describe()}")
    wanted = config.codes.system
    table = [] if corpus.codes is None else corpus.codes.to_pylist()
    systems = Counter(row["system"] for row in table)
    if wanted not in systems:
        has = f"it has {', '.join(sorted(systems))}" if systems else "it has none at all"
        raise InputError(f"corpus {corpus.card.name!r} has no codes of system {wanted!r}; {has}")
    table = [row for row in table if row["system"] == wanted]
    unit = config.unit
    if unit == "auto":
        unit = "note" if all(row["note_id"] is not None for row in table) else "encounter"

    note_rows, members, left_out = gather(corpus, unit, config.note_types)
    gold: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    statuses: Counter[str] = Counter()
    by_encounter: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for key, rows in members.items():
        if (encounter := note_rows[rows[0]]["encounter_id"]) is not None:
            by_encounter[key[0], encounter].append(key)
    for row in table:
        if row["note_id"] is not None and unit == "note":
            owners = [key] if (key := (row["institution"], row["note_id"])) in members else []
        else:
            owners = by_encounter.get((row["institution"], row["encounter_id"]), [])
        if not owners:
            left_out["codes of what has no note to read"] += 1
            continue
        statuses[book.status(row["code"], ended(note_rows, members[owners[0]]))] += 1
        code = book.normal(row["code"])
        code = category(code, wanted) if config.codes.level == "category" else code
        for owner in owners:
            gold[owner][code] = None
    names = [key for key in members if key in gold]
    if uncoded := len(members) - len(names):
        left_out[f"{unit}s without a code of {wanted}"] += uncoded

    order = {name: index for index, name in enumerate(names)}
    notes = [members[name] for name in names]
    part_of = {
        int(row): part
        for part, rows in (("train", split.train), ("development", split.development), ("test", split.test))
        for row in rows
    }
    rows_of: dict[str, list[int]] = {"train": [], "development": [], "test": []}
    for name in names:
        # A note that was left out of the split (a copy of another one) has no part; its document has one all the same.
        parts = {part_of[row] for row in notes[order[name]] if row in part_of}
        if len(parts) == 1:
            rows_of[parts.pop()].append(order[name])
        else:
            left_out[f"{unit}s that the split leaves out"] += 1
    for part, what in (("train", "training"), ("test", "reported")):
        if not rows_of[part]:
            raise TooFewPatientsError(
                f"the {what} part of corpus {corpus.card.name!r} has no coded {unit}; give its split more patients"
            )
    say(
        f"{len(names)} coded {unit}s; code rows: {listed(statuses)}"
        + (f"; left out: {listed(left_out)}" if left_out else "")
    )
    return Coded(
        corpus=corpus,
        unit=unit,
        names=names,
        notes=notes,
        patients=[note_rows[rows[0]]["patient_id"] for rows in notes],
        codes=[tuple(gold[name]) for name in names],
        split=split,
        train=rows_of["train"],
        development=rows_of["development"],
        held_out=rows_of["test"],
        statuses={name: statuses[name] for name in STATUSES if statuses[name]},
        left_out=dict(left_out),
    )


Members = dict[tuple[str, str], list[int]]
"""(institution, id of a note or an encounter) -> rows of its notes, oldest first."""


def gather(
    corpus: Corpus, unit: Literal["note", "encounter"], note_types: Sequence[str]
) -> tuple[list[dict[str, Any]], Members, Counter[str]]:
    """Put the notes of what is coded together; return all notes without text, the groups, and what is left out.

    Raises
    ------
    InputError : nothing is left to code, or an encounter has notes of two patients.
    """
    columns = ["institution", "note_id", "encounter_id", "patient_id", "note_type", "written_at"]
    note_rows = corpus.notes.select(columns).to_pylist()
    left_out: Counter[str] = Counter()
    members: Members = defaultdict(list)
    for index, note in enumerate(note_rows):
        if note_types and note["note_type"] not in note_types:
            left_out["notes of another type"] += 1
        elif unit == "encounter" and note["encounter_id"] is None:
            left_out["notes without an encounter"] += 1
        else:
            members[note["institution"], note["note_id"] if unit == "note" else note["encounter_id"]].append(index)
    if not members:
        raise InputError(
            f"no note of corpus {corpus.card.name!r} can be coded ({listed(left_out)}); look at unit and note_types"
        )
    for (institution, name), rows in members.items():
        rows.sort(key=lambda row: (_when(note_rows[row]), row))
        if len({note_rows[row]["patient_id"] for row in rows}) > 1:
            raise InputError(f"encounter {name!r} of {institution!r} has notes of several patients; mend its ids")
    return note_rows, dict(members), left_out


def _when(note: dict[str, Any]) -> float:
    return note["written_at"].timestamp() if note["written_at"] is not None else math.inf


def ended(note_rows: Sequence[dict[str, Any]], rows: Sequence[int]) -> date | None:
    """Return the day of an encounter's last note, or None where no note has a date."""
    days = [note_rows[row]["written_at"] for row in rows if note_rows[row]["written_at"] is not None]
    return max(days).date() if days else None


def listed(counts: Counter[str] | dict[str, int]) -> str:
    """Write counts as a message does."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def codes_to_learn(config: CodingConfig, book: CodeBook, data: Coded) -> tuple[str, ...]:
    """Return the code list: codes of the training part, and those of the user's own list. Sets `data.columns`."""
    taught = Counter(code for row in data.train for code in data.codes[row])
    codes = {code for code, count in taught.items() if count >= config.codes.least}
    if not codes:
        raise ConfigError(f"no code has {config.codes.least} training documents; set a smaller codes.least")
    if config.codes.path is not None:
        known = book.known()
        codes |= {category(code, book.system) for code in known} if config.codes.level == "category" else set(known)
    chosen = tuple(sorted(codes))
    outside = {code for rows in (data.development, data.held_out) for row in rows for code in data.codes[row]} - codes
    data.columns = (*chosen, *sorted(outside))
    data.unlisted = sum(code in outside for row in data.held_out for code in data.codes[row])
    return chosen


def check_development(data: Coded) -> None:
    """Refuse to choose a threshold on nothing."""
    if not data.development:
        raise ConfigError(
            "threshold and calibration are chosen on development patients, and the split has none with codes; set a "
            "larger split.development"
        )


def document_scores(
    config: CodingConfig,
    data: Coded,
    task: coding.CodingTask,
    tokenizer: Any,
    model: Any,
    *,
    part: Literal["held_out", "development"] = "held_out",
) -> np.ndarray:
    """Score the documents of a part, (n, len(data.columns)); -inf for gold codes that are not on the list."""
    rows = data.held_out if part == "held_out" else data.development
    documents = [task.encode(data.texts(row), tokenizer) for row in rows]
    logits = coding.predict_logits(model, task, tokenizer, documents)
    return widened(logits, len(data.columns))


def widened(scores: np.ndarray, columns: int) -> np.ndarray:
    """Add columns of -inf for codes that have no score."""
    return np.pad(scores.astype(np.float64), ((0, 0), (0, columns - scores.shape[1])), constant_values=-np.inf)


def development_score(scores: Callable[..., np.ndarray], model: Any, data: Coded) -> float:
    """Mean average precision on development documents, for early stopping."""
    found, gold = scores(model, part="development"), data.gold(data.development)
    return float(np.mean([multilabel.average_precision(row, truth) for row, truth in zip(found, gold, strict=True)]))


def calibration_error(
    probabilities: np.ndarray, gold: np.ndarray, patients: Sequence[str], part: str
) -> dict[str, Estimate]:
    """Expected calibration error over all codes, and over those with a probability of at least 0.1."""
    n = len(set(patients))
    likely = probabilities >= 0.1
    values = {
        "test.calibration_error": multilabel.expected_calibration_error(probabilities, gold),
        "test.calibration_error_likely": multilabel.expected_calibration_error(probabilities[likely], gold[likely]),
    }
    note = "no interval: a calibration error is biased upwards in every resample"
    return {name: Estimate(value, math.nan, math.nan, n, len(patients), part, note) for name, value in values.items()}


_KEPT = ("micro_f1", "macro_f1", "map", "precision_at_5", "precision_at_8", "precision_at_15", "auc_micro")


def kept_scores(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """Return the scores that a baseline is shown with."""
    return {name: estimate for name, estimate in found.items() if name.rpartition(".")[2] in _KEPT}


Scored = tuple[np.ndarray, np.ndarray, list[int]]
"""Scores of held-out documents and of development documents, and which held-out documents (by place) were scored."""


def name_codes(config: CodingConfig, data: Coded) -> dict[str, list[frozenset[str]]]:
    """Return the concepts that the documents of each part name, nothing where nobody asks or no names are known."""
    if config.codes.system != naming.SYSTEM or not (config.named_codes or "dictionary" in config.baselines):
        return {}
    parts = {"train": data.train, "development": data.development, "held_out": data.held_out}
    return {part: naming.named_concepts([data.texts(row) for row in rows]) for part, rows in parts.items()}


def baselines(
    config: CodingConfig,
    data: Coded,
    task: coding.CodingTask,
    untrained: tuple[np.ndarray, np.ndarray] | None,
    concepts: Mapping[str, Sequence[frozenset[str]]],
) -> dict[str, Scored]:
    """Score the baselines that need no prompting."""
    found: dict[str, Scored] = {}
    everyone = list(range(len(data.held_out)))
    if "tfidf" in config.baselines:
        say("baseline: bag of words with logistic regression")
        held_out, development = bag_of_words(data, task)
        found["tfidf"] = (held_out, development, everyone)
    if "dictionary" in config.baselines and concepts:
        held_out, development = (
            np.array([[code in named for code in data.columns] for named in rolled_up(config, concepts[part])], float)
            for part in ("held_out", "development")
        )
        found["dictionary"] = (held_out, development, everyone)
    if untrained is not None:
        found["zero_shot"] = (*untrained, everyone)
    return found


def rolled_up(config: CodingConfig, concepts: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Return the concepts at the level of the codes."""
    if config.codes.level == "code":
        return list(concepts)
    return [frozenset(category(concept, config.codes.system) for concept in found) for found in concepts]


def bag_of_words(data: Coded, task: coding.CodingTask) -> tuple[np.ndarray, np.ndarray]:
    """TF-IDF of words, one logistic regression a code; scores of held-out and of development documents."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(sublinear_tf=True)
    x = words.fit_transform(["\n".join(data.texts(row)) for row in data.train])
    others = [
        words.transform(["\n".join(data.texts(row)) for row in rows]) for rows in (data.held_out, data.development)
    ]
    gold = data.gold(data.train)
    scores = [np.full((other.shape[0], len(data.columns)), -np.inf) for other in others]
    for column in range(len(task.codes)):
        truth = gold[:, column]
        if not truth.any():
            continue
        if truth.all():
            for values in scores:
                values[:, column] = 100.0
            continue
        model = LogisticRegression(C=10.0, solver="liblinear").fit(x, truth)
        for values, other in zip(scores, others, strict=True):
            values[:, column] = model.decision_function(other)
    return scores[0], scores[1]


PROMPT = "Clinical note:\n{note}\n\nDiagnoses and procedures coded from this note:\n-"
_CANDIDATES = 64
_SHOTS = 3
_SHOT_CHARACTERS = 600


def prompting(config: CodingConfig, data: Coded, codes: Sequence[str], labels: Sequence[str]) -> dict[str, Scored]:
    """Ask the base model, without training, how well each code's name continues a list of the note's diagnoses.

    The score is log p(name | note) - log p(name | no note), a token's mean. Only the codes whose names have most in
    common with the note (TF-IDF) are asked for. `few_shot` shows training notes (their beginnings) with their codes
    first. A model that is an encoder cannot be prompted.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    from clinical_nlp.tasks.prompting import score_continuations

    names = [name for name in ("zero_shot", "few_shot") if name in config.baselines]
    named = [index for index, label in enumerate(labels) if label]
    if not names or not named or not can_be_prompted(config.base_model):
        return {}
    base = load_base(config.base_model, kind="causal", quantization=config.strategy.quantization)
    say(f"baseline: prompting, {' and '.join(names)}")
    held_out = list(range(min(config.baseline_documents, len(data.held_out))))
    rows = [[data.held_out[place] for place in held_out], data.development[: config.baseline_documents]]
    words = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5))
    vectors = words.fit_transform([labels[index] for index in named])
    called = dict(zip(codes, labels, strict=True))
    rng = np.random.default_rng(config.seed)
    shots = [data.train[index] for index in rng.permutation(len(data.train))[:_SHOTS]]
    example = "".join(
        PROMPT.format(note="\n".join(data.texts(row))[:_SHOT_CHARACTERS])
        + "".join(f" {name}\n-" for code in data.codes[row] if (name := called.get(code))).removesuffix("-")
        + "\n"
        for row in shots
    )
    found: dict[str, Scored] = {}
    for name in names:
        before = example if name == "few_shot" else ""
        parts = []
        for chosen in rows:
            texts = ["\n".join(data.texts(row)) for row in chosen]
            near = words.transform(texts) @ vectors.T
            asked = [
                [named[index] for index in np.argsort(-row.toarray()[0], kind="stable")[:_CANDIDATES]] for row in near
            ]
            answers = [[f" {labels[index]}" for index in places] for places in asked]
            prompts = [before + PROMPT.format(note=text) for text in texts]
            with_note = score_continuations(base, prompts, answers)
            plain = dict(zip(_flat(answers), _without_note(base, before, _flat(answers)), strict=True))
            scores = np.full((len(chosen), len(data.columns)), -np.inf)
            for row, (places, texts_of, values) in enumerate(zip(asked, answers, with_note, strict=True)):
                scores[row, places] = values - np.array([plain[text] for text in texts_of])
            parts.append(scores)
        found[name] = (parts[0], parts[1], held_out)
    return found


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return sorted({text for texts in lists for text in texts})


def _without_note(base: Any, before: str, texts: Sequence[str]) -> np.ndarray:
    from clinical_nlp.tasks.prompting import score_continuations

    return score_continuations(base, [before + PROMPT.format(note="(none)")], [texts])[0]


def write_predictions(run: Run, coder: coding.Coder, data: Coded, logits: np.ndarray) -> dict[str, Any]:
    """Write what is proposed for the held-out documents beside what is gold; return counts."""
    note_ids = data.corpus.notes["note_id"].to_pylist()
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(data.held_out):
        texts = data.texts(row)
        proposed = coder.propose([texts], coder.encode([texts]), logits[index : index + 1])[0]
        about = {"institution": data.names[row][0], "patient_id": data.patients[row], "unit_id": data.names[row][1]}
        names = [note_ids[note] for note in data.notes[row]]
        rows += [
            {**about, **line, "gold": line["code"] in data.codes[row]} for line in coding.proposal_rows(proposed, names)
        ]
    coding.write_proposals(run.path, rows, unit=data.unit)
    sure, doubtful = ([row["gold"] for row in rows if row["review"] == review] for review in (False, True))
    return {
        "proposed": len(rows),
        "to_review": len(doubtful),
        "accepted": len(sure),
        "accepted_and_right": int(sum(sure)),
        "reviewed_and_right": int(sum(doubtful)),
    }


def write_codes(
    run: Run, book: CodeBook, data: Coded, columns: Sequence[str], taught: Counter[str], rows: Sequence[dict[str, Any]]
) -> None:
    """Write the table of codes: what each is, whether it is valid today, how often it was there and how it scored."""
    columns_of_file = ["code", "label", "status", "train", *rows[0]] if rows else ["code"]
    lines = [
        {"code": code, "label": book.label(code), "status": book.status(code), "train": taught[code], **row}
        for code, row in zip(columns, rows, strict=True)
        if taught[code] or row["gold"] or row["predicted"]
    ]
    write_csv(run.path / "codes.csv", columns_of_file, lines)
    write_json(run.path / "code_check.json", {"system": book.system, "checked_against": book.version, **data.statuses})
