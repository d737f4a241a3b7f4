"""Looking again every month: false alarms counted per year, not per look."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clinical_nlp.errors import UsageError


@dataclass(frozen=True, slots=True)
class Look:
    """One look: `alarm` where its p-value is within the part of the year's level that it may spend.

    `adjusted_p` is the p-value over that part's share of the year: at most the year's level exactly where `alarm`.
    """

    year: int
    p_value: float
    spends: float
    adjusted_p: float
    alarm: bool
    note: str = ""


def control_alarms(
    p_values: Sequence[float],
    years: Sequence[int],
    *,
    looks_per_year: int = 12,
    level: float = 0.05,
    smallest_p: Sequence[float] | None = None,
) -> tuple[Look, ...]:
    """Decide on repeated looks so that a year without drift has at most `level` false alarms on average.

    Twelve looks at 5 % each alarm falsely in up to 46 % of the years. Here every look may spend `level /
    looks_per_year`. The expected number of false alarms a year, and so the chance of any, is at most `level` however
    the looks depend on each other; they do, since all compare with one reference and patients come back. No look
    depends on what earlier ones found, so that monitoring may go on after an alarm. What is given away against tests
    that know the dependence is little: independent looks would alarm in 4.9 % of years.

    Parameters
    ----------
    p_values : one a look, in order; NaN (a look that could not be made) spends its part and cannot alarm.
    years : of the looks; each has a level of its own.
    looks_per_year : planned beforehand.
    level : expected false alarms a year.
    smallest_p : attainable by each look (`TestResult.smallest_p`), to say where a look could not have alarmed.

    Raises
    ------
    UsageError : a year has more looks than planned, or the arguments do not fit together.

    References
    ----------
    Armitage, McPherson and Rowe 1969, Repeated Significance Tests on Accumulating Data, JRSS A 132.
    Lan and DeMets 1983, Discrete Sequential Boundaries for Clinical Trials, Biometrika 70 (spending a level over
    looks; the linear spending function, with the union bound in place of a known joint distribution).
    """
    if looks_per_year < 1 or not 0 < level < 1:
        raise UsageError(f"looks_per_year must be at least 1 and level within 0 and 1 (got {looks_per_year}, {level})")
    attainable = [0.0] * len(p_values) if smallest_p is None else list(smallest_p)
    if not len(p_values) == len(years) == len(attainable):
        raise UsageError(f"{len(p_values)} p-values for {len(years)} years and {len(attainable)} smallest p-values")
    year, most = max(Counter(years).items(), key=lambda item: item[1], default=(0, 0))
    if most > looks_per_year:
        raise UsageError(f"{most} looks in {year}, but {looks_per_year} a year were planned: set looks_per_year={most}")
    spends = level / looks_per_year
    looks = []
    for p, year, least in zip(p_values, years, attainable, strict=True):
        adjusted = min(1.0, p * looks_per_year) if not math.isnan(p) else math.nan
        note = ""
        if math.isnan(p):
            note = "no p-value"
        elif least > spends:
            needed = permutations_for(looks_per_year, level=level)
            note = (
                f"could not alarm: the smallest p-value is {least:.2g}; {needed} relabellings and enough patients can"
            )
        looks.append(Look(year, p, spends, adjusted, not math.isnan(p) and p <= spends, note))
    return tuple(looks)


def permutations_for(looks_per_year: int, *, level: float = 0.05) -> int:
    """Fewest relabellings with which a single look can still alarm."""
    # The quotient may lie a rounding error above a whole number.
    return math.ceil(looks_per_year / level - 1e-9) - 1
