"""Fine-tune a base model to write reports, and show on held-out patients what it gets right, leaves out and invents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import Config, CorpusConfig, RecipeConfig, SplitConfig
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.invariance.language_attachment import MarkedRows, attach_to_language_model
from clinical_nlp.invariance.objectives import ObjectiveConfig, check_objective
from clinical_nlp.models.loading import load_base, read_task
from clinical_nlp.models.resolve import ResolvedModel, provenance, resolve_model
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.splitting import Split, split_patients
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.recipes.ner import digest, n_processes
from clinical_nlp.runs import Run
from clinical_nlp.tasks.generation import Draft, Verify
from clinical_nlp.tasks.preferences import (
    KINDS,
    ErrorKind,
    Preference,
    carry_errors,
    mirrored,
    plant_error,
)
from clinical_nlp.tasks.report import (
    INSTRUCTIONS,
    Pair,
    Reporter,
    ReportTask,
    TooLong,
    collate_preferences,
    interleaved,
    pairs_as_notes,
    preference_rows,
    read_pairs,
    read_report_task,
    report_task,
    save,
    with_reference,
    write_drafts,
)
from clinical_nlp.tasks.report_scores import (
    Measured,
    changes,
    copy_longest,
    estimates,
    measure,
    nearest_targets,
    write_scores,
)
from clinical_nlp.training.trainer import PreferenceLoss, TrainingConfig, train


class PreferenceConfig(Config):
    """Prefer texts over the same texts with a clinical error (DPO)."""

    pairs: int = Field(default=1000, ge=0)
    """References with an error planted that are learned from; each kind is planted alike often. 0: only `own`."""
    candidates: int = Field(default=1, ge=1)
    """Errors planted for each that is kept: those that the model itself finds likeliest, beside the reference."""
    tokens: Literal["differing", "all"] = "all"
    """differing: a pair counts by the tokens in which its texts differ, so that wording is left alone. all: by both
    texts as they are."""
    errors: list[ErrorKind] = Field(default_factory=lambda: list(KINDS), min_length=1)
    """Which errors: negation, side, number, finding_added, finding_dropped, finding_swapped; default all."""
    own: int = Field(default=0, ge=0)
    """Sources for which the model itself writes, those of the development part first, which it did not learn from, then
    those of the training part. What it turns round is planted in their references, each alone, and each such pair has a
    mirror image, in which the two findings change names in source and texts; `errors` and `candidates` do not apply."""
    beta: float = Field(default=0.3, gt=0)
    """How dearly the model pays for moving away from what it was."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of learning the reference along, which keeps its likelihood from falling with the rejected one."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the preference pairs, in the place of training.epochs."""
    learning_rate: float = Field(default=1.5e-5, gt=0)
    """Peak learning rate, in the place of training.learning_rate; 5e-6 for large models. Higher ones change wording
    before they change facts."""


class ReportConfig(RecipeConfig):
    """Fine-tune a base model to write reports."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="qlora")
    """What may move. See `clinical-nlp list strategies`."""
    kind: str | None = None
    """findings_impression, dialogue_note, dialogue_section, or notes_discharge (made from the notes of an encounter);
    default the kind of pair that the corpus has."""
    instructions: dict[str, str] = Field(default_factory=lambda: dict(INSTRUCTIONS))
    """What the model is told, by kind."""
    window: int | None = Field(default=None, ge=64)
    """Tokens of prompt and report together; default what the model has positions for, at most 4096."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the longest report; default that of the longest training report, at most half the window."""
    too_long: TooLong = "error"
    """error: a source or report that does not fit ends the run. cut_source: the middle of a long source is left out,
    and a training pair with a long report as a whole. leave_out: neither trained on nor scored. All are counted."""
    num_beams: int = Field(default=1, ge=1)
    """1: the likeliest token at each step; more: beam search."""
    generation_batch: int = Field(default=32, ge=1)
    """Reports that are generated together."""
    verify: Verify = "mark"
    """none; mark: say which statements of a draft its source does not bear out; drop: take their sentences out too."""
    scored_notes: int | None = Field(default=None, ge=1)
    """At most this many held-out notes are generated and scored; default all."""
    zero_shot_notes: int = Field(default=50, ge=0)
    """Held-out notes for which the base model, only told what to do, writes before training, as a baseline."""
    bertscore_model: str | None = None
    """Local folder of an encoder for BERTScore; without it there is none."""
    preference: PreferenceConfig | None = None
    """Do not learn to write, but, from a report run as base_model, to prefer references over texts with an error."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is asked of the representation, so that the institution counts for less: dann, mmd and coral on the states
    of the source, irm, vrex and group_dro on the losses of the report's tokens."""
    training: TrainingConfig = TrainingConfig(epochs=3, batch_size=8)
    """How the weights are moved."""


