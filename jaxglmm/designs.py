"""The design: arrays in a pytree, the plan computed once on the host.

    eta = offset + X beta + sum_t Z_t b_t,      one row of Z_t b_t = z_i . b[group_i]

X (n, p); each term t has z (n, k) and group (n,), never a dense Z. Terms that share a
grouping factor form one *block*. The plan says in which order blocks are eliminated:

    chain   leaf, its parent, ... root: each level lies in one level of the next, seen
            from the codes and not from the formula; eliminated by segment sums
    tail    every block crossed with the chain; eliminated last, by one Cholesky

With one grouping factor or nested ones the tail is empty.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxglmm.covariance import check_structure, structure
from jaxglmm.errors import DesignError
from jaxglmm.plan import Layout, Plan, make_plan, same_codes
from jaxglmm.typing import Array

__all__ = ["Design", "Predictor", "Term", "check_design"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One random-effects term, as ``(z1 + z2 | group)``.

    Parameters
    ----------
    z : Array, (n, k)
        Columns of the random-effects design; a column of ones for an intercept.
    group : Array, (n,) int
        Level codes 0 ... n_levels - 1.
    n_levels : int, optional
        Number of levels; read off ``group`` when left out.
    structure : str
        Covariance structure of the k effects, see :mod:`jaxglmm.covariance`.
    predictor : int
        The linear predictor to which the term adds: 0 for the mean, r for
        ``Design.others[r - 1]``.
    """

    z: Array
    group: Array
    n_levels: int = dataclasses.field(default=0, metadata={"static": True})
    structure: str = dataclasses.field(default="full", metadata={"static": True})
    predictor: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        if self.n_levels == 0 and hasattr(self.group, "shape"):
            object.__setattr__(self, "n_levels", _count_levels(self.group))

    @property
    def k(self) -> int:
        """Effects per level."""
        return self.z.shape[1]


def _count_levels(group: Array) -> int:
    if isinstance(group, Tracer):
        raise DesignError(
            "n_levels cannot be read off a traced group; give Term(..., n_levels=J)"
        )
    return int(np.max(group)) + 1 if np.size(group) else 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictor:
    """Fixed part of a further linear predictor, as of zero inflation or dispersion.

    Parameters
    ----------
    X : Array, (n, p)
        Fixed-effects design.
    offset : Array, (n,), optional
        Known part.
    """

    X: Array
    offset: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Design:
    """Everything the likelihood needs, as one pytree.

    Parameters
    ----------
    y : Array, (n,)
        Response.
    X : Array, (n, p)
        Fixed-effects design.
    terms : tuple of Term
        Random-effects terms; theta follows their order.
    weights : Array, (n,), optional
        Prior weights. Gaussian: precision weights, Var(y_i) = sigma^2 / w_i. A row of
        weight zero does not count.
    offset : Array, (n,), optional
        Known part of the linear predictor.
    others : tuple of Predictor
        Further linear predictors, for families that have them; random terms say with
        ``Term(predictor=r)`` to which they add.
    plan : Plan, optional
        Made from the group codes when left out, which needs them concrete: build the
        Design outside ``jit`` and pass it in.

    Raises
    ------
    DesignError
        If shapes or codes do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> import jaxglmm as jg
    >>> g = np.repeat(np.arange(3), 4)
    >>> X = np.ones((12, 1))
    >>> design = jg.Design(y=np.arange(12.0), X=X, terms=(jg.Term(z=X, group=g),))
    >>> design.replace(y=np.ones(12)).n_obs
    12
    """

    y: Array
    X: Array
    terms: tuple[Term, ...]
    weights: Array | None = None
    offset: Array | None = None
    others: tuple[Predictor, ...] = ()
    plan: Plan | None = None

    def __post_init__(self):
        # a tree function may rebuild a Design around placeholders: those pass
        given = hasattr(self.y, "shape") or isinstance(self.y, (list, tuple))
        if self.plan is None and given:
            check_design(self)
            for i, term in enumerate(self.terms):
                _check_codes(term, i)
            object.__setattr__(self, "plan", make_plan(self.terms))

    def replace(self, **changes) -> Design:
        """Copy with some arrays changed; the plan is kept while the groups are."""
        if "terms" in changes and not _same_groups(self.terms, changes["terms"]):
            changes.setdefault("plan", None)
        plan = changes.get("plan", self.plan)
        if plan is not None and not changes.keys() <= {"y", "offset", "plan"}:
            changes["plan"] = dataclasses.replace(plan, alike=None)  # no longer known
        return dataclasses.replace(self, **changes)

    @property
    def n_obs(self) -> int:
        """Rows."""
        return self.y.shape[-1]

    @property
    def layout(self) -> Layout:
        """Static sizes and elimination order."""
        assert self.plan is not None
        return self.plan.layout

    @cached_property
    def n_theta(self) -> int:
        """Number of covariance parameters m."""
        return sum(structure(t.structure).n_theta(t.k) for t in self.terms)


