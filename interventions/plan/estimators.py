"""The names of the estimators. Pure: imports errors only."""

from __future__ import annotations

from ...errors import MOST_STEPS, DeclarationError, choices, whole

ESTIMATORS = ("exact", "gradient", "integrated")


def check_estimator(estimator: str, steps: int) -> None:
    """Refuse an estimator that is not known, or no number of steps."""
    if estimator not in ESTIMATORS:
        raise DeclarationError(f"estimator={estimator!r}: possible are {choices(ESTIMATORS)}")
    whole(steps, "steps, of the integrated estimate,", low=1, high=MOST_STEPS)
