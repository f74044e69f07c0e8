"""When does a curve over steps change? A logistic step in the logarithm of the step, by least squares. Plain NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import DeclarationError

Array = np.ndarray[Any, Any]
PLACES, WIDTHS = 400, 32
"""Change points and widths that are tried, each evenly spaced: the former by their logarithm."""
NARROWEST, WIDEST = 0.02, 1.0
"""Widths of the logistic step, in units of the natural logarithm of the step."""
RISE = float(2 * np.log(9))
"""From 10% to 90% of a logistic step of width 1."""
FLAT = 1e-9
"""Deviation from its mean, as a share of its largest value, up to which a curve is constant."""
BLOCK = 1000
"""Curves that are fitted at once."""


class Change(NamedTuple):
    """The logistic step that fits each curve best.

    Attributes
    ----------
    step : array (...)
        The change point: the step of training at which half of the change is done.
    width : array (...)
        Of the step, in units of the natural logarithm of the step of training.
    before, after : array (...)
        Values of the fit far before and far after the change.
    explained : array (...)
        Share of the variance of the curve that the fit explains, 0 to 1.
    """

    step: Array
    width: Array
    before: Array
    after: Array
    explained: Array

    def span(self) -> tuple[Array, Array]:
        """Steps at which 10% and 90% of the change are done."""
        half = np.exp(self.width * RISE / 2)
        return self.step / half, self.step * half


def change_point(steps: Array, values: Array, rising: bool = True) -> Change:
    """The step at which a curve changes: ``before + (after - before) / (1 + exp(-(ln(s) - ln(step)) / width))``.

    The fit is the one with the least squared error among `PLACES` change points between the first step above 0 and the
    last, evenly spaced in their logarithm, and `WIDTHS` widths; for each of them `before` and `after` are those of
    linear regression. At step 0 the logistic is 0.

    Parameters
    ----------
    steps : array (step,)
        Steps of training, ascending, 0 or more.
    values : array (..., step)
        Curves.
    rising : bool
        Whether the change that is looked for is a rise; else it is a fall.

    Returns
    -------
    Change
        NaN where a value is missing, and where no rise (fall) fits better than a constant.

    Raises
    ------
    DeclarationError
        There are fewer than four steps above 0, or they do not ascend.
    """
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if (steps > 0).sum() < 4 or (np.diff(steps) <= 0).any() or steps[0] < 0 or values.shape[-1:] != steps.shape:
        raise DeclarationError(
            f"a change point needs four ascending steps above 0 at least, and a value for each: got {len(steps)} steps"
        )
    places, widths, shapes = _shapes(steps)
    middle = shapes.mean(axis=-1, keepdims=True)
    centred = shapes - middle
    norms = (centred**2).sum(axis=-1)
    rows = values.reshape(-1, len(steps))
    found = [_fitted(rows[at : at + BLOCK], centred, norms, rising) for at in range(0, max(len(rows), 1), BLOCK)]
    best, slope, explained = (np.concatenate(one) for one in zip(*found, strict=True))
    known = np.isfinite(slope) & (slope != 0)
    before = rows.mean(axis=-1) - slope * middle[best, 0]
    made = (places[best], widths[best], before, before + slope, explained)
    return Change(*(np.where(known, one, np.nan).reshape(values.shape[:-1]) for one in made))


def _shapes(steps: Array) -> tuple[Array, Array, Array]:
    """Change point and width of each logistic step that is tried, and its values ``(number, step)``."""
    first = steps[steps > 0][0]
    places = np.geomspace(first, steps[-1], PLACES)
    widths = np.geomspace(NARROWEST, WIDEST, WIDTHS)
    place, width = (one.ravel() for one in np.meshgrid(places, widths, indexing="ij"))
    with np.errstate(divide="ignore"):
        ahead = (np.log(steps) - np.log(place)[:, None]) / width[:, None]
    return place, width, 1 / (1 + np.exp(-np.clip(ahead, -500, 500)))


def _fitted(rows: Array, centred: Array, norms: Array, rising: bool) -> tuple[Array, Array, Array]:
    """Number of the best shape, its slope, and the share of variance that it explains, of each row."""
    own = rows - rows.mean(axis=-1, keepdims=True)
    product = np.where(np.isfinite(own), own, 0.0) @ centred.T  # (row, shape)
    wanted = product > 0 if rising else product < 0
    gain = np.where(wanted, product**2, 0.0) / np.where(norms > 0, norms, np.inf)
    best = gain.argmax(axis=-1)
    at = np.arange(len(rows))
    total = (own**2).sum(axis=-1)
    flat = total <= len(own[0]) * (FLAT * np.abs(rows).max(axis=-1)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share = gain[at, best] / total
        slope = np.where(gain[at, best] > 0, product[at, best] / norms[best], 0.0)
    return best, np.where(np.isfinite(total) & ~flat, slope, np.nan), share


def change_interval(
    steps: Array, values: Array, rising: bool = True, level: float = 0.95, resamples: int = 500, seed: int = 0
) -> tuple[Array, Array]:
    """Bootstrap interval of the change point of the mean over examples: percentiles over resampled examples.

    Parameters
    ----------
    steps : array (step,)
    values : array (step, example)
        One curve for each example, such as a prompt.
    rising : bool
        As for `change_point`.
    level : float
        Coverage.
    resamples, seed : int
        Number and seed of the resamples.

    Returns
    -------
    low, high : arrays ()
        NaN where there are fewer than two examples, or a resample has no change point.
    """
    values = np.asarray(values, dtype=np.float64)
    examples = values.shape[-1]
    if examples < 2 or not np.isfinite(values).all():
        return np.asarray(np.nan), np.asarray(np.nan)
    drawn = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=resamples)
    found = change_point(steps, (drawn / examples) @ values.T, rising).step
    if np.isnan(found).any():
        return np.asarray(np.nan), np.asarray(np.nan)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return np.asarray(low), np.asarray(high)