def _same_groups(old: tuple[Term, ...], new: tuple[Term, ...]) -> bool:
    """Whether only z differs, so that a plan made for the old terms holds."""

    def facts(terms):
        return [(t.n_levels, t.k, t.structure, t.predictor) for t in terms]

    return facts(old) == facts(new) and all(
        same_codes(a.group, b.group) for a, b in zip(old, new)
    )


def _check_array(name: str, value) -> None:
    if not hasattr(value, "shape"):
        raise DesignError(f"{name} must be an array; found {type(value).__name__}")


def check_design(design: Design) -> None:
    """Refuse arrays whose shapes do not fit together."""
    y, X = design.y, design.X
    _check_array("y", y)
    _check_array("X", X)
    if y.ndim != 1:
        raise DesignError(f"y must have shape (n,); found {y.shape}")
    n = y.shape[0]
    if n == 0:
        raise DesignError("y has no rows; a design needs data")
    if X.ndim != 2 or X.shape[0] != n:
        raise DesignError(
            f"X must have shape ({n}, p) as y has {n} rows; found {X.shape}"
        )
    if not isinstance(design.terms, tuple):
        found = type(design.terms).__name__
        raise DesignError(f"terms must be a tuple of Term; found {found}")
    if not design.terms:
        raise DesignError("terms is empty: a mixed model needs at least one Term")
    for name in ("weights", "offset"):
        value = getattr(design, name)
        if value is None:
            continue
        _check_array(name, value)
        if value.shape != (n,):
            raise DesignError(f"{name} must have shape ({n},); found {value.shape}")
    for i, other in enumerate(design.others):
        if not isinstance(other, Predictor):
            found = type(other).__name__
            raise DesignError(f"others[{i}] must be a Predictor; found {found}")
        _check_array(f"others[{i}].X", other.X)
        if other.X.ndim != 2 or other.X.shape[0] != n:
            raise DesignError(
                f"others[{i}].X must have shape ({n}, p); found {other.X.shape}"
            )
        if other.offset is not None and jnp.shape(other.offset) != (n,):
            raise DesignError(
                f"others[{i}].offset must have shape ({n},); found "
                f"{jnp.shape(other.offset)}"
            )
    for i, term in enumerate(design.terms):
        if not isinstance(term, Term):
            raise DesignError(f"terms[{i}] must be a Term; found {type(term).__name__}")
        _check_term(term, i, n)


def _check_term(term: Term, i: int, n: int) -> None:
    _check_array(f"terms[{i}].z", term.z)
    _check_array(f"terms[{i}].group", term.group)
    if term.z.ndim != 2 or term.z.shape[0] != n:
        raise DesignError(
            f"terms[{i}].z must have shape ({n}, k); found {term.z.shape}. An "
            "intercept is a column of ones."
        )
    if term.group.shape != (n,):
        raise DesignError(
            f"terms[{i}].group must have shape ({n},); found {term.group.shape}"
        )
    if not jnp.issubdtype(term.group.dtype, jnp.integer):
        raise DesignError(
            f"terms[{i}].group must hold integer codes; found {term.group.dtype}"
        )
    check_structure(term.structure, term.k)


def _check_codes(term: Term, i: int) -> None:
    if isinstance(term.group, Tracer):
        return
    codes = np.asarray(term.group)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= term.n_levels:
        raise DesignError(
            f"terms[{i}].group must hold codes 0 ... {term.n_levels - 1}; "
            f"found {low} ... {high}"
        )
