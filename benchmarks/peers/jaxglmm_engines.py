"""jaxglmm as a worker of the runner: both doors, each from a frame that is read.

``jaxglmm`` is ``glmm(formula, frame)``: encoding, fit, names; for refits, ``vmap`` of
``fit``. ``jaxglmm-fit`` is ``jax.jit(fit)(design)``, arrays in and arrays out.
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


def _lanes(request: dict) -> Job:
    """All responses at once, in one compiled program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pandas as pd

    import jaxglmm as jg

    frame = read(request)
    table = pd.read_csv(request["responses"]).to_numpy(float).T
    with jax.enable_x64(True):
        design = jg.design(request["formula"], frame)
        ys = jnp.asarray(table)

        def one(y):
            return jg.fit(design.replace(y=y), **_options(request))

        compiled = jax.jit(jax.vmap(one))

    def call():
        with jax.enable_x64(True):
            return jax.block_until_ready(compiled(ys))

    return Job(
        call=call,
        # NumPy: a JAX array would fall to float32 outside the float64 block
        objective=lambda fit: np.asarray(fit.objective)[:_COMPARED].mean(),
        n=len(frame),
        fits=len(table),
        note=lambda fit: f"{int((~fit.converged).sum())} of {len(table)} not converged",
        device=_device(),
    )


ENGINES = {
    "jaxglmm": Engine(_MODULES, people),
    "jaxglmm-fit": Engine(_MODULES, functional),
}

if __name__ == "__main__":
    serve(ENGINES)
