"""Covariance structures: theta -> Lambda, one registry for built-in and user's own.

One level's effects of a term have covariance phi Q, Q = Lambda Lambda', where the
*relative* factor Lambda (k, k) is a lower triangular function of theta (m,). For the
linear structures theta holds entries of Lambda itself, unconstrained in sign:

    full     Lambda_ij, i >= j, by column (lme4's order)     m = k (k + 1) / 2
    diag     Lambda_ii                                       m = k
    scalar   Lambda = theta I                                m = 1

In this parameterisation a zero variance is an ordinary interior point: the likelihood
is even in the columns of Lambda, so an optimum there is stationary, and the curvature
there is twice the one-sided derivative with respect to the variance.

References: Bates, Maechler, Bolker, Walker (2015), J. Stat. Softw. 67(1),
doi:10.18637/jss.v067.i01.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.errors import FormulaError
from jaxglmm.typing import Array

__all__ = [
    "Structure",
    "check_structure",
    "register_structure",
    "structure",
    "structure_names",
]


@dataclass(frozen=True)
class Structure:
    """A covariance structure for the k effects that one level of a term has.

    Parameters
    ----------
    name : str
        The name a formula uses: ``name(1 + x | g)``.
    n_theta : callable, k -> m
        Number of parameters.
    Lambda : callable, (theta (m,), k) -> (k, k)
        Lower triangular relative factor; a pure JAX function.
    start : callable, k -> (m,)
        Starting value, for effects of unit scale.
    row : callable, k -> (m,) int, optional
        The effect whose unit theta_i carries: theta_i divides by that effect's scale.
        ``None`` for a structure whose parameters have no such unit; its effects are
        then not rescaled inside.
    column : callable, k -> (m,) int, optional
        The column of Lambda in which theta_i stands alone. Changing the sign of a
        column leaves Q unchanged; after the fit the diagonal is made positive so.
    triangular : bool
        Whether theta is the whole lower triangle, so that any Q can be reached in any
        order of the effects; ``row`` and ``column`` then say where each entry stands.
    common : bool
        Whether all effects share one scale, as where theta scales them together.
    labels : callable, names -> m labels, optional
        Labels of theta; ``theta1``, ``theta2``, ... otherwise.

    Examples
    --------
    Two exchangeable effects, with one standard deviation and one correlation (no call
    to ``jnp.linalg``, whose batched kernels can hang under ``vmap``):

    >>> import jax.numpy as jnp
    >>> def factor(theta, k):
    ...     rho = jnp.tanh(theta[1])
    ...     rest = jnp.sqrt(1.0 - rho**2)
    ...     return theta[0] * jnp.array([[1.0, 0.0], [rho, rest]])
    >>> start = lambda k: (1.0, 0.1)
    >>> register_structure(Structure("exchangeable", lambda k: 2, factor, start))
    """

    name: str
    n_theta: Callable[[int], int]
    Lambda: Callable[[Array, int], Array]
    start: Callable[[int], tuple[float, ...]]
    row: Callable[[int], tuple[int, ...]] | None = None
    column: Callable[[int], tuple[int, ...]] | None = None
    triangular: bool = False
    common: bool = False
    labels: Callable[[list[str]], list[str]] | None = None

    def theta_labels(self, names: list[str]) -> list[str]:
        """Labels of theta for effects with these names."""
        if self.labels is not None:
            return self.labels(names)
        return [f"theta{i + 1}" for i in range(self.n_theta(len(names)))]


def _from_entries(entries: Callable[[int], tuple[np.ndarray, np.ndarray]]):
    """Lambda whose given (rows, columns) hold theta, as a product with a constant."""

    def Lambda(theta: Array, k: int) -> Array:
        rows, cols = entries(k)
        basis = np.zeros((k, k, len(rows)))
        basis[rows, cols, np.arange(len(rows))] = 1.0
        return jnp.asarray(basis, theta.dtype) @ theta

    return Lambda


def _full_entries(k: int) -> tuple[np.ndarray, np.ndarray]:
    cols, rows = np.triu_indices(k)
    return rows, cols


def _diag_entries(k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(k), np.arange(k)


def _full_labels(names: list[str]) -> list[str]:
    rows, cols = _full_entries(len(names))
    return [
        names[i] if i == j else f"{names[i]}.{names[j]}" for i, j in zip(rows, cols)
    ]


_REGISTRY: dict[str, Structure] = {}


def register_structure(structure: Structure) -> None:
    """Make a structure known by its name, for formulas and for :class:`Term`.

    Raises
    ------
    TypeError
        If it is no :class:`Structure`.
    ValueError
        If another structure holds the name.
    """
    if not isinstance(structure, Structure):
        kind = type(structure).__name__
        raise TypeError(f"register_structure takes a Structure; found {kind}")
    if _add(structure) is not structure:
        raise ValueError(
            f"the covariance structure {structure.name!r} is registered already; "
            "choose another name"
        )


def _add(structure: Structure) -> Structure:
    return _REGISTRY.setdefault(structure.name, structure)


@functools.cache
def check_structure(name: str, k: int) -> None:
    """Refuse a structure whose parts do not fit together for k effects.

    Raises
    ------
    FormulaError
        If it is unknown.
    ValueError
        If ``start`` or ``Lambda`` have a shape that ``n_theta`` does not promise.
    """
    kind = structure(name)
    m = kind.n_theta(k)
    found = len(kind.start(k))
    if found != m:
        raise ValueError(
            f"structure {name!r}: start({k}) has {found} values where n_theta({k}) "
            f"is {m}"
        )
    if kind.Lambda.__module__ == __name__:
        return  # this module's own: nothing to trace
    theta = jax.ShapeDtypeStruct((m,), jnp.result_type(float))
    out = jax.eval_shape(lambda theta: kind.Lambda(theta, k), theta)
    if out.shape != (k, k):
        raise ValueError(
            f"structure {name!r}: Lambda(theta, {k}) has shape {out.shape}; it must be "
            f"({k}, {k})"
        )


def structure(name: str) -> Structure:
    """Look a registered structure up.

    Raises
    ------
    FormulaError
        If there is none of that name; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise FormulaError(
            f"unknown covariance structure {name!r}; known: "
            f"{', '.join(structure_names())}. Add your own with register_structure."
        )
    return _REGISTRY[name]


def structure_names() -> list[str]:
    """Names of the registered structures."""
    return sorted(_REGISTRY)


_add(
    Structure(
        "full",
        n_theta=lambda k: k * (k + 1) // 2,
        Lambda=_from_entries(_full_entries),
        start=lambda k: tuple(float(i == j) for i, j in zip(*_full_entries(k))),
        row=lambda k: tuple(int(i) for i in _full_entries(k)[0]),
        column=lambda k: tuple(int(j) for j in _full_entries(k)[1]),
        triangular=True,
        labels=_full_labels,
    )
)
_add(
    Structure(
        "diag",
        n_theta=lambda k: k,
        Lambda=_from_entries(_diag_entries),
        start=lambda k: (1.0,) * k,
        row=lambda k: tuple(range(k)),
        column=lambda k: tuple(range(k)),
        labels=list,
    )
)
_add(
    Structure(
        "scalar",
        n_theta=lambda k: 1,
        Lambda=lambda theta, k: theta[0] * jnp.eye(k, dtype=theta.dtype),
        start=lambda k: (1.0,),
        row=lambda k: (0,),
        column=lambda k: (0,),
        common=True,
        labels=lambda names: ["scale"],
    )
)