CONFIG = ReportConfig


def run(config: ReportConfig, output: Path, *, resume: bool = False) -> Run:
    """Train (or, with `preference`, tune a report run), draft for held-out patients, score beside baselines."""
    check(config)
    with Run.open(output, config, recipe="report", resume=resume) as run:
        resolved = resolve_model(config.base_model)  # a wrong name is told before the notes are read
        parent = None if config.preference is None else tuned_run(config, resolved)
        data = read(config.corpus, config.split, config.kind, config.seed)
        base = load_base(config.base_model, kind="causal", quantization=config.strategy.quantization)
        if parent is not None:
            task, _ = read_report_task(parent)
        else:
            targets = [data.pairs[row].target for row in data.split.train]
            task = report_task(
                base, kind=data.kind, window=config.window,
                instruction=config.instructions.get(data.kind, INSTRUCTIONS[data.kind]),
                max_new_tokens=config.max_new_tokens, too_long=config.too_long, targets=targets,
            )  # fmt: skip
        held_out, encoded = scored_pairs(config, data, task, base.tokenizer)
        say(f"{data.split.describe()}; {len(held_out)} notes are scored")

        if parent is None:
            examples, counts = task.examples([data.pairs[row] for row in data.split.train], base.tokenizer)
            lengths, loss, settings = row_lengths(examples), None, config.training
            collate: Callable[[Any], dict[str, Any]] = task.collate
        else:
            assert config.preference is not None
            examples, counts = preferences(config, config.preference, data, base, task)
            lengths = [
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in examples
            ]
            settings = config.training.model_copy(
                update={"epochs": config.preference.epochs, "learning_rate": config.preference.learning_rate}
            )
            loss = PreferenceLoss(config.preference.beta, config.preference.sft_weight)
            collate = partial(collate_preferences, pad_token_id=task.pad_token_id)
        before = write(config, base.network, base.tokenizer, task, first_notes(config, held_out))
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        trainable, everything = trainable_count(network)
        say(f"{counts_text(counts)}; {trainable:,} of {everything:,} parameters train ({config.strategy.name})")
        learned, attached = examples, None
        if config.objective.is_active:
            learned = MarkedRows(examples, examples.data)
            attached = attach_to_language_model(
                network, config.objective, learned, task="report",
                batch_size=settings.batch_size // n_processes(), seed=config.seed,
            )  # fmt: skip
            collate = MarkedRows.collate(collate)
        outcome = train(
            network,
            learned,
            collate,
            config=settings,
            run=run,
            seed=config.seed,
            lengths=lengths,
            tokenizer=base.tokenizer,
            strategy=config.strategy,
            language_model=parent is None,
            preference=loss,
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
            terms=[] if attached is None else [attached.term],
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
        )
        if attached is not None:
            del network.objective  # what is saved does without

        written = write(config, network, base.tokenizer, task, held_out)
        score(config, data, held_out, written, before, run, tuned=parent is not None)
        if is_main_process():
            save(run.path, network, task, base, moves_base=config.strategy.moves_base, verify=config.verify)
            write_drafts(run.path, held_out, written)
        run.note(
            inputs={"corpus": data.name, **data.counts, "notes_sha256": data.digest},
            base_model=provenance(base.resolved, run.path),
            parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
            kind=data.kind,
            objective=None if attached is None else {"name": config.objective.name, "between": learned.names},
            prompt="chat template of the base model" if task.chat else "instruction, source, Report:",
            window={"tokens": task.window, "source": task.room, "report": task.max_new_tokens, "policy": task.too_long},
            training=outcome | {"trainable_parameters": trainable, "parameters": everything, **counts},
            generation=generation_counts(written, held_out, data) | encoded,
            generated_text="draft, unreviewed",
            split=data.split.describe(),
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


def report(run: Run) -> str:
    """Render the run's page: scores beside baselines, and drafts beside their sources, for `clinical-nlp report`."""
    from clinical_nlp.reporting.report_page import report_page

    return report_page(run)


def check(config: ReportConfig) -> None:
    """Refuse what cannot work before anything is read."""
    if config.strategy.name == "head":
        raise ConfigError("strategy 'head' trains a task head, and report writes with the base model's own; use qlora")
    if config.preference is not None and config.objective.is_active:
        raise ConfigError(
            f"objective {config.objective.name!r} goes with learning to write; preference compares two texts of one "
            "source, which institutions have in common"
        )
    if config.preference is not None and not (config.preference.pairs or config.preference.own):
        raise ConfigError("preference has nothing to learn from: set pairs (planted errors) or own (the model's own)")
    check_objective(config.objective, config.strategy, task="report", processes=n_processes())
    if config.training.patience is not None:
        raise ConfigError("training.patience needs a score on a development part, which report does not have")
    if config.training.curriculum == "loss":
        raise ConfigError("training.curriculum 'loss' is for pretraining; use length")
    if missing := sorted(set(config.instructions) - set(INSTRUCTIONS)):
        raise ConfigError(f"instructions: kind {missing[0]!r} is not known; known: {', '.join(INSTRUCTIONS)}")


@dataclass(frozen=True)
class Paired:
    """The pairs of a corpus and their split."""

    name: str
    kind: str
    pairs: list[Pair]
    counts: dict[str, int]
    split: Split
    digest: str


def read(corpus_config: CorpusConfig, split_config: SplitConfig, kind: str | None, seed: int) -> Paired:
    """Load a corpus that has pairs and divide their patients."""
    corpus = load_corpus(corpus_config.name, corpus_config.path, **corpus_config.options)
    kind, pairs, counts = read_pairs(corpus, kind)
    notes, parts = pairs_as_notes(pairs, corpus)
    split = split_patients(notes, split_config, seed=seed, parts=parts)
    for name, rows in (("training", split.train), ("reported", split.test)):
        if not len(rows):
            raise TooFewPatientsError(f"the {name} part of corpus {corpus.card.name!r} has no pair; give it patients")
    return Paired(corpus.card.name, kind, pairs, counts, split, digest(corpus))


def tuned_run(config: ReportConfig, resolved: ResolvedModel) -> Path:
    """Return the report run that is to be tuned; it must have held out the patients that are scored here.

    Raises
    ------
    ConfigError : the base model is no report run, or learned from another corpus, split or seed.
    """
    folder = resolved.parent_run
    if folder is None or not (folder / "task.json").is_file() or read_task(folder).get("task") != "report":
        raise ConfigError(
            f"preference tunes a report run, and base_model {config.base_model!r} is none; run report without "
            "preference first and name its directory"
        )
    earlier = Run.load(folder).manifest.get("config", {})
    here = config.model_dump(mode="json")
    for key in ("corpus", "split", "seed"):
        if earlier.get(key) != here[key]:
            raise ConfigError(
                f"preference: {key} differs from that of run {config.base_model}, which may have learned from the "
                f"patients that would be scored here; use the same {key}"
            )
    return folder


def scored_pairs(
    config: ReportConfig, data: Paired, task: ReportTask, tokenizer: Any
) -> tuple[list[Pair], dict[str, int]]:
    """Return the held-out pairs that are scored, and what was cut or left out of them."""
    rows = data.split.test
    if config.scored_notes is not None and len(rows) > config.scored_notes:
        rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[: config.scored_notes])
    pairs = [data.pairs[row] for row in rows]
    encoded = task.encode_sources([pair.source for pair in pairs], tokenizer)
    fitting = [pair for pair, prompt in zip(pairs, encoded.prompts, strict=True) if prompt is not None]
    if not fitting:
        raise InputError(
            f"none of {len(pairs)} held-out sources fits {task.room} tokens; set too_long=cut_source or a larger window"
        )
    return fitting, {"sources_cut": encoded.sources_cut, "sources_left_out": encoded.sources_left_out}


