import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))

# figures a notebook draws at least, and numbers it must reach: name -> value, atol
EXPECTED = {
    "01_quickstart": (
        2,
        {
            "objective": (1743.6283, 1e-3),  # lme4 1.1.31
            "float(m.fixef['Days'])": (10.4673, 1e-3),
            "float(m.se['Days'])": (1.5458, 1e-3),
            "int(boundary.is_singular)": (1, 0),
            "float(simulated_se)": (1.5458, 0.25),  # 200 fits: 3 standard errors
            "int(np.isin(status, [0, 1]).sum())": (200, 0),
            "float(balance_error)": (0.0, 1e-12),
            "float(agreement)": (1.0, 0.01),
            "int(np.argmax(np.abs(influence)) == np.argmax(np.abs(refitted)))": (1, 0),
        },
    ),
    "02_from_the_notebook": (
        2,
        {
            "float(henderson_error)": (0.0, 1e-9),
            "float(np.abs(se_by_hand - linear.se).max())": (0.0, 1e-9),
            "float(real.fixef.iloc[0])": (251.405, 1e-3),
            "float(real.fixef.iloc[1])": (10.467, 1e-3),
            "float(real_error)": (0.0, 1e-3),
            # the likelihood that quadrature finds, two Monte Carlo standard errors
            "error.loglik - models['AGQ'].loglik": (0.0, 0.015),
            "int(error.matters)": (0, 0),
            "float(bias.loc[('as above', 'beta1'), 'PQL'])": (0.127, 0.002),
            "float(bias.loc[('as above', 'beta1'), 'Laplace'])": (0.109, 0.002),
            "float(bias.loc[('as above', 'Q11'), 'PQL'])": (0.087, 0.002),
            "float(bias.loc[('as above', 'Q11'), 'Laplace'])": (0.099, 0.002),
            "float(bias.loc[('a tenth', 'beta1'), 'PQL'])": (0.198, 0.002),
            "float(bias.loc[('a tenth', 'beta1'), 'Laplace'])": (0.112, 0.002),
            "float(bias.loc[('a tenth', 'Q11'), 'PQL'])": (0.066, 0.002),
            "float(bias.loc[('a tenth', 'Q11'), 'Laplace'])": (0.106, 0.002),
            "int(bias['data sets'].min() >= 98)": (1, 0),
        },
    ),
    "03_simulation_and_power": (
        3,
        {
            # REML is unbiased; ML loses 1/18 of Q and the noise of a subject's line
            "list(variances['relative bias'][::2])": ([0, 0, 0], 0.03),
            "list(variances['relative bias'][1::2])": ([-0.07, -0.07, 0], 0.03),
            "float(summary.loc[('REML', 'Days'), 'coverage'] - expected)": (0, 0.018),
            "float(summary.loc[('ML', 'Days'), 'coverage'])": (0.926, 0.018),
            "float(study.rates()['converged'].min())": (1, 0.002),
            "list(herd_summary['coverage'][:4])": ([0.95] * 4, 0.02),
            "float(herd_summary.loc['sd herd', 'bias'])": (-0.065, 0.02),
            "float(boot.estimate['days_to_a_tenth'])": (2.4018, 1e-3),
            "list(intervals.loc['Days', 'percentile'])": ([7.44, 13.50], 0.5),
            "list(intervals.loc['Days', 'bca'])": ([7.44, 13.50], 0.7),
            "float(errors.loc['Days', 'cases'] / errors.loc['Days', 'fit'])": (1, 0.1),
            "int(errors.loc['sigma', 'cases'] > 2 * boot.replicates.sigma.std())": (
                1,
                0,
            ),
            "float(test.statistic)": (42.8368, 1e-3),  # lme4, both by REML
            "float(test.p_value * (1 + N))": (1, 1e-9),
            "int(quantile < stats.chi2.ppf(0.95, 2))": (1, 0),
            "[needed[3.0], needed[5.0]]": ([48, 18], 0),
            # t with 5 degrees of freedom beyond the normal's bound
            "float(power.loc[0, 'power'])": (0.107, 0.045),
            "int(np.isin(fits.status, [0, 1]).sum())": (1000, 0),
            "float(lane_error)": (0, 1e-9),
            "int(same)": (1, 0),
            "int('key was' in refused)": (1, 0),
        },
    ),
}

# a clean interpreter per notebook: jaxglmm's own settings, no test's
SCRIPT = """
import json, runpy, sys
path, names = sys.argv[1], json.loads(sys.argv[2])
values = runpy.run_path(path)
import jax
import matplotlib.pyplot as plt
sizes = [len(plt.figure(i).axes) for i in plt.get_fignums()]
found = {name: eval(name, values) for name in names}
state = bool(jax.config.jax_enable_x64)
print("\\n" + json.dumps({"axes": sizes, "found": found, "x64": state}))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_draws_and_reaches_its_numbers(path):
    n_figures, numbers = EXPECTED.get(path.stem, (1, {}))
    environment = dict(os.environ, MPLBACKEND="Agg")
    environment.pop("JAX_ENABLE_X64", None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    done = subprocess.run(
        [*command, str(path), json.dumps(list(numbers))], env=environment, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["axes"]) >= n_figures
    assert min(result["axes"]) >= 1
    assert not result["x64"], "a notebook leaves the global float64 flag alone"
    for name, (value, atol) in numbers.items():
        np.testing.assert_allclose(
            result["found"][name], value, rtol=0, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_starts_with_a_title_and_ends_with_what_was_learned(path):
    cells = path.read_text().split("# %%")
    assert cells[1].startswith(" [markdown]\n# # ")
    assert "# ## What was learned" in cells[-1]
    assert "$$" in cells[1], "starts from the model in maths"
