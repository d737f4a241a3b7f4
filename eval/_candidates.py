"""What a candidate base model makes of the words of training patients, before anything is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.eval._finished import Subject, some_patients, task_of
from clinical_nlp.models.loading import BaseModel, load_base, read_task
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner


@dataclass(frozen=True)
class Words:
    """Sampled words: features (n, d), tags, patients, and what a source task's head says of them, if there is one."""

    features: np.ndarray
    tags: np.ndarray
    patients: list[str]
    n_notes: int
    probabilities: np.ndarray | None


def read_words(subject: Subject, name: str, *, most_words: int, most_patients: int, seed: int) -> Words:
    """Read the hidden states of a candidate at words of training patients.

    Parameters
    ----------
    subject : the run whose task, split and settings apply.
    name : the candidate.
    most_words, most_patients : bounds of the sample.
    seed : of the sample.

    Every patient gives about the same number of words, drawn at random over their notes, so that words need no
    weights. All words of a kind count alike, those outside every entity too.
    """
    import torch

    values = read_task(subject.run.path)
    base = load_base(name, quantization=subject.quantization, bidirectional=bool(values["bidirectional"]))
    window = min(values["window"], ner.most_tokens(base.network) or values["window"])
    task = ner.NerTask(subject.labels, window, values["overlap"], values["bidirectional"])
    head = _source_head(base, name)
    rows = some_patients(subject.split.train, subject.patients, most_patients, seed)
    notes_of: dict[str, list[int]] = {}
    for row in rows:
        notes_of.setdefault(subject.patients[row], []).append(int(row))
    allowance = max(1, most_words // len(notes_of))
    wanted: dict[int, set[int]] = {}
    pieces: list[ner.Window] = []
    for patient, notes in sorted(notes_of.items()):
        encoded = {
            row: task.encode(subject.texts[row], base.tokenizer, note=row, spans=_known(subject, row)) for row in notes
        }
        places = [(row, word) for row in notes for word in range(len(encoded[row].word_spans))]
        digest = hashlib.blake2b(f"{seed} {patient}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        for index in generator.permutation(len(places))[:allowance]:
            row, word = places[index]
            wanted.setdefault(row, set()).add(word)
        pieces += [
            piece for row in notes for piece in encoded[row].windows if wanted.get(row, set()) & set(piece.words)
        ]
    pieces.sort(key=lambda piece: (len(piece.input_ids), piece.note))
    features, tags, patients, probabilities = [], [], [], []
    device = next(base.network.parameters()).device
    base.network.eval()
    with torch.inference_mode():
        for begin in range(0, len(pieces), 16):
            group = pieces[begin : begin + 16]
            batch = ner.collate(group, base.tokenizer.pad_token_id or 0)
            hidden = base.network(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).last_hidden_state.float()
            classes = None if head is None else torch.softmax(head(hidden), -1)
            for row, piece in enumerate(group):
                at = [k for k, word in enumerate(piece.words) if word in wanted[piece.note]]
                features.append(hidden[row, at].cpu().numpy())
                tags += [piece.labels[k] for k in at]
                patients += [subject.patients[piece.note]] * len(at)
                if classes is not None:
                    probabilities.append(classes[row, at].double().cpu().numpy())
    return Words(
        np.concatenate(features).astype(np.float64),
        np.array(tags),
        patients,
        len(wanted),
        np.concatenate(probabilities) if probabilities else None,
    )


def _known(subject: Subject, row: int) -> list[ner.Span]:
    return [span for span in subject.gold[row] if span[2] in subject.labels]


def _source_head(base: BaseModel, name: str) -> Any:
    """Return the task head of a candidate that is an ner run."""
    if not (Path(name) / "manifest.json").is_file() or task_of(Run.load(name)) != "ner":
        return None
    tags = 1 + 2 * len(read_task(Path(name))["labels"])
    model = ner.build_model(base.network, tags, seed=0)
    ner.load_head(model, Path(name))
    return model.head
