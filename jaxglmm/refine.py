"""Gaussian fits whose random effects dwarf the residuals, from a factor of the rows.

Cross-products lose theta^2 of their digits to rounding, since the residual sum of
squares is a difference of sums of y'y. Orthogonal transformations of the rows lose only
theta. With A = [Z X y] first reduced to a triangle, at Lambda (all terms')

    [Z Lambda]                 [K1]
    [   I    ] = O [T; 0],     [K2] = the last columns of O,     V^-1 = K1 K1',    (1)

where V = I + Z Q Z' and log|V| = 2 log|T|. Rows whitened by K1', Z~ = K1'Z and so on,
give every quantity without a difference of large numbers. With P the projection off X~,
e = P y~, U_i = Z~ Lambda_i (Lambda_i the derivative in theta_i), U = Z~ Lambda and
V_i = U_i U' + U U_i', for ML, and for REML with P on both sides of every V_i,

    d_i log|V|  = tr V_i,           d_ij log|V| = 2 tr U_i'U_j - tr V_i V_j
    d_i r^2     = -e'V_i e,         d_ij r^2    = 2 e'V_i P V_j e - 2 e'U_i U_j'e  (2)

On the host, dense: for data of moderate size that need it, which are rare.

Shapes: Z (r, q), X (r, p), y (r,), r = q + p + 1 rows at most after the reduction.

References: Bjorck (1996), Numerical Methods for Least Squares Problems, ch. 2;
Harville (1977), JASA 72, doi:10.2307/2286796.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import scipy.optimize

from jaxglmm.covariance import structure
from jaxglmm.crossproducts import CrossProducts, Units, inner_columns
from jaxglmm.designs import Design
from jaxglmm.errors import Status
from jaxglmm.linear import Raw, is_singular, rounding
from jaxglmm.optimize import Minimum
from jaxglmm.plan import Layout

__all__ = ["is_saturated", "refine", "wants_refining"]

_ENOUGH = 1e-9  # rounding of the criterion that nobody notices
_MOST_NUMBERS = 2e7  # of [Z X y]
_MOST_COLUMNS = 1000
_SMALL = 200  # columns of Z, up to which a refined fit is done in a moment
_CORRELATIONS = (-0.95, -0.5, 0.5, 0.95)
_MAX_ITER = 60
_FARTHEST = 10.0  # steps of theta, relative to the largest of them
_RESOLVED = 1e-10  # a decrement of 1e-5 standard errors
_EPS = float(np.finfo(np.float64).eps)


def wants_refining(raw: Raw, cp: CrossProducts, arrays: Design) -> bool:
    """Whether rounding of the criterion shows, and the data are not too large."""
    theta = np.asarray(raw.theta)
    if (
        not np.isfinite(theta).all()
        or rounding(theta, float(cp.n), arrays.layout) < _ENOUGH
    ):
        return False
    columns = sum(b.size for b in arrays.layout.blocks) + arrays.X.shape[1] + 1
    small = columns <= _MOST_COLUMNS and columns * arrays.n_obs <= _MOST_NUMBERS
    return small


@dataclass(frozen=True)
class _Term:
    """Columns of one term among those of Z, and d Lambda / d theta (m, k, k)."""

    columns: slice
    n_levels: int
    basis: np.ndarray

    def factor(self, theta: np.ndarray) -> np.ndarray:
        """Lambda (k, k)."""
        return np.tensordot(theta, self.basis, 1)

    def times(self, Z: np.ndarray, Lam: np.ndarray) -> np.ndarray:
        """Z Lambda by level: (r, J k) -> (r, J k)."""
        cube = Z[:, self.columns].reshape(len(Z), self.n_levels, -1)
        return (cube @ Lam).reshape(len(Z), -1)


@dataclass(frozen=True)
class _Rows:
    """The triangle of [Z X y] and what the criterion needs to know of it."""

    Z: np.ndarray
    X: np.ndarray
    y: np.ndarray
    terms: tuple[_Term, ...]
    reml: float
    cp: CrossProducts

    @property
    def dof(self) -> float:
        """Rows, less the fixed effects for REML."""
        return float(self.cp.n - self.reml * self.cp.p)

    def noise(self, theta: np.ndarray) -> float:
        """Rounding of the criterion, ()."""
        return 10.0 * _EPS * float(self.cp.n) * max(1.0, float(np.max(np.abs(theta))))


def _reduced(arrays: Design, cp: CrossProducts, units: Units, reml: float) -> _Rows:
    """Rows in inner units times the roots of their weights, as a triangle."""
    X, y, z, w = inner_columns(arrays, units)
    root, n = np.sqrt(w)[:, None], len(y)
    terms, parts, start = [], [], 0
    for term, columns in zip(arrays.terms, z):
        parts.append(_dense(term, columns))
        stop = start + parts[-1].shape[1]
        terms.append(_Term(slice(start, stop), term.n_levels, _basis(term)))
        start = stop
    used = np.asarray(units.aliased) == 0
    A = np.concatenate([*parts, X[:, used], y[:, None]], axis=1) * root
    if n > A.shape[1]:
        A = np.asarray(np.linalg.qr(A, mode="r"))
    return _Rows(A[:, :start], A[:, start:-1], A[:, -1], tuple(terms), reml, cp)


def _dense(term, columns: np.ndarray) -> np.ndarray:
    """Z of one term, (n, J k), a level's effects side by side."""
    Z = np.zeros((len(columns), term.n_levels, columns.shape[1]))
    Z[np.arange(len(columns)), np.asarray(term.group)] = columns
    return Z.reshape(len(columns), -1)