def first_notes(config: ReportConfig, held_out: Sequence[Pair]) -> Sequence[Pair]:
    """Return the notes that the model writes before training: all before tuning, a sample of them zero-shot."""
    if config.preference is not None or config.zero_shot_notes >= len(held_out):
        return held_out if config.preference is not None or config.zero_shot_notes else []
    chosen = np.random.default_rng(config.seed).permutation(len(held_out))[: config.zero_shot_notes]
    return [held_out[row] for row in sorted(chosen)]


def write(config: ReportConfig, network: Any, tokenizer: Any, task: ReportTask, pairs: Sequence[Pair]) -> list[Draft]:
    """Draft a report for each pair's source."""
    if not pairs:
        return []
    reporter = Reporter(network, tokenizer, task, verify=config.verify)
    found = reporter([pair.source for pair in pairs], batch_size=config.generation_batch, num_beams=config.num_beams)
    return [draft for draft in found if draft is not None]


def preferences(
    config: ReportConfig, preference: PreferenceConfig, data: Paired, base: Any, task: ReportTask
) -> tuple[Any, dict[str, int]]:
    """Return preference pairs with the log-likelihoods of the model as it is, and how many there are of each kind."""
    from datasets import Dataset

    rng = np.random.default_rng(config.seed)
    training = [data.pairs[row] for row in data.split.train]
    found: dict[Preference, str] = {}  # and the kind of error
    order = rng.permutation(len(training))
    vocabulary = stated_findings([training[int(place)].target for place in order[:500]])
    for place, kind in enumerate(interleaved(rng, preference.errors, preference.pairs * preference.candidates)):
        pair = training[int(order[place % len(order)])]
        if (error := planted(pair, kind, preference.errors, rng, vocabulary)) is not None:
            found.setdefault(Preference(pair.source, pair.target, error[0]), f"planted_{error[1]}")
    if preference.own:
        unseen = [data.pairs[row] for row in rng.permutation(data.split.development)]
        mine = [*unseen, *(training[int(row)] for row in rng.permutation(len(training)))][: preference.own]
        found |= dict.fromkeys(own_errors(mine, write_all(config, base, task, mine)), "own_errors")
    items = list(found)
    # Sources were made to fit for the run that is tuned; a mirror image may be longer and is then left out.
    fitted = replace(task, too_long="leave_out") if task.too_long == "error" else task
    encoded = fitted.encode_sources([item.source for item in items], base.tokenizer)
    kept = [(item, prompt) for item, prompt in zip(items, encoded.prompts, strict=True) if prompt is not None]
    found_rows = preference_rows(
        task, [prompt for _, prompt in kept], [item.chosen for item, _ in kept], [item.rejected for item, _ in kept],
        base.tokenizer, differing=preference.tokens == "differing",
    )  # fmt: skip
    kinds = [found[item] for (item, _), row in zip(kept, found_rows, strict=True) if row is not None]
    rows = [row for row in found_rows if row is not None]
    if not rows:
        raise InputError(
            f"preference: nothing to learn from; no error could be planted in {preference.pairs} training reports, "
            f"and the model turned no finding round in {preference.own} drafts"
        )
    rows = with_reference(base.network, rows, pad_token_id=task.pad_token_id)
    own = [place for place, kind in enumerate(kinds) if not kind.startswith("planted_")]
    made = [place for place, kind in enumerate(kinds) if kind.startswith("planted_")]
    if preference.candidates > 1:
        made.sort(key=lambda place: rows[place]["ref_chosen_logps"] - rows[place]["ref_rejected_logps"])
    learned = [*made[: preference.pairs], *own]
    counts = Counter(kinds[place] for place in learned)
    return Dataset.from_list([rows[place] for place in learned]), {"preference_pairs": len(learned), **counts}


