"""Make power_crossed.json: lme4's fits of the data sets behind two points of a curve.

Needs R with lme4: python power_crossed.py [N_SIMS [OUT]]. The data sets are those that
``power_curve`` draws, from its key and their numbers; power_crossed.R fits them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import jaxglmm as jg

HERE = Path(__file__).parent
FORMULA = "y ~ x + (x | subject) + (x | item)"
KEY, N_SIMS, EFFECTS = 11, 20, (0.12, 0.23)  # power of about 0.3 and 0.8


def crossed_data() -> pd.DataFrame:
    """40 subjects and 30 items; which of two conditions x they meet in is random."""
    subject, item = np.divmod(np.arange(1200), 30)
    x = np.where(np.random.default_rng(1).random(1200) < 0.5, -0.5, 0.5)
    return pd.DataFrame({"y": x, "x": x, "subject": subject, "item": item})


def crossed_truth() -> jg.Params:
    """Subjects vary more than items, in their levels and in their effects."""
    theta = np.array([0.5, 0.1, 0.3, 0.4, -0.05, 0.2])
    return jg.Params(np.array([2.0, 0.0]), theta, np.array(1.0))


def responses(design: jg.Design, n_sims: int) -> np.ndarray:
    """The responses that ``power_curve`` draws, (points * n_sims, n)."""
    beta = np.repeat([[2.0, effect] for effect in EFFECTS], n_sims, axis=0)

    def draw(i, beta):
        key = jax.random.fold_in(jax.random.key(KEY), i)
        return jg.simulate(key, crossed_truth().replace(beta=beta), design)

    return np.asarray(jax.jit(jax.vmap(draw))(np.arange(len(beta)), beta))


def main(n_sims: int, out: Path) -> None:
    """Draw, write, have lme4 fit, keep."""
    data = crossed_data()
    with jax.enable_x64(True):
        ys = responses(jg.design(FORMULA, data), n_sims)
    columns = {f"y{i}": y for i, y in enumerate(ys)}
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "data.csv", Path(folder) / "out.csv"
        whole = pd.concat([data.drop(columns="y"), pd.DataFrame(columns)], axis=1)
        whole.to_csv(given, index=False, float_format="%.17g")
        said = subprocess.run(
            ["Rscript", HERE / "power_crossed.R", given, made],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        fits = pd.read_csv(made)
    version, engine, seconds = said.split()
    print(f"{seconds} s for a fit")
    case = {"R": version, "lme4": engine, "formula": FORMULA, "key": KEY}
    case |= {"n_sims": n_sims, "effects": EFFECTS, **fits.to_dict("list")}
    out.write_text(json.dumps(case, indent=1) + "\n")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        int(given[0]) if given else N_SIMS,
        Path(given[1]) if len(given) > 1 else HERE / "power_crossed.json",
    )