def is_saturated(design: Design) -> bool:
    """Whether [Z X] reproduces any response: its rank is the number of rows.

    The residual variance of a linear model can then run to zero.
    """
    n, columns = design.n_obs, design.X.shape[1]
    columns += sum(t.n_levels * t.k for t in design.terms)
    if columns < n or columns > _MOST_COLUMNS:
        return False
    Z = [_dense(t, np.asarray(t.z)) for t in design.terms]
    A = np.concatenate([*Z, np.asarray(design.X)], axis=1)
    size = np.linalg.norm(A, axis=0)
    return int(np.linalg.matrix_rank(A / np.where(size > 0, size, 1.0))) >= n


def _basis(term) -> np.ndarray:
    """D Lambda / d theta (m, k, k) of a structure that is linear in theta."""
    kind, k = structure(term.structure), term.k
    if kind.common:
        return np.eye(k)[None]
    assert kind.row is not None
    assert kind.column is not None
    rows, columns = np.array(kind.row(k)), np.array(kind.column(k))
    basis = np.zeros((len(rows), k, k))
    basis[np.arange(len(rows)), rows, columns] = 1.0
    return basis


@dataclass(frozen=True)
class _At:
    """The criterion and what follows from it at one theta; see (1) and (2)."""

    rows: _Rows
    theta: np.ndarray

    @cached_property
    def Lambdas(self) -> list[np.ndarray]:
        """Factor (k, k) of every term."""
        edges = np.cumsum([len(t.basis) for t in self.rows.terms])[:-1]
        parts = np.split(self.theta, edges)
        return [t.factor(v) for t, v in zip(self.rows.terms, parts)]

    @cached_property
    def _orthogonal(self) -> tuple[np.ndarray, np.ndarray]:
        r, q = self.rows.Z.shape
        terms = zip(self.rows.terms, self.Lambdas)
        U = np.concatenate([t.times(self.rows.Z, L) for t, L in terms], axis=1)
        O, T = np.linalg.qr(np.concatenate([U, np.eye(q)]), mode="complete")
        return O[:r], T[:q]

    @cached_property
    def _white(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        K1 = self._orthogonal[0][:, self.rows.Z.shape[1] :]
        return K1.T @ self.rows.Z, K1.T @ self.rows.X, K1.T @ self.rows.y

    @cached_property
    def _fixed(self) -> tuple[np.ndarray, np.ndarray]:
        Q, R = np.linalg.qr(self._white[1])
        return Q, R

    @cached_property
    def residuals(self) -> np.ndarray:
        """E = P y~, (r,)."""
        return self._off(self._off(self._white[2]))

    def _off(self, x: np.ndarray) -> np.ndarray:
        Q = self._fixed[0]
        return x - Q @ (Q.T @ x)

    @cached_property
    def rss(self) -> float:
        """Penalized residual sum of squares."""
        return float(self.residuals @ self.residuals)

    @cached_property
    def beta(self) -> np.ndarray:
        """Fixed effects (p,) of the columns in use."""
        Q, R = self._fixed
        return scipy.linalg.solve_triangular(R, Q.T @ self._white[2])

    @cached_property
    def gls(self) -> np.ndarray:
        """Inverse (p, p) of X'V^-1 X."""
        R = self._fixed[1]
        R_inv = scipy.linalg.solve_triangular(R, np.eye(len(R)))
        return R_inv @ R_inv.T

    @cached_property
    def u(self) -> np.ndarray:
        """Spherical conditional modes (q,)."""
        O, T = self._orthogonal
        rest = self.rows.y - self.rows.X @ self.beta
        return scipy.linalg.solve_triangular(T, O[:, : len(T)].T @ rest)

    @cached_property
    def value(self) -> float:
        """-2 log L or the REML criterion."""
        rows, cp = self.rows, self.rows.cp
        logdet = 2.0 * np.sum(np.log(np.abs(np.diagonal(self._orthogonal[1]))))
        logdet_X = 2.0 * np.sum(np.log(np.abs(np.diagonal(self._fixed[1]))))
        sigma = 1.0 + np.log(2.0 * np.pi * self.rss / rows.dof)
        value = logdet + rows.reml * (logdet_X + cp.constant_reml)
        return float(value + rows.dof * sigma + cp.constant)

    @cached_property
    def derivatives(self) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (m,) and Hessian (m, m) by (2)."""
        rows, Z, e = self.rows, self._white[0], self.residuals
        Z_off = self._off(Z) if rows.reml else Z
        U, own, V, Ve, along = [], [], [], [], []
        for t, (term, Lam) in enumerate(zip(rows.terms, self.Lambdas)):
            base, base_e = term.times(Z_off, Lam), term.times(e[None] @ Z, Lam)[0]
            full = term.times(Z, Lam)
            for B in term.basis:
                U_i, U_ie = term.times(Z_off, B), term.times(e[None] @ Z, B)[0]
                half = U_i @ base.T
                U.append(U_i)
                own.append((t, 2.0 * np.sum(U_i * base), 2.0 * (U_ie @ base_e)))
                V.append(half + half.T)
                Ve.append(self._off(term.times(Z, B) @ base_e + full @ U_ie))
                along.append(U_ie)
        m, dof, rss = len(U), rows.dof, self.rss
        slope = -np.array([d for _, _, d in own])
        grad = np.array([d for _, d, _ in own]) + dof * slope / rss
        hess = np.empty((m, m))
        for i in range(m):
            for j in range(i + 1):
                logdet, square = -np.sum(V[i] * V[j]), 2.0 * (Ve[i] @ Ve[j])
                if own[i][0] == own[j][0]:
                    logdet = logdet + 2.0 * np.sum(U[i] * U[j])
                    square = square - 2.0 * (along[i] @ along[j])
                change = square / rss - slope[i] * slope[j] / rss**2
                hess[i, j] = hess[j, i] = logdet + dof * change
        return grad, hess


# ---- the optimum -------------------------------------------------------------------


def refine(
    raw: Raw, arrays: Design, cp: CrossProducts, units: Units, reml: float
) -> tuple[Raw, int]:
    """The fit anew from where cross-products have led, and how many starts more.

    ``raw`` where nothing helps. Effects of a term are ordered by size, as in
    coordinates.py, while it moves. Large effects with a correlation of +-1 have lesser
    optima more often than not, so that is sought from other correlations too.
    """
    if is_saturated(arrays):
        return raw, 0
    rows = _reduced(arrays, cp, units, reml)
    theta, orders = _pivoted(np.asarray(raw.theta), rows, arrays.layout)
    start = _At(_reordered(rows, orders), theta)
    if not np.isfinite(start.value):
        return raw, 0
    best, n_iter = _minimize(start)
    others = _other_correlations(best) if is_singular(tuple(best.Lambdas)) else []
    for other in others:
        found, more = _minimize(other)
        n_iter += more
        if found.value < best.value - best.rows.noise(best.theta):
            best = found
    decrement, smallest, status = _judged(best)
    before = Status(int(raw.status))
    if status == Status.STALLED and not before.ok:
        status = before  # a climb without end is called what it was
    theta = _user_order(best, orders)
    end = _At(rows, theta)
    grad, hess = end.derivatives
    raw = _as_raw(raw, end, grad, hess, decrement, smallest, n_iter, status, arrays)
    return raw, len(others)


def _other_correlations(at: _At) -> list[_At]:
    """The same variances with correlations inside, where a term has any."""
    if all(len(Lam) == 1 for Lam in at.Lambdas) or at.rows.Z.shape[1] > _SMALL:
        return []
    out = []
    for rho in _CORRELATIONS:
        parts = []
        for term, Lam in zip(at.rows.terms, at.Lambdas):
            k = len(Lam)
            sign = np.where(np.arange(k) > 0, np.sign(rho), 1.0)
            R = (1.0 - abs(rho)) * np.eye(k) + abs(rho) * np.outer(sign, sign)
            L = np.linalg.norm(Lam, axis=1)[:, None] * np.linalg.cholesky(R)
            share = np.sum(term.basis, axis=(1, 2))
            parts.append(np.sum(term.basis * L, axis=(1, 2)) / share)
        out.append(_At(at.rows, np.concatenate(parts)))
    return out


def _units(at: _At) -> np.ndarray:
    """What a step of one is for every theta: where its own curvature is one.

    A variance of zero beside large ones answers to changes of their size only.
    """
    curvature = np.abs(np.diagonal(at.derivatives[1]))
    most = _FARTHEST * max(1.0, float(np.max(np.abs(at.theta))))
    return np.minimum(1.0 / np.sqrt(np.maximum(curvature, 1e-300)), most)


def _minimize(start: _At) -> tuple[_At, int]:
    """Newton's method with a trust region, in the units that the start has."""
    unit = _units(start)
    seen: dict[bytes, _At] = {}

    def at(x):
        key = np.asarray(x, float).tobytes()
        if key not in seen:
            seen[key] = _At(start.rows, unit * x)
        return seen[key]

    with np.errstate(all="ignore"):
        scipy.optimize.minimize(
            lambda x: at(x).value,
            start.theta / unit,
            jac=lambda x: at(x).derivatives[0] * unit,
            hess=lambda x: at(x).derivatives[1] * unit[:, None] * unit,
            method="trust-exact",
            options={"gtol": 1e-8, "maxiter": _MAX_ITER, "initial_trust_radius": 1.0},
        )
    found = [a for a in seen.values() if np.isfinite(a.value)]
    lowest = min(a.value for a in found) + start.rows.noise(start.theta)
    near = [a for a in found if a.value <= lowest]
    # among values that rounding does not tell apart, where the gradient is smallest
    return min(near, key=lambda a: float(np.sum((a.derivatives[0] * unit) ** 2))), len(
        seen
    )


def _judged(at: _At) -> tuple[float, float, Status]:
    """Decrement, smallest eigenvalue over the largest, and how it ended."""
    unit = _units(at)
    grad, hess = at.derivatives
    d, B = np.linalg.eigh(hess * unit[:, None] * unit)
    size = np.max(np.abs(d), initial=1e-300)
    floor = np.maximum(np.abs(d), 1e-10 * size)
    decrement = float(np.sum((B.T @ (grad * unit)) ** 2 / floor))
    smallest = float(np.min(d) / size)
    status = Status.STALLED
    if decrement <= max(_RESOLVED, at.rows.noise(at.theta)) and smallest >= -1e-6:
        status = Status.CONVERGED if smallest > 1e-10 else Status.NOT_IDENTIFIED
    return decrement, smallest, status


def _pivoted(theta, rows: _Rows, layout: Layout):
    """Theta and the order of effects of every term, large variances first."""
    parts, orders, start = [], [], 0
    for term, name in zip(rows.terms, layout.structures):
        own = theta[start : start + len(term.basis)]
        start += len(own)
        order = None
        if structure(name).triangular and term.basis.shape[1] > 1:
            Lam = term.factor(own)
            order = np.argsort(-np.sum(Lam**2, axis=1), kind="stable")
            own = np.sum(term.basis * _lower(Lam[order]), axis=(1, 2))
        parts.append(own)
        orders.append(order)
    return np.concatenate(parts), orders


def _lower(root: np.ndarray) -> np.ndarray:
    """Lower triangular root, diagonal >= 0, of root root'."""
    L = np.asarray(np.linalg.qr(root.T, mode="r")).T
    return L * np.where(np.diagonal(L) < 0, -1.0, 1.0)


def _reordered(rows: _Rows, orders) -> _Rows:
    Z = rows.Z.copy()
    for term, order in zip(rows.terms, orders):
        if order is not None:
            cube = rows.Z[:, term.columns].reshape(len(Z), term.n_levels, -1)
            Z[:, term.columns] = cube[:, :, order].reshape(len(Z), -1)
    return _Rows(Z, rows.X, rows.y, rows.terms, rows.reml, rows.cp)


def _user_order(at: _At, orders) -> np.ndarray:
    """Canonical theta in the user's order of effects."""
    parts = []
    for term, Lam, order in zip(at.rows.terms, at.Lambdas, orders):
        if order is not None:
            back = np.empty_like(Lam)
            back[order] = Lam
            Lam = _lower(back)
        sign = np.where(np.diagonal(Lam) < 0, -1.0, 1.0)
        own = np.sum(term.basis * (Lam * sign), axis=(1, 2))
        parts.append(own / np.sum(term.basis, axis=(1, 2)))
    return np.concatenate(parts)


def _as_raw(raw, end: _At, grad, hess, decrement, smallest, n_iter, status, arrays):
    """The fit in inner units, with the shapes of the design."""
    rows, p = end.rows, arrays.X.shape[1]
    used = np.asarray(raw.gls[:p, :p]).diagonal() != 0
    used = used if used.sum() == len(end.beta) else np.ones(p, bool)
    beta, gls = np.zeros(p), np.zeros((p, p))
    beta[used] = end.beta
    gls[np.ix_(used, used)] = end.gls
    sigma2 = end.rss / rows.dof
    singular = bool(is_singular(tuple(end.Lambdas)))
    if status == Status.CONVERGED and singular:
        status = Status.BOUNDARY
    if not sigma2 > (100.0 * _EPS) ** 2:
        status = Status.NONFINITE
    u = [end.u[t.columns].reshape(t.n_levels, -1) for t in rows.terms]
    b = [v @ Lam.T for v, Lam in zip(u, end.Lambdas)]
    minimum: Minimum = raw.minimum._replace(
        decrement=np.float64(decrement), min_eigenvalue=np.float64(smallest),
        n_iter=np.int32(int(raw.minimum.n_iter) + n_iter),
    )  # fmt: skip
    return raw._replace(
        minimum=minimum, grad=grad, hess=hess, theta=end.theta, beta=beta, gls=gls,
        sigma2=np.float64(sigma2), objective=np.float64(end.value), u=tuple(u),
        b=tuple(b), status=np.int32(status), is_singular=np.bool_(singular),
    )  # fmt: skip
