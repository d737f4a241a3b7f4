"""Numbers from note text without a model: words, token shares, hashed features. None looks at institutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_TOKEN = re.compile(r"_*[^\W_]\w*(?:['’][^\W_]+)?|_+|[^\w\s]+")
NUMBER = "<number>"
CODE = "<code>"
RARE = "<rare>"


def tokens_of(text: str) -> list[str]:
    """Split a text into lower-case words, `<number>` for digits, `<code>` for mixtures, and runs of punctuation.

    Punctuation stays because templates and de-identification placeholders are made of it. Digits, and words with
    digits or underscores in them, do not: they are the patient's values and identifiers.
    """
    return [_shown(token) for token in _TOKEN.findall(text.lower())]


def _shown(token: str) -> str:
    if token.isdigit():
        return NUMBER
    if any(character.isnumeric() for character in token) or ("_" in token and token.strip("_")):
        return CODE
    return token


def word_counts(texts: Sequence[str]) -> np.ndarray:
    """(n,) words a text, as white space divides them."""
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def token_shares(
    texts: Sequence[str], patient_ids: Sequence[str], *, fewest_patients: int = 3, at_most: int = 20_000
) -> tuple[Any, tuple[str, ...]]:
    """Share of each token in each note.

    Parameters
    ----------
    texts, patient_ids : one entry a note.
    fewest_patients : a token of fewer patients (names, misspellings) is counted as `<rare>`.
    at_most : the tokens of most patients that are kept; the rest is `<rare>` too.

    Returns
    -------
    (n_notes, v) sparse rows that sum to 1 (a note without a token is all `<rare>`), and the v tokens, sorted.
    """
    from collections import Counter

    from scipy import sparse

    counted = [Counter(tokens_of(text)) for text in texts]
    seen: dict[str, set[str]] = {}
    for patient, counts in zip(patient_ids, counted, strict=True):
        for token in counts:
            seen.setdefault(token, set()).add(patient)
    frequent = [token for token, patients in seen.items() if len(patients) >= fewest_patients]
    kept = sorted(sorted(frequent, key=lambda token: (-len(seen[token]), token))[:at_most])
    names = (RARE, *kept)
    column = {token: index for index, token in enumerate(names)}
    rows, columns, shares = [], [], []
    for row, counts in enumerate(counted):
        total = sum(counts.values())
        merged: Counter[int] = Counter()
        for token, count in counts.items():
            merged[column.get(token, 0)] += count
        for index, count in sorted((merged or {0: 1}).items()):
            rows.append(row)
            columns.append(index)
            shares.append(count / (total or 1))
    return sparse.csr_array((shares, (rows, columns)), shape=(len(texts), len(names))), names


def hashed_features(texts: Sequence[str], *, dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Represent texts without a model: hashed TF-IDF of tokens and token pairs, reduced by truncated SVD.

    Fitted on all texts together, so that the result treats institutions alike. No vocabulary is kept.

    Parameters
    ----------
    texts : the notes.
    dimensions : of the result; fewer if there are fewer texts.
    seed : of the randomised SVD.

    Returns
    -------
    (n, d) float32.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    hashing = HashingVectorizer(
        analyzer=_tokens_and_pairs, n_features=2**17, alternate_sign=False, norm=None, dtype=np.float32
    )
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(hashing.transform(texts))
    rank = min(dimensions, len(texts) - 1)
    reduced = TruncatedSVD(n_components=rank, n_iter=4, random_state=seed).fit_transform(weighted)
    return np.ascontiguousarray(reduced, dtype=np.float32)


def projected_words(texts: Sequence[str], *, dimensions: int = 96, seed: int = 0) -> np.ndarray:
    """Represent texts without a model and without looking at any other text: hashed words, projected at random.

    Tokens and token pairs are hashed, their counts dampened (1 + log), rows brought to unit length and projected by
    random signs, so that inner products stay what they were up to 1 / sqrt(dimensions). Institutions that never
    exchange a note get comparable vectors.

    Parameters
    ----------
    texts : the notes.
    dimensions : of the result.
    seed : of the signs.

    Returns
    -------
    (n, dimensions) float32.

    References
    ----------
    Achlioptas 2003, Database-friendly random projections, Journal of Computer and System Sciences 66.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        analyzer=_tokens_and_pairs, n_features=2**15, alternate_sign=False, norm=None, dtype=np.float32
    )
    counts = sparse.csr_array(hashing.transform(texts))
    counts.data = 1 + np.log(counts.data)
    length = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    # The legacy generator: its stream is frozen.
    signs = np.random.RandomState(seed).randint(0, 2, (2**15, dimensions), dtype=np.int8).astype(np.float32) * 2 - 1
    projected = counts @ signs
    projected /= np.maximum(length, 1e-12)[:, None] * np.sqrt(dimensions)
    return np.ascontiguousarray(projected, dtype=np.float32)


def _tokens_and_pairs(text: str) -> list[str]:
    tokens = tokens_of(text)
    return tokens + [f"{left} {right}" for left, right in pairwise(tokens)]
