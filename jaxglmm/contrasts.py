"""Contrasts of a factor: the (J, m) matrix C that codes J levels, and column suffixes.

    treatment      indicators of levels 2..J
    SAS            indicators of levels 1..J-1
    sum            rows e_1 .. e_{J-1}, and -1 in all columns for the last level
    helmert        column j compares level j+1 with the mean of those before
    poly           orthonormal polynomials in 1..J: linear, quadratic, cubic, ...

Matrices and names are those of R's ``contr.treatment`` to ``contr.poly``. A factor may
also be given a matrix, a dict of columns or one of formulaic's contrast objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm.errors import DataError

__all__ = ["Contrast", "check_contrasts", "contrast"]

Contrast = tuple[np.ndarray, tuple[str, ...]]


def contrast(spec: Any, levels: list[str], name: str) -> Contrast:
    """Matrix (levels x columns) and column suffixes of a contrast specification.

    Parameters
    ----------
    spec : str, mapping, array or formulaic contrast
        A name (``"sum"``, ``"contr.sum"``), columns by suffix, or the matrix itself.
    levels : list of str
    name : str
        The factor, for messages.

    Returns
    -------
    matrix : (J, m) array
    suffixes : tuple of str

    Raises
    ------
    DataError
        If the name is unknown or the matrix has not one row per level.

    Examples
    --------
    >>> contrast("sum", ["a", "b", "c"], "f")[0].tolist()
    [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]
    """
    if isinstance(spec, str):
        if not _known(spec):
            choices = ", ".join(_NAMED)
            raise DataError(
                f"{name}: unknown contrasts {spec!r}. Choose from: {choices}."
            )
        return _NAMED[spec.removeprefix("contr.")](levels)
    if hasattr(spec, "get_coding_matrix"):
        return _from_formulaic(spec, levels)
    if isinstance(spec, Mapping):
        matrix = np.column_stack([np.asarray(v, np.float64) for v in spec.values()])
        suffixes = tuple(map(str, spec))
    else:
        matrix, suffixes = _numbered(np.asarray(spec, np.float64))
    if matrix.shape[0] != len(levels):
        raise DataError(
            f"{name}: the contrasts have {matrix.shape[0]} rows, the factor "
            f"{len(levels)} levels ({', '.join(levels)}). Give one row per level."
        )
    return matrix, suffixes


def check_contrasts(contrasts: Mapping[str, str]) -> None:
    """Refuse names of contrasts that are not among those above."""
    for name, spec in contrasts.items():
        if not isinstance(spec, str) or not _known(spec):
            raise DataError(
                f"contrasts: {spec!r} for {name!r} is unknown. Choose from: "
                f"{', '.join(_NAMED)}."
            )


def _known(spec: str) -> bool:
    return spec.removeprefix("contr.") in _NAMED


def _from_formulaic(spec: Any, levels: list[str]) -> Contrast:
    from formulaic.transforms import contrasts as theirs

    spec = spec() if isinstance(spec, type) else spec
    frame = pd.DataFrame(spec.get_coding_matrix(levels, reduced_rank=True))
    matrix = frame.to_numpy(dtype=np.float64)
    if isinstance(spec, theirs.PolyContrasts):
        return matrix, _poly_names(len(levels))
    if isinstance(spec, theirs.TreatmentContrasts | theirs.SASContrasts):
        return matrix, tuple(map(str, frame.columns))
    return _numbered(matrix)


def _numbered(matrix: np.ndarray) -> Contrast:
    return matrix, tuple(str(j + 1) for j in range(matrix.shape[1]))


def _treatment(levels: list[str]) -> Contrast:
    return np.eye(len(levels))[:, 1:], tuple(levels[1:])


def _sas(levels: list[str]) -> Contrast:
    return np.eye(len(levels))[:, :-1], tuple(levels[:-1])


def _sum(levels: list[str]) -> Contrast:
    J = len(levels)
    return _numbered(np.vstack([np.eye(J - 1), -np.ones((1, J - 1))]))


def _helmert(levels: list[str]) -> Contrast:
    J = len(levels)
    matrix = -np.triu(np.ones((J, J - 1)))
    matrix[np.arange(1, J), np.arange(J - 1)] = np.arange(1, J)
    return _numbered(matrix)


def _poly(levels: list[str]) -> Contrast:
    """Orthonormal polynomials in 1..J: Lanczos recurrence, orthogonalized twice."""
    J = len(levels)
    scores = np.arange(1.0, J + 1) - (J + 1) / 2
    basis = np.full((J, 1), 1 / np.sqrt(J))
    for _ in range(J - 1):
        column = scores * basis[:, -1]
        for _ in range(2):
            column = column - basis @ (basis.T @ column)
        basis = np.column_stack([basis, column / np.linalg.norm(column)])
    return basis[:, 1:], _poly_names(J)


def _poly_names(J: int) -> tuple[str, ...]:
    return (".L", ".Q", ".C", *(f"^{j}" for j in range(4, J)))[: J - 1]


_NAMED: dict[str, Callable[[list[str]], Contrast]] = {
    "treatment": _treatment,
    "sum": _sum,
    "helmert": _helmert,
    "poly": _poly,
    "SAS": _sas,
}
