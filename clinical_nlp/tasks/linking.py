"""Concepts for spans that no name matches: nearest names by embedding, and a verifier that says how sure that is."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clinical_nlp.errors import InputError, ModelError
from clinical_nlp.language.terminology import Match, Terminology
from clinical_nlp.language.terminology.candidates import Lexicon, candidates, content, spelled, worth_a_look
from clinical_nlp.models.loading import load_base, read_task
from clinical_nlp.runs import Run, write_json
from clinical_nlp.tasks.ner import NerPredictor

if TYPE_CHECKING:
    import torch

Linked = tuple[int, int, str, float, str | None]
"""(start, end, label, score, concept id): the concept is None where a tagger marked a span that is linked to none."""

LABEL = "phenotype"
TOKENS = 32
"""Tokens of a span or name that are read."""
NEAREST = 25
"""Names that are looked at closely."""
OTHERS = 4
"""Concepts that are told as near to a span, the nearest among them."""
LEXICAL = 0.3
"""What the words in common count for beside the cosine, where the nearest name is chosen."""
TEMPERATURE = 0.05
_ROWS = 16
"""Rows of every batch: of one shape and without padding, so that a span's vector is the same in any company."""
_CACHED = 200_000
_WORD = re.compile(r"[^\W_]+")
_DEGREES = ("mild", "moderate", "severe", "marked", "slight", "bilateral", "left", "right", "progressive", "chronic")


class Encoder:
    """Texts to unit vectors: the mean of a base model's hidden states."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, d) float32. Equal texts have equal vectors, whatever stands beside them."""
        import torch

        self.network.eval()
        device = next(self.network.parameters()).device
        ids = tokens(self.tokenizer, texts)
        groups: dict[int, list[int]] = {}
        for row, found in enumerate(ids):
            groups.setdefault(len(found), []).append(row)
        vectors = np.zeros((len(texts), self.network.config.hidden_size), dtype=np.float32)
        for _, rows in sorted(groups.items()):
            for begin in range(0, len(rows), _ROWS):
                part = rows[begin : begin + _ROWS]
                filled = part + [part[-1]] * (_ROWS - len(part))
                batch = torch.tensor([ids[row] for row in filled], device=device)
                with torch.inference_mode():
                    vectors[part] = pooled(self.network, batch, torch.ones_like(batch))[: len(part)].cpu().numpy()
        return vectors


def tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, at least one."""
    pad = tokenizer.pad_token_id or 0
    found = tokenizer([spelled(text) for text in texts], truncation=True, max_length=TOKENS)["input_ids"]
    return [list(ids) or [pad] for ids in found]


def pooled(network: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean hidden state of each row as a unit vector, (n, d) float32."""
    import torch

    hidden = network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weight = mask.unsqueeze(-1).float()
    mean: torch.Tensor = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


# Training the encoder -------------------------------------------------------------------------------------------------


class NamePairs:
    """Rows of pairs: two names of each of some concepts that are hard to tell apart.

    A row begins with concepts drawn at random and takes siblings, parents and children of each along. What is random
    is drawn from (seed, epoch, row).

    Parameters
    ----------
    names : the names of each concept that may be read; a concept of one name is paired with a changed form of it.
    size : pairs in a row.
    """

    def __init__(self, terminology: Terminology, names: dict[str, list[str]], *, size: int, seed: int) -> None:
        self._names, self._seed, self._epoch = names, seed, 0
        self._size = size
        self._several = [concept_id for concept_id, found in sorted(names.items()) if len(found) > 1]
        if len(self._several) < 2:
            raise InputError("fewer than two concepts have two names; there is nothing to learn from")
        self._terminology = terminology

    def __len__(self) -> int:
        return math.ceil(sum(len(self._names[concept_id]) - 1 for concept_id in self._several) / self._size)

    def set_epoch(self, epoch: int) -> None:
        """Draw other pairs."""
        self._epoch = epoch

    def __getitem__(self, row: int) -> list[tuple[str, str]]:
        rng = random.Random(f"{self._seed}/{self._epoch}/{row}")
        chosen: dict[str, None] = {}
        while len(chosen) < min(self._size, len(self._names)):
            drawn = rng.choice(self._several)
            chosen[drawn] = None
            near = self._near(drawn)
            for concept_id in rng.sample(near, min(2, len(near))):
                chosen[concept_id] = None
        return [self._pair(rng, self._names[concept_id]) for concept_id in list(chosen)[: self._size]]

    def _near(self, concept_id: str) -> list[str]:
        parents = self._terminology.parents(concept_id)
        around = {child for parent in parents for child in self._terminology.children(parent)}
        around |= {*parents, *self._terminology.children(concept_id)}
        return sorted((around & self._names.keys()) - {concept_id})

    @staticmethod
    def _pair(rng: random.Random, names: list[str]) -> tuple[str, str]:
        if len(names) == 1:
            return names[0], changed(names[0], rng)
        first, second = rng.sample(names, 2)
        return first if rng.random() < 0.5 else changed(first, rng), changed(second, rng)


