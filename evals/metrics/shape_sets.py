"""How a set of drawn shapes compares with a set of real ones: minimum matching distance, coverage, nearest neighbours.

    MMD    mean over real shapes of the distance to the nearest drawn one        (fidelity; lower is better)
    COV    share of real shapes that are the nearest one of some drawn shape     (diversity; higher is better)
    1-NNA  share of all shapes whose nearest neighbour is of their own kind      (both; one half is best)

(MMD and COV: Achlioptas et al., ICML 2018. 1-NNA: Lopez-Paz and Oquab, ICLR 2017, as Yang et al., PointFlow, ICCV
2019, use it.) **Rows are drawn shapes, columns are real ones.** The transposed matrix gives numbers that look as
plausible: then MMD forgives a model that draws one good shape, and COV counts the drawn.

Each figure is a mean of one score per shape, so a standard error follows; each shape keeps its neighbour in it, though
another draw would also bring other neighbours.
"""

import numpy as np

from evals.metrics.spread import standard_error
from mnif.errors import UserError


def matching_distances(to_real: np.ndarray) -> np.ndarray:
    """The distance of each real shape to the nearest drawn one, [R]; their mean is MMD.

    Args:
        to_real: [S, R] distances from drawn shapes to real ones, inf for a shape without a surface.
    """
    _check(to_real)
    return to_real.min(axis=0)


def covered(to_real: np.ndarray) -> np.ndarray:
    """Which real shapes are the nearest one of some drawn shape, [R] bool; their share is COV.

    Args:
        to_real: as in :func:`matching_distances`. A drawn shape without a surface covers nothing.
    """
    _check(to_real)
    found = np.zeros(to_real.shape[1], dtype=bool)
    found[to_real.argmin(axis=1)[np.isfinite(to_real).any(axis=1)]] = True
    return found


def told_apart(to_real: np.ndarray, among_drawn: np.ndarray, among_real: np.ndarray) -> np.ndarray:
    """Which shapes' nearest neighbours are of their own kind, [S + R] bool, drawn ones first; their share is 1-NNA.

    Args:
        to_real: [S, R], as in :func:`matching_distances`.
        among_drawn: [S, S] distances; the diagonal is not looked at.
        among_real: [R, R] likewise.

    Returns:
        True for a drawn shape without a surface too: nothing is told apart more easily. Of two equally near
        neighbours one of the other kind counts.

    Raises:
        UserError: shapes that do not fit, or different numbers of drawn and real shapes, with which one half would not
            be the best value.
    """
    _check(to_real)
    drawn, real = to_real.shape
    if among_drawn.shape != (drawn, drawn) or among_real.shape != (real, real):
        raise UserError(
            f"1-NNA: {list(to_real.shape)} distances with {list(among_drawn.shape)} and {list(among_real.shape)}; "
            "[S, R], [S, S] and [R, R] are needed"
        )
    if drawn != real:
        raise UserError(f"1-NNA: {drawn} drawn and {real} real shapes; as many of each are needed")
    own = np.concatenate([_to_another(among_drawn), _to_another(among_real)])
    other = np.concatenate([to_real.min(axis=1), to_real.min(axis=0)])
    return (own < other) | (np.isinf(own) & np.isinf(other))


def set_figures(to_real: np.ndarray, among_drawn: np.ndarray, among_real: np.ndarray) -> dict[str, float]:
    """``mmd``, ``cov`` and ``nna`` with their standard errors ``mmd_std`` …, from three matrices of distances.

    Args:
        to_real, among_drawn, among_real: as in :func:`told_apart`; entries that are not the least of their row or
            column may be any lower bound that exceeds these.
    """
    scores = {
        "mmd": matching_distances(to_real),
        "cov": covered(to_real),
        "nna": told_apart(to_real, among_drawn, among_real),
    }
    means = {name: float(values.mean()) for name, values in scores.items()}
    with np.errstate(invalid="ignore"):  # infinite distances have no spread
        return means | {f"{name}_std": standard_error(values) for name, values in scores.items()}


def _to_another(among: np.ndarray) -> np.ndarray:
    """The distance of each shape to the nearest other one of its kind."""
    others = among.astype(np.float64, copy=True)
    np.fill_diagonal(others, np.inf)
    return others.min(axis=1)


def _check(distances: np.ndarray) -> None:
    if distances.ndim != 2 or 0 in distances.shape or np.isnan(distances).any():
        raise UserError(f"distances of shapes are {list(distances.shape)}; [drawn, real] without NaN is needed")
