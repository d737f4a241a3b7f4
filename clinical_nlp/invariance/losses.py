"""What objectives are made of: gradient reversal, distances between institutions, penalties on their risks.

All take tensors and give a scalar that can be differentiated. Rows are examples (notes, windows, documents or tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WIDTHS = (0.5, 1.0, 2.0)
"""Kernel bandwidths of the MMD loss, in multiples of the median one."""


def reverse_gradient(values: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the values as they are; what flows back is multiplied by -strength.

    References
    ----------
    Ganin et al. 2016, Domain-Adversarial Training of Neural Networks, JMLR 17, eq. 13.
    """
    import torch

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
            return given.view_as(given)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0].mul(-strength)

    return Reverse.apply(values)  # type: ignore[no-any-return]


def reversal_strength(progress: float) -> float:
    """Return 2 / (1 + exp(-10 p)) - 1 for a training progress p in [0, 1]: 0 at first, nearly 1 from p = 0.4 on.

    References
    ----------
    Ganin et al. 2016, section 5.2.2.
    """
    return 2.0 / (1.0 + math.exp(-10.0 * min(1.0, max(0.0, progress)))) - 1.0


def balanced_weights(institution: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    """Weights (n,) under which every institution counts the same, with labels also within each label; mean 1.

    With labels, an institution that is alone with a label says nothing within that label and weighs 0 there: what is
    left tells institutions apart by more than their prevalence. All weights are 0 where nothing is left.
    """
    import torch

    label = torch.zeros_like(institution) if label is None else label
    weights = torch.zeros(len(institution), dtype=torch.float32, device=institution.device)
    for kind in torch.unique(label):
        here = label == kind
        names, sizes = torch.unique(institution[here], return_counts=True)
        if len(names) < 2:
            continue
        place = torch.searchsorted(names, institution[here])
        weights[here] = int(here.sum()) / (len(names) * sizes[place].float())
    total = weights.sum()
    return weights * (len(weights) / total) if float(total) > 0 else weights


def kernel(first: torch.Tensor, second: torch.Tensor, squared_width: torch.Tensor) -> torch.Tensor:
    """Mean of Gaussian kernels exp(-|x - y|^2 / (2 w s^2)) over the bandwidths, (n, m)."""
    import torch

    squares = first.square().sum(1, keepdim=True) + second.square().sum(1) - 2.0 * first @ second.T
    squares = squares.clamp(min=0.0)
    return torch.stack([torch.exp(-squares / (2.0 * width**2 * squared_width)) for width in WIDTHS]).mean(0)


def squared_median_width(pooled: torch.Tensor) -> torch.Tensor:
    """Half the median squared distance between different rows, detached: the bandwidth is no way to a smaller loss."""
    import torch

    with torch.no_grad():
        distances = torch.pdist(pooled.detach()).square()
        return (0.5 * distances.median()).clamp(min=1e-12) if len(distances) else torch.ones((), device=pooled.device)


def mmd_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    patients: tuple[torch.Tensor, torch.Tensor] | None = None,
    squared_width: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared maximum mean discrepancy between two samples; without pairs of one patient it has no bias.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), the first two means over pairs of different patients. It may be
    negative. With the pairs of a row with itself, as most libraries have it, the loss of a batch of sixteen is mostly
    bias, which only draws all rows together.

    Parameters
    ----------
    first, second : (n, d) and (m, d).
    patients : of the rows, (n,) and (m,); without them every row is a patient.
    squared_width : default `squared_median_width` of both together.

    Returns
    -------
    Scalar; 0 where a side has fewer than two patients.

    References
    ----------
    Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.
    """
    import torch

    if patients is None:
        patients = (torch.arange(len(first), device=first.device), torch.arange(len(second), device=first.device))
    if squared_width is None:
        squared_width = squared_median_width(torch.cat([first, second]))
    total = first.new_zeros(())
    for rows, people in zip((first, second), patients, strict=True):
        different = people.unsqueeze(0) != people.unsqueeze(1)
        if not bool(different.any()):
            return first.sum() * 0.0
        total = total + (kernel(rows, rows, squared_width) * different).sum() / different.sum()
    return total - 2.0 * kernel(first, second, squared_width).mean()


def coral_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Distance of means and covariances of two samples: |m - m'|^2 / d + |C - C'|_F^2 / (4 d^2).

    Deep CORAL has the second term alone, which two institutions that only differ by a shift leave at 0.

    Returns
    -------
    Scalar; 0 where a side has fewer than two rows.

    References
    ----------
    Sun and Saenko 2016, Deep CORAL, section 3.1.
    """
    if min(len(first), len(second)) < 2:
        return (first.sum() + second.sum()) * 0.0
    width = first.shape[1]

    def moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = rows.mean(0)
        centred = rows - mean
        return mean, centred.T @ centred / (len(rows) - 1)

    (mean, covariance), (other_mean, other_covariance) = moments(first), moments(second)
    shift = (mean - other_mean).square().sum() / width
    return shift + (covariance - other_covariance).square().sum() / (4.0 * width**2)


def irm_penalty(
    logits: torch.Tensor,
    losses: Callable[[torch.Tensor], torch.Tensor],
    institution: torch.Tensor,
    patient: torch.Tensor,
) -> torch.Tensor:
    """Mean over institutions of the squared gradient of the risk by a scale w of the logits, at w = 1 (IRMv1).

    The square is estimated without bias by the product of the gradients on two halves of the patients; halves of rows,
    as usual, would share patients, and their product would be biased upwards. An institution with one patient in the
    batch has no two halves and counts nothing.

    Parameters
    ----------
    logits : (n, c).
    losses : logits (n, c) -> loss of each example (n,).
    institution, patient : (n,) int.

    References
    ----------
    Arjovsky et al. 2019, Invariant Risk Minimization, section 3.1 and appendix D.
    """
    import torch

    scale = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    scaled = losses(logits * scale)
    found = []
    for name in torch.unique(institution):
        here = institution == name
        people = torch.unique(patient[here])
        if len(people) < 2:
            continue
        half = torch.searchsorted(people, patient[here]) % 2
        each = scaled[here]
        gradients = [
            torch.autograd.grad(each[half == side].mean(), scale, create_graph=True, retain_graph=True)[0]
            for side in (0, 1)
        ]
        found.append(gradients[0] * gradients[1])
    return torch.stack(found).mean() if found else logits.sum() * 0.0


def risks(losses: torch.Tensor, institution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of each institution that is there: their numbers (k,), ascending, and risks (k,)."""
    import torch

    names = torch.unique(institution)
    return names, torch.stack([losses[institution == name].mean() for name in names])


def vrex_penalty(risk: torch.Tensor) -> torch.Tensor:
    """Variance of the risks of institutions, (k,) -> scalar; 0 with one.

    References
    ----------
    Krueger et al. 2021, Out-of-Distribution Generalization via Risk Extrapolation, eq. 8.
    """
    return (risk - risk.mean()).square().mean()