def own_errors(pairs: Sequence[Pair], written: Sequence[Draft | None]) -> list[Preference]:
    """Return references beside the same with what the model turned round in its drafts, and their mirror images."""
    found: dict[Preference, None] = {}
    for pair, draft in zip(pairs, written, strict=True):
        for error in [] if draft is None else carry_errors(draft.text, pair.target, pair.source):
            one = Preference(pair.source, pair.target, error.text)
            # Alone it would teach to write that finding less, wherever.
            if (image := mirrored(one, error.names)) is not None:
                found |= dict.fromkeys((one, image))
    return list(found)


def planted(
    pair: Pair, kind: ErrorKind, errors: Sequence[ErrorKind], rng: np.random.Generator, vocabulary: Sequence[str]
) -> tuple[str, str] | None:
    """Return the report with an error, and its kind: the one asked for, or another of `errors` where it has none."""
    drawn = [str(term) for term in rng.choice(vocabulary, size=min(20, len(vocabulary)))] if vocabulary else None
    others = [errors[int(place)] for place in rng.permutation(len(errors))]
    for wanted in dict.fromkeys([kind, *others]):
        for terms in (drawn, None):  # None: where the reports state nothing else, common findings
            if (found := plant_error(pair.target, wanted, rng, vocabulary=terms, source=pair.source)) is not None:
                return found.text, wanted
    return None