def changed(name: str, rng: random.Random) -> str:
    """Return another way to write a name: turned around, a word less or a degree more, a plural, a typo; or itself."""
    draw, words = rng.random(), name.split()
    if draw < 0.45:
        return name
    if draw < 0.6 and len(words) > 1:
        head, of, part = name.partition(" of ")
        if of:
            return f"{part.removeprefix('the ')} {head}"
        return f"{words[-1]} of the {' '.join(words[:-1])}"
    if draw < 0.7 and len(words) > 2:
        place = rng.randrange(len(words))
        return " ".join(words[:place] + words[place + 1 :])
    if draw < 0.78:
        return f"{rng.choice(_DEGREES)} {name}"
    if draw < 0.88:
        return name[:-1] if name.endswith("s") else f"{name}s"
    place = max(range(len(words)), key=lambda k: len(words[k]))
    if len(word := words[place]) > 5:
        cut = rng.randrange(1, len(word) - 2)
        words[place] = word[:cut] + (word[cut + 1] + word[cut] if rng.random() < 0.5 else "") + word[cut + 2 :]
    return " ".join(words)


def collate_pairs(rows: Sequence[list[tuple[str, str]]], tokenizer: Any) -> dict[str, Any]:
    """Return the first names of all pairs, then the second ones, padded."""
    import torch

    pairs = [pair for row in rows for pair in row]
    ids = tokens(tokenizer, [first for first, _ in pairs] + [second for _, second in pairs])
    width = max(map(len, ids))
    batch = torch.full((len(ids), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for row, found in enumerate(ids):
        batch[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    return {"input_ids": batch, "attention_mask": mask, "labels": torch.arange(len(pairs))}


def build_model(network: Any) -> Any:
    """Wrap a backbone so that its forward returns the symmetric InfoNCE loss over a batch of pairs.

    References
    ----------
    van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding; Liu et al. 2021,
    Self-Alignment Pretraining for Biomedical Entity Representations, for names of one concept as pairs.
    """
    import torch

    class PairModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor,
            num_items_in_batch: Any = None,
        ) -> dict[str, torch.Tensor]:
            order = attention_mask.sum(1).argsort()
            vectors: torch.Tensor | None = None
            for rows in order.chunk(6):  # names of one length together: most of a padded batch would be padding
                width = int(attention_mask[rows].sum(1).max())
                part = pooled(self.network, input_ids[rows, :width], attention_mask[rows, :width])
                vectors = part.new_zeros(len(order), part.shape[1]) if vectors is None else vectors
                vectors = vectors.index_copy(0, rows, part)
            assert vectors is not None
            logits = vectors[: len(labels)] @ vectors[len(labels) :].T / TEMPERATURE
            cost = torch.nn.functional.cross_entropy
            return {"loss": (cost(logits, labels) + cost(logits.T, labels)) / 2}

    return PairModel()


# Looking up -----------------------------------------------------------------------------------------------------------


class Nearest(NamedTuple):
    """The concept nearest to a span, the name that it is nearest by (its row), and what the verifier judges by.

    `others` are the concepts that come next, nearest first.
    """

    concept_id: str
    row: int
    features: tuple[float, ...]
    others: tuple[str, ...] = ()


FEATURES, DICE = 14, 3
"""How many features there are, and which of them is the words in common with the name."""


class Names:
    """The names of a terminology with their vectors.

    Parameters
    ----------
    vectors : (n, d), one unit vector for each of `lexicon.names`.
    hidden : rows that are not looked at.
    """

    def __init__(
        self, terminology: Terminology, lexicon: Lexicon, vectors: np.ndarray, hidden: Sequence[int] = ()
    ) -> None:
        self.terminology, self.lexicon = terminology, lexicon
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._hidden = np.array(sorted(hidden), dtype=np.int64)
        self._above: dict[str, frozenset[str]] = {}

    def nearest(self, texts: Sequence[str], vectors: np.ndarray) -> list[Nearest]:
        """Return the nearest concept of each text."""
        found = []
        for begin in range(0, len(texts), _ROWS):
            part = vectors[begin : begin + _ROWS]
            filled = np.concatenate([part, np.repeat(part[-1:], _ROWS - len(part), axis=0)])
            cosines = filled @ self._vectors.T
            cosines[:, self._hidden] = -1.0
            found += [self._one(texts[begin + k], cosines[k].round(4)) for k in range(len(part))]
        return found

    def _one(self, text: str, cosines: np.ndarray) -> Nearest:
        lexicon, words = self.lexicon, content(text)
        total = lexicon.weight(words) or 1e-6
        best: dict[str, tuple[float, float, float, float, float, int]] = {}
        size = min(NEAREST, len(cosines))
        for row in sorted(np.argpartition(-cosines, size - 1)[:size].tolist()):
            shared = lexicon.weight(words & lexicon.bags[row])
            dice = 2 * shared / (total + lexicon.totals[row])
            cosine = float(cosines[row])
            score = cosine + LEXICAL * dice
            concept_id = lexicon.names[row][0]
            if concept_id not in best or score > best[concept_id][0]:
                best[concept_id] = (score, cosine, dice, shared / total, shared / lexicon.totals[row], row)
        order = sorted(best, key=lambda concept_id: (-best[concept_id][0], concept_id))
        chosen = order[0]
        score, cosine, dice, of_span, of_name, row = best[chosen]
        lineage = self.above(chosen)
        apart = [i for i in order[1:] if i not in lineage and chosen not in self.above(i)]
        name = lexicon.bags[row]
        features = (
            cosine,
            score - (best[order[1]][0] if len(order) > 1 else 0.0),
            score - (best[apart[0]][0] if apart else 0.0),
            dice,
            of_span,
            of_name,
            lexicon.unknown(words) / max(1, len(words)),
            float(len(words)),
            lexicon.heaviest(words - name),
            lexicon.heaviest(name - words),
            lexicon.heaviest(words & name),
            float(len(words - name)),
            float(len(name - words)),
            float(lexicon.names[row][2] in ("label", "exact")),
        )
        return Nearest(chosen, row, features, tuple(order[1:OTHERS]))

    def above(self, concept_id: str) -> frozenset[str]:
        """Return the ancestors of a concept."""
        if concept_id not in self._above:
            self._above[concept_id] = self.terminology.ancestors(concept_id)
        return self._above[concept_id]


# Judging --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verifier:
    """How likely it is that a span names its nearest concept: a small network over the features and the vector.

    Attributes
    ----------
    weights : `denotes` (d + 1), a linear measure of whether a text names an abnormality at all; `mean` and `scale` of
        the features; `w1`, `b1`, `w2`, `b2` of the network.
    """

    weights: dict[str, np.ndarray]

    def __call__(self, features: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return probabilities (n,) from features (n, FEATURES) and vectors (n, d)."""
        w = self.weights
        return self.judged(np.column_stack([features, vectors @ w["denotes"][:-1] + w["denotes"][-1]]))

    def judged(self, values: np.ndarray) -> np.ndarray:
        """Return probabilities from the features and, last, what `denotes` gives."""
        w = self.weights
        inner = np.tanh((values - w["mean"]) / w["scale"] @ w["w1"] + w["b1"])
        return np.asarray(1 / (1 + np.exp(-(inner @ w["w2"] + w["b2"]))), dtype=np.float64)


def fit_denotes(vectors: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return d weights and an offset that tell vectors of names from others, both kinds weighing the same."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=1.0, max_iter=300, class_weight="balanced").fit(vectors, names)
    return np.append(found.coef_[0], found.intercept_)


def fit_verifier(values: np.ndarray, right: np.ndarray, weight: np.ndarray, denotes: np.ndarray, seed: int) -> Verifier:
    """Fit the network: one hidden layer, weighed cross-entropy, a little decay.

    Parameters
    ----------
    values : (n, FEATURES + 1), with what `denotes` gives of each last.
    right : (n,) whether the nearest concept is the one meant.
    weight : (n,) what each example counts for.
    """
    import torch

    mean, scale = values.mean(0), values.std(0) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(values.shape[1], 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)
        ).double()
    x = torch.from_numpy((values - mean) / scale)
    y, w = torch.from_numpy(right.astype(np.float64)), torch.from_numpy(weight / weight.sum())
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02, weight_decay=1e-4)
    for _ in range(400):
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], y, weight=w, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    first: Any = network[0]
    second: Any = network[2]
    state = {
        "denotes": denotes, "mean": mean, "scale": scale,
        "w1": first.weight.detach().numpy().T, "b1": first.bias.detach().numpy(),
        "w2": second.weight.detach().numpy()[0], "b2": second.bias.detach().numpy(),
    }  # fmt: skip
    return Verifier({name: np.ascontiguousarray(value, dtype=np.float64) for name, value in state.items()})


def shared_parts(lexicon: Lexicon, terminology: Terminology) -> list[str]:
    """Return phrases inside the names of concepts that are not of one line, and no name themselves: `axial skeleton`.

    They say what is abnormal, or how, and name nothing.
    """
    holders: dict[str, set[str]] = {}
    for concept_id, text, _ in lexicon.names:
        written = text.lower().split()
        for size in range(2, min(5, len(written))):
            for first in range(len(written) - size + 1):
                holders.setdefault(" ".join(written[first : first + size]), set()).add(concept_id)
    known = set(lexicon.bags)
    found = []
    for phrase, ids in sorted(holders.items()):
        words = content(phrase)
        if not 2 <= len(ids) <= 60 or len(words) < 2 or words in known:
            continue
        some = sorted(ids)[:6]
        if any(a not in terminology.ancestors(b) and b not in terminology.ancestors(a) for a in some for b in some):
            found.append(phrase)
    return found


# The finished linker --------------------------------------------------------------------------------------------------


class Linker:
    """A trained linker, ready to be used.

    Parameters
    ----------
    names : the names to link to.
    threshold : a span that is less likely than this to name its nearest concept is linked to none.
    tagger : its spans are looked at as well, and returned without a concept where there is none.
    """

    def __init__(
        self, encoder: Encoder, names: Names, verifier: Verifier, threshold: float, tagger: NerPredictor | None = None
    ) -> None:
        self._encoder, self._names, self._verifier, self._tagger = encoder, names, verifier, tagger
        self.threshold = threshold
        self._known: dict[str, tuple[str, float] | None] = {}

    @classmethod
    def load(cls, run: str | Path, terminology: Terminology) -> Linker:
        """Load a finished `link` run, for the terminology that it was made from.

        Raises
        ------
        ModelError : the run is of another recipe, another terminology, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(run)
        Run.load(folder)
        told = read_task(folder)
        if told.get("task") != "linking":
            raise ModelError(f"run {folder} was trained for {told.get('task')}, not for linking")
        if told["terminology"]["digest"] != terminology.digest:
            made = f"{told['terminology']['name']} {told['terminology']['version']}".strip()
            raise ModelError(f"run {folder} links to {made}, not to this {terminology.name}; run link again")
        lexicon = Lexicon(terminology)
        try:
            state = load_file(folder / "head.safetensors")
            vectors = state.pop("names")
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            raise ModelError(f"{folder / 'head.safetensors'} is missing or damaged; run link again") from None
        if len(vectors) != len(lexicon.names):
            raise ModelError(
                f"run {folder} holds {len(vectors)} names, the terminology {len(lexicon.names)}; link again"
            )
        base = load_base(str(folder), bidirectional=True, dtype="fp32")
        tagger = NerPredictor.load(_tagger(folder, told["tagger"])) if told.get("tagger") else None
        encoder = Encoder(base.network, base.tokenizer)
        return cls(encoder, Names(terminology, lexicon, vectors), Verifier(state), told["threshold"], tagger)

    @cached_property
    def terminology(self) -> Terminology:
        """What is linked to."""
        return self._names.terminology

    def predict(self, texts: Sequence[str], matches: Sequence[Sequence[Match]]) -> list[list[Linked]]:
        """Return what the dictionary missed.

        Parameters
        ----------
        texts : notes, unchanged.
        matches : the dictionary's matches of each.

        Returns
        -------
        For each text the linked spans, sorted by place; they overlap neither each other nor a match, but for a match
        inside whose concept is an ancestor of the one linked. With them the tagger's spans that are linked to none.
        """
        tagged = self._tagger.predict(texts) if self._tagger is not None else [[] for _ in texts]
        lexicon = self._names.lexicon
        looked: list[list[tuple[int, int, tuple[str, ...], str]]] = []
        for text, found, spans in zip(texts, matches, tagged, strict=True):
            places = [(c.start, c.end, c.inside) for c in candidates(text, found)]
            places += [place for span in spans if (place := _beside(span[0], span[1], found)) is not None]
            looked.append([(*place, spelled(text[place[0] : place[1]])) for place in dict.fromkeys(places)])
        self._look_up(list(dict.fromkeys(form for places in looked for *_, form in places)), lexicon)
        return [self._chosen(places, spans) for places, spans in zip(looked, tagged, strict=True)]

    def nearest(self, text: str) -> tuple[str, ...]:
        """Return the concepts whose names are nearest to a span, nearest first, however sure that is.

        Nothing where the span has too little in common with any name to be looked up.
        """
        form = spelled(text)
        if not worth_a_look(form, self._names.lexicon):
            return ()
        (found,) = self._names.nearest([form], self._encoder([form]))
        return found.concept_id, *found.others

    def _look_up(self, forms: Sequence[str], lexicon: Lexicon) -> None:
        if len(self._known) > _CACHED:
            self._known.clear()
        new = [form for form in forms if form not in self._known]
        self._known.update((form, None) for form in new)
        new = [form for form in new if worth_a_look(form, lexicon)]
        if not new:
            return
        vectors = self._encoder(new)
        found = self._names.nearest(new, vectors)
        scores = self._verifier(np.array([one.features for one in found]), vectors).round(4)
        for form, one, score in zip(new, found, scores.tolist(), strict=True):
            if score >= self.threshold:
                self._known[form] = (one.concept_id, score)

    def _chosen(self, places: Sequence[tuple[int, int, tuple[str, ...], str]], spans: Sequence[Any]) -> list[Linked]:
        found: list[tuple[float, int, int, str]] = []
        for start, end, inside, form in places:
            if (known := self._known.get(form)) is not None:
                concept_id, score = known
                if all(other in self._names.above(concept_id) for other in inside):
                    found.append((score, start, end, concept_id))
        kept: list[Linked] = []
        for score, start, end, concept_id in sorted(found, key=lambda f: (-f[0], f[1] - f[2], f[1])):
            if not any(start < other[1] and other[0] < end for other in kept):
                kept.append((start, end, LABEL, score, concept_id))
        linked = {link[:2]: link for link in kept}
        for start, end, label, score in spans:
            link = linked.pop((start, end), None)
            if link is not None:
                kept[kept.index(link)] = (start, end, label, max(score, link[3]), link[4])
            else:
                kept.append((start, end, label, score, None))
        return sorted(kept, key=lambda link: (link[0], -link[1], link[4] or ""))


def _beside(start: int, end: int, matches: Sequence[Match]) -> tuple[int, int, tuple[str, ...]] | None:
    """Return a tagger's span as a candidate, None where it cuts or equals a match."""
    over = [match for match in matches if match.start < end and start < match.end]
    if any(match.start < start or match.end > end or (match.start, match.end) == (start, end) for match in over):
        return None
    return start, end, tuple(match.concept_id for match in over)


def _tagger(folder: Path, told: dict[str, str]) -> Path:
    beside = (folder / told["relative"]).resolve()
    return beside if beside.is_dir() else Path(told["name"])


def unmatched(texts: Sequence[str], matches: Sequence[Sequence[Match]], lexicon: Lexicon) -> Iterator[str]:
    """Yield the distinct spans of notes that a linker would embed and in which the dictionary finds nothing at all.

    One that holds a match often names a concept (`likely orthostatic hypotension`), and would be counted as false.
    """
    seen: set[str] = set()
    for text, found in zip(texts, matches, strict=True):
        for candidate in candidates(text, found):
            if candidate.inside:
                continue
            form = spelled(text[candidate.start : candidate.end])
            if form not in seen:
                seen.add(form)
                if worth_a_look(form, lexicon):
                    yield form


def save(
    folder: Path, vectors: np.ndarray, verifier: Verifier, terminology: Terminology, threshold: float,
    tagger: dict[str, str] | None,
) -> None:  # fmt: skip
    """Write `head.safetensors` (the vectors of the names, the verifier) and `task.json`."""
    from safetensors.numpy import save_file

    save_file({"names": vectors.astype(np.float16), **verifier.weights}, folder / "head.safetensors")
    told = {"name": terminology.name, "version": terminology.version, "digest": terminology.digest}
    write_json(
        folder / "task.json",
        {"task": "linking", "terminology": told, "threshold": threshold, "tagger": tagger, "quantization": "none"},
    )
