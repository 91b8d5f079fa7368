"""Python peers as workers of the runner: glmm, gpboost, mixedlm, statsmodels.

Run by the interpreter given as ``--peer-python``, which need not have jaxglmm. Every
peer gets the frame as read; what only rearranges it (codes, dummies) is not timed.
"""

from __future__ import annotations

from typing import Any

from protocol import Engine, Job, serve

_COMPARED = 100  # responses refitted in one call


def read(request: dict) -> Any:
    """Read the frame, factors as categoricals."""
    import pandas as pd

    types: Any = dict.fromkeys(request["factors"], "category")
    return pd.read_csv(request["data"], dtype=types)


def responses(request: dict) -> list:
    import pandas as pd

    table = pd.read_csv(request["responses"]).to_numpy(float)
    return [table[:, i].copy() for i in range(_COMPARED)]


def repeated(one, objective, ys: list, n: int) -> Job:
    """Fit each response in turn."""
    return Job(
        call=lambda: [one(y) for y in ys],
        objective=lambda fits: sum(map(objective, fits)) / len(fits),
        n=n,
        fits=len(ys),
    )


def glmm(request: dict) -> Job:
    """Without degrees of freedom and term tables, which the others do not compute."""
    import glmm

    frame = read(request)

    family = request["distribution"]
    options = {"reml": request["reml"]} if family == "gaussian" else {"family": family}

    def fit(data):
        return glmm.fit(
            data, request["formula"], satterthwaite=False, anova_test="Wald", **options
        )

    def objective(result):
        return -2.0 * result.loglik

    if request["responses"]:
        columns = {c: frame[c] for c in frame}
        response = request["response"]

        def one(y):
            if "healthy" in columns:  # numbers of cases
                return fit({**columns, "incidence": y, "healthy": frame["size"] - y})
            return fit({**columns, response: y})

        return repeated(one, objective, responses(request), len(frame))
    return Job(call=lambda: fit(frame), objective=objective, n=len(frame))


def mixedlm(request: dict) -> Job:
    import mixedlm

    frame = read(request)

    def fit():
        return mixedlm.lmer(request["formula"], frame, REML=request["reml"])

    def objective(result):
        return -2.0 * float(result.logLik().value)

    if request["responses"]:
        first = fit()
        return repeated(first.refit, objective, responses(request), len(frame))
    return Job(call=fit, objective=objective, n=len(frame))


def statsmodels(request: dict) -> Job:
    """One grouping factor; the formula's random part goes into ``re_formula``."""
    from statsmodels.formula.api import mixedlm

    frame = read(request)
    ((effects, group),) = request["random"]
    fixed = f"{request['response']} ~ {request['fixed']}"

    def fit(frame=frame):
        model = mixedlm(fixed, frame, groups=frame[group], re_formula=f"~ {effects}")
        return model.fit(reml=request["reml"])

    def objective(result):
        return -2.0 * result.llf

    if request["responses"]:

        def one(y):
            return fit(frame.assign(**{request["response"]: y}))

        return repeated(one, objective, responses(request), len(frame))
    return Job(call=fit, objective=objective, n=len(frame))


def gpboost(request: dict) -> Job:
    """Maximum likelihood only, and effects of one level are independent."""
    import gpboost
    import numpy as np
    import pandas as pd

    frame = read(request)
    y = frame[request["response"]].to_numpy(float)
    columns = request["fixed"].split(" + ")
    fixed = pd.get_dummies(frame[columns], drop_first=True, dtype=float)
    likelihood = {"binomial": "bernoulli_logit"}.get(
        request["distribution"], request["distribution"]
    )
    X = np.column_stack([np.ones(len(frame)), fixed.to_numpy(float)])
    codes = [_codes(frame, group) for _, group in request["random"]]
    slopes = [
        (frame[effects].to_numpy(float), i + 1)
        for i, (effects, _) in enumerate(request["random"])
        if effects != "1"
    ]
    options: dict[str, Any] = {"group_data": np.column_stack(codes)}
    if slopes:
        options["group_rand_coef_data"] = np.column_stack([z for z, _ in slopes])
        options["ind_effect_group_rand_coef"] = [i for _, i in slopes]

    def fit():
        model = gpboost.GPModel(likelihood=likelihood, **options)
        model.fit(y=y, X=X)
        return model

    return Job(
        call=fit,
        objective=lambda m: 2.0 * m.get_current_neg_log_likelihood(),
        n=len(frame),
        note=lambda m: "ML" + (", slope independent of intercept" if slopes else ""),
    )


def _codes(frame, group: str) -> Any:
    """Integer codes of a grouping factor, ``a:b`` meaning their combinations."""
    groups = frame.groupby(group.split(":"), observed=True, sort=False)
    return groups.ngroup().to_numpy()


ENGINES = {
    "glmm": Engine(("glmm",), glmm),
    "gpboost": Engine(("gpboost",), gpboost),
    "mixedlm": Engine(("mixedlm",), mixedlm),
    "statsmodels": Engine(("statsmodels",), statsmodels),
}

if __name__ == "__main__":
    serve(ENGINES)