def stated_findings(reports: Sequence[str]) -> list[str]:
    """Return the findings that reports state, in their words: what is added is as likely as what is there."""
    from clinical_nlp.language.facts import read_facts

    return sorted(
        {text[fact.start : fact.end] for text in reports for fact in read_facts(text) if fact.kind == "finding"}
    )


def write_all(config: ReportConfig, base: Any, task: ReportTask, pairs: Sequence[Pair]) -> list[Draft | None]:
    """Draft for training sources, unverified; None where a source does not fit."""
    reporter = Reporter(base.network, base.tokenizer, task, verify="none")
    return reporter([pair.source for pair in pairs], batch_size=config.generation_batch)


def score(
    config: ReportConfig,
    data: Paired,
    held_out: Sequence[Pair],
    written: Sequence[Draft],
    before: Sequence[Draft],
    run: Run,
    *,
    tuned: bool,
) -> None:
    """Record every metric of the drafts and of the baselines, all on the same notes but zero-shot."""
    training = [data.pairs[row] for row in data.split.train]
    copied = copy_longest([pair.source for pair in held_out], data.kind)
    neighbours = nearest_targets([pair.source for pair in training], [pair.target for pair in training],
                                 [pair.source for pair in held_out])  # fmt: skip
    common: dict[str, Any] = {"part": data.split.reported_part, "seed": config.seed}

    kept: list[tuple[str, list[str], list[str], Measured]] = []

    def measured(texts: Sequence[str], pairs: Sequence[Pair], name: str) -> Measured:
        found = measure(
            texts, [pair.target for pair in pairs], [pair.source for pair in pairs],
            bertscore_model=config.bertscore_model,
        )  # fmt: skip
        patients = [pair.patient_id for pair in pairs]
        run.record(estimates(found, patients, prefix=f"{name}.", **common))
        kept.append((name, [pair.pair_id for pair in pairs], patients, found))
        return found

    mine = measured([draft.text for draft in written], held_out, "test")
    measured(copied, held_out, "baseline_copy_longest")
    measured(neighbours, held_out, "baseline_nearest")
    if before:
        name = "before" if tuned else "baseline_zero_shot"
        earlier = measured([draft.text for draft in before], first_notes(config, held_out), name)
        if tuned:
            run.record(changes(earlier, mine, [pair.patient_id for pair in held_out], **common))
    if is_main_process():
        write_scores(run.path, kept)


def row_lengths(examples: Any) -> list[int]:
    """Return the tokens of each training example."""
    import pyarrow.compute as pc

    found: list[int] = pc.list_value_length(examples.data.column("input_ids")).to_pylist()
    return found


def counts_text(counts: dict[str, int]) -> str:
    """Write counts as words; those that are 0 are left out."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)


def generation_counts(written: Sequence[Draft], held_out: Sequence[Pair], data: Paired) -> dict[str, int]:
    """Count what a reader of the scores must know: drafts that did not stop, sources that training had too."""
    seen = {data.pairs[row].source for row in data.split.train}
    return {
        "n_notes": len(written),
        "not_stopped": sum(not draft.stopped for draft in written),
        "empty": sum(not draft.text for draft in written),
        "statements_unsupported": sum(len(draft.unsupported) for draft in written),
        "sentences_dropped": sum(draft.dropped for draft in written),
        "sources_also_in_training": sum(pair.source in seen for pair in held_out),
    }
