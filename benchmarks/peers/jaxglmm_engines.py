"""jaxglmm as a worker of the runner: both doors, each from a frame that is read.

``jaxglmm`` is ``glmm(formula, frame)``: encoding, fit, names; for refits it is
``fit_batch``. ``jaxglmm-fit`` is ``jax.jit(fit)(design)``, arrays in and arrays out;
for refits, one response after another.
"""

from __future__ import annotations

from typing import Any

from protocol import Engine, Job, serve

_MODULES = ("jaxglmm", "jax")
_COMPARED = 100  # lanes whose mean objective is reported


def read(request: dict) -> Any:
    """Read the frame, factors as categoricals."""
    import pandas as pd

    types: Any = dict.fromkeys(request["factors"], "category")
    return pd.read_csv(request["data"], dtype=types)


def _options(request: dict) -> dict:
    family = request["distribution"]
    if family != "gaussian":
        return {"family": family, "method": "Laplace"}
    return {"method": "REML" if request["reml"] else "ML"}


def _device() -> str:
    import jax

    return jax.default_backend()


def people(request: dict) -> Job:
    if request["responses"]:
        return _lanes(request)
    import jaxglmm as jg

    frame = read(request)
    return Job(
        call=lambda: jg.glmm(request["formula"], frame, **_options(request)),
        objective=lambda m: m.fit.objective,
        n=len(frame),
        device=_device(),
    )


def functional(request: dict) -> Job:
    if request["responses"]:
        return _one_by_one(request)
    import jax

    import jaxglmm as jg

    frame = read(request)
    with jax.enable_x64(True):
        design = jg.design(request["formula"], frame)
        compiled = jax.jit(lambda d: jg.fit(d, **_options(request)))

    def call():
        with jax.enable_x64(True):
            return jax.block_until_ready(compiled(design))

    return Job(
        call=call,
        objective=lambda fit: fit.objective,
        n=len(frame),
        device=_device(),
    )


def _refits(request: dict) -> tuple[Any, Any, int]:
    """The design and the responses (L, n) as the design has them, NumPy; rows."""
    import jax
    import numpy as np
    import pandas as pd

    import jaxglmm as jg

    frame = read(request)
    ys = pd.read_csv(request["responses"]).to_numpy(float).T
    with jax.enable_x64(True):
        design = jg.design(request["formula"], frame)
    design = jax.tree.map(np.asarray, design)
    if design.weights is not None:  # counts of successes
        ys = ys / design.weights
    return design, ys, len(frame)


def _lanes(request: dict) -> Job:
    """All responses in one call."""
    import jaxglmm as jg

    design, ys, n = _refits(request)
    options = _options(request)
    return Job(
        call=lambda: jg.fit_batch(design, ys, progress=False, **options),
        objective=lambda fit: fit.objective[:_COMPARED].mean(),
        n=n,
        fits=len(ys),
        note=lambda fit: f"{int((~fit.converged).sum())} of {len(ys)} not converged",
        device=_device(),
    )


def _one_by_one(request: dict) -> Job:
    """The responses that the others are compared on, in a loop over one program."""
    import jax
    import numpy as np

    import jaxglmm as jg

    design, ys, n = _refits(request)
    options = _options(request)
    with jax.enable_x64(True):
        design = jax.tree.map(jax.numpy.asarray, design)
        compiled = jax.jit(lambda y: jg.fit(design.replace(y=y), **options))

    def call():
        with jax.enable_x64(True):
            fits = [compiled(y) for y in ys[:_COMPARED]]
            return [np.asarray(fit.objective) for fit in fits]

    return Job(
        call=call,
        objective=lambda values: float(np.mean(values)),
        n=n,
        fits=_COMPARED,
        device=_device(),
    )


ENGINES = {
    "jaxglmm": Engine(_MODULES, people),
    "jaxglmm-fit": Engine(_MODULES, functional),
}

if __name__ == "__main__":
    serve(ENGINES)
