"""Adaptation at test time: a trained model's norm layers are moved by the notes it is to read, which have no labels.

It is the one kind of adaptation for a hospital that gets a model and cannot send notes back. Entropy is all it has to
go by, and the surest model says the same of everything: where that begins, the weights are put back as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What was done.

    Entropies are in nats, a mean over examples. `diversity` is the entropy of the mean prediction, high where the model
    uses its labels as before; `collapsed` says that it fell too far and that all weights are as they were.
    """

    steps: int
    entropy_before: float
    entropy_after: float
    diversity_before: float
    diversity_after: float
    collapsed: bool


def norm_weights(model: Any) -> dict[str, Any]:
    """Return the weights and biases of the norm layers (LayerNorm, RMSNorm and their kin) by name."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__.lower().endswith("norm"):
            for name, value in module.named_parameters(recurse=False):
                found[f"{path}.{name}" if path else name] = value
    return found


def adapt_norms(
    model: Any,
    batches: Iterable[Any],
    logits: Callable[[Any], torch.Tensor],
    *,
    learning_rate: float = 1e-3,
    least_diversity: float = 0.7,
) -> Adaptation:
    """Lower the entropy of predictions on notes without labels by moving norm layers alone; undo it on a collapse.

    With layers that normalise each example by itself it does less than with batch norm, for which it was made; expect
    little, and look at `Adaptation` before using the model.

    Parameters
    ----------
    model : a trained model; its norm layers move in place, the rest and what requires gradients stay as they are.
    batches : of the notes to be read, each taken once for a step; all are kept, to be looked at before and after.
    logits : batch -> (n, n_classes), one row a prediction; called with the model in eval mode.
    learning_rate : of Adam.
    least_diversity : share of `diversity_before` below which the model counts as collapsed.

    Raises
    ------
    ModelError : the model has no norm layer with weights.
    InputError : there is no batch, or a batch without a prediction.

    References
    ----------
    Wang et al. 2021, Tent: Fully Test-Time Adaptation by Entropy Minimization; Niu et al. 2023, Towards Stable
    Test-Time Adaptation in Dynamic Wild World (collapse on small and one-sided batches).
    """
    import torch

    moving = norm_weights(model)
    if not moving:
        raise ModelError("adaptation at test time moves the weights of norm layers, and this model has none")
    kept = list(batches)
    if not kept:
        raise InputError("adaptation at test time needs notes to adapt to, and there are none")
    start = {name: value.detach().clone() for name, value in moving.items()}
    required = [(value, value.requires_grad) for value in model.parameters()]
    training = model.training
    model.eval()
    steps = 0
    try:
        for value, _ in required:
            value.requires_grad_(False)
        for value in moving.values():
            value.requires_grad_(True)
        before, diversity = _entropies(kept, logits)
        optimizer = torch.optim.Adam(moving.values(), lr=learning_rate)
        collapsed = False
        for batch in kept:
            probabilities = torch.softmax(logits(batch).float(), -1)
            optimizer.zero_grad()
            torch.special.entr(probabilities).sum(-1).mean().backward()
            optimizer.step()
            steps += 1
            after, left = _entropies(kept, logits)
            # `not >=`, so that what is not a number counts as a collapse too.
            if not left >= least_diversity * diversity:
                collapsed = True
                break
        if collapsed:
            with torch.no_grad():
                for name, value in moving.items():
                    value.copy_(start[name])
            after, left = before, diversity
    finally:
        for value, was in required:
            value.grad = None
            value.requires_grad_(was)
        model.train(training)
    return Adaptation(steps, before, after, diversity, left, collapsed)


def _entropies(batches: list[Any], logits: Callable[[Any], torch.Tensor]) -> tuple[float, float]:
    """Mean entropy of the predictions, and entropy of the mean prediction."""
    import torch

    with torch.no_grad():
        rows = [torch.softmax(logits(batch).float(), -1) for batch in batches]
    if any(not len(part) for part in rows):
        raise InputError("a batch holds no word or note to predict for; leave it out")
    probabilities = torch.cat(rows)
    if not bool(torch.isfinite(probabilities).all()):
        return math.nan, math.nan
    each = torch.special.entr(probabilities).sum(-1).mean()
    return float(each), float(torch.special.entr(probabilities.mean(0)).sum())
