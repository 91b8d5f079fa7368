"""Studies on the command line: the numbers of Python, config files, bad input."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import jaxglmm as jg
from jaxglmm.cli import main
from jaxglmm.studies.checkpoint import Checkpoint
from jaxglmm.studies.parameters import parameter_names

FORMULA = "Yield ~ 1 + (1 | Batch)"
POWER = ("power", "--test", "(Intercept)", "--n-sims", 50)
CURVE = (*POWER, "--effect", "-30,20", "--effect", 40, "--n-levels", "6,12")
BOOTSTRAP = ("bootstrap", "-n", 50)
RECOVER = ("recover", "--n-sims", 50)
CBPP = {"source": "cbpp", "formula": "incidence/size ~ 1 + (1 | herd)"}
CBPP_OPTIONS = ["--family", "binomial", "--weights", "size"]
EACH = pytest.mark.parametrize("command", [CURVE, BOOTSTRAP, RECOVER])


def call(command, *args, source="dyestuff", formula=FORMULA):
    name, *given = command
    words = [name, source, formula, *given, *args]
    return CliRunner().invoke(main, [str(w) for w in words])


def done(command, *args, **of):
    result = call(command, *args, **of)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(command, *args, **of):
    result = call(command, *args, **of)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def table(tmp_path, command, *args, **of):
    done(command, "--out", tmp_path / "table.csv", *args, **of)
    return pd.read_csv(tmp_path / "table.csv")


def same(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-12)


@pytest.fixture(scope="module")
def dyestuff():
    return jg.glmm(FORMULA, jg.datasets.dyestuff())


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write


def curve(dyestuff, **options):
    given = {"effect": [-30, 20, 40], "n_levels": [6, 12], "n_sims": 50, "key": 1}
    return jg.power_curve(
        dyestuff, "(Intercept)", **{**given, **options}, progress=False
    )


def recovery(dyestuff, params=None, **options):
    m = dyestuff
    return jg.recovery_study(
        design=m.design, params=m.fit.params if params is None else params,
        names=parameter_names(m.design, m.family, m.is_generalized, m.frame),
        progress=False, **{"key": 1, "n_sims": 50, **options},
    )  # fmt: skip


# ---- numbers -----------------------------------------------------------------------


def test_power(dyestuff, tmp_path):
    expected = curve(dyestuff, key=4, alpha=0.1, level=0.9)
    options = ["--seed", 4, "--alpha", 0.1, "--level", 0.9]
    assert done(CURVE, *options) == f"{expected.summary()}\n"
    same(table(tmp_path, CURVE, *options), expected.to_frame())
    assert expected.to_frame()["power"].nunique() > 3


def test_power_of_several_effects_and_rows(tmp_path):
    data, formula = jg.datasets.sleepstudy(), "Reaction ~ Days + (1 | Subject)"
    m = jg.glmm(formula, data)
    expected = jg.power_curve(
        m, ["(Intercept)", "Days"], key=1, n_sims=20, rows=[2, 4], along="Subject",
        progress=False,
    )  # fmt: skip
    command = ("power", "--test", "(Intercept)", "--test", "Days", "--n-sims", 20)
    of = {"source": "sleepstudy", "formula": formula}
    options = ["--rows", 2, "--rows", 4, "--along", "Subject"]
    same(table(tmp_path, command, *options, **of), expected.to_frame())
    assert expected.summary().splitlines()[0] in done(command, *options, **of)


@pytest.mark.parametrize("ci", ["percentile", "basic", "bca"])
def test_bootstrap(dyestuff, tmp_path, ci):
    boot = dyestuff.bootstrap(50, key=2, progress=False)
    expected = boot.summary(0.8)
    expected[["lower", "upper"]] = boot.confint(0.8, ci)
    options = ["--ci", ci, "--level", 0.8, "--seed", 2]
    same(
        table(tmp_path, BOOTSTRAP, *options).set_index("parameter"),
        expected.rename_axis("parameter"),
    )
    text = done(BOOTSTRAP, *options)
    label = "BCa" if ci == "bca" else ci
    assert text.startswith(
        f"parametric bootstrap, 50 replicates, 0 not converged; 80 % {label} intervals"
    )
    assert expected.round(4).to_string() in text


@pytest.mark.parametrize("kind", ["semiparametric", "cases"])
def test_bootstrap_of_other_kinds(dyestuff, tmp_path, kind):
    by = "Batch" if kind == "cases" else None
    boot = dyestuff.bootstrap(50, key=1, kind=kind, by=by, progress=False)
    options = ["--kind", kind, *(["--by", by] if by else [])]
    found = table(tmp_path, BOOTSTRAP, *options)
    np.testing.assert_allclose(
        found["std_error"], boot.replicates.std(), rtol=1e-12, atol=0
    )


def test_recover(dyestuff, tmp_path):
    expected = recovery(dyestuff, methods=("REML", "ML"), level=0.9)
    options = ["--methods", "REML,ML", "--methods", "ML", "--level", 0.9]
    assert done(RECOVER, *options) == f"{expected!r}\n"
    same(table(tmp_path, RECOVER, *options), expected.summary())


def test_recover_fits_as_the_model_was(tmp_path):
    m = jg.glmm(FORMULA, jg.datasets.dyestuff(), method="ML")
    found = table(tmp_path, RECOVER, "--method", "ML")
    same(found, recovery(m, methods=["ML"]).summary())


def test_recover_from_other_parameters(dyestuff, tmp_path):
    params = dyestuff.fit.params.replace(
        beta=np.array([-10.0]), theta=np.array([0.5]), sigma=np.array(40.0)
    )
    expected = recovery(dyestuff, params)
    truth = ["--beta", -10, "--theta", 0.5, "--sigma", 40]
    found = table(tmp_path, RECOVER, *truth)
    assert found["truth"].tolist() == [-10.0, 20.0, 40.0]
    same(found, expected.summary())


def test_recover_by_quadrature(monkeypatch):
    """``--n-quad`` is of the study, where the model is fitted by Laplace."""
    asked = {}

    def stop(**given):
        asked.update(given)
        raise ValueError("stopped here")

    monkeypatch.setattr("jaxglmm.studies.recovery.recovery_study", stop)
    options = ["--methods", "Laplace,AGQ", "--n-quad", 3, *CBPP_OPTIONS]
    assert refused(RECOVER, *options, **CBPP) == "jaxglmm: stopped here"
    assert asked["methods"] == ["Laplace", "AGQ"]
    assert asked["n_quad"] == 3
    message = refused(RECOVER, "--n-quad", 3, *CBPP_OPTIONS, **CBPP)
    assert "n_quad=3 needs method='AGQ'" in message
    message = refused(RECOVER, "--sigma", 1, *CBPP_OPTIONS, **CBPP)
    assert "--sigma is for Gaussian models" in message


def test_model_options_are_those_of_fit(dyestuff, tmp_path):
    data = jg.datasets.dyestuff()
    data["lot"] = np.arange(len(data)) % 2
    data["w"] = 1.0 + data["lot"]
    data.to_csv(tmp_path / "dye.csv", index=False)
    of = {"source": tmp_path / "dye.csv", "formula": "Yield ~ lot + (1 | Batch)"}
    model = ["--factor", "lot", "--contrasts", "lot=sum", "--weights", "w"]
    found = table(tmp_path, ("bootstrap", "-n", 20), *model, **of)
    m = jg.glmm(
        of["formula"], data.astype({"lot": "category"}), weights="w",
        contrasts={"lot": "sum"},
    )  # fmt: skip
    assert found["parameter"][1] == "lot1"
    np.testing.assert_allclose(found["estimate"][:2], m.fixef, rtol=1e-10)
    assert "no such column" in refused(BOOTSTRAP, "--factor", "foo")
    assert "NAME=KIND" in refused(BOOTSTRAP, "--contrasts", "lot")


def test_notices_go_to_stderr(tmp_path):
    data = jg.datasets.dyestuff()
    data["one"] = 1.0
    data.to_csv(tmp_path / "dye.csv", index=False)
    of = {"source": tmp_path / "dye.csv", "formula": "Yield ~ one + (1 | Batch)"}
    result = call(BOOTSTRAP, **of)
    assert result.exit_code == 0
    assert result.stderr.startswith("note: dropped 1 collinear column")
    assert "note" not in result.stdout


# ---- config files ------------------------------------------------------------------


def test_config_holds_options(dyestuff, config):
    path = config(
        'test = "(Intercept)"\nn-sims = 50\neffect = [-30, 20.0, 40]\n'
        "n_levels = [6, 12]\nseed = 4\nalpha = 0.1\nlevel = 0.9\nno-progress = true\n"
    )
    expected = curve(dyestuff, key=4, alpha=0.1, level=0.9)
    assert done(("power", "--config", path)) == f"{expected.summary()}\n"


def test_command_line_wins_over_config(dyestuff, config):
    path = config('n-sims = 70\nseed = 4\nmethods = ["REML", "ML"]\nsigma = 40\n')
    params = dyestuff.fit.params.replace(sigma=np.array(40.0))
    expected = recovery(dyestuff, params, key=4, methods=["ML"])
    for given in (["--config", path], []):
        rest = [] if given else ["--config", path]  # the place makes no difference
        command = ("recover", *given, "--n-sims", 50, "--methods", "ML", *rest)
        assert done(command) == f"{expected!r}\n"


def test_config_of_lists_and_tables(tmp_path, config):
    data = jg.datasets.dyestuff()
    data["lot"] = np.arange(len(data)) % 2
    data.to_csv(tmp_path / "dye.csv", index=False)
    of = {"source": tmp_path / "dye.csv", "formula": "Yield ~ lot + (1 | Batch)"}
    path = config(
        'n-sims = 20\nbeta = [1500, 3]\nfactor = "lot"\n[contrasts]\nlot = "sum"\n'
    )
    found = table(tmp_path, ("recover", "--config", path), **of)
    assert found["parameter"][1] == "lot1"
    assert found["truth"][:2].tolist() == [1500.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replicates = 3", "unknown key 'replicates'; valid are by, checkpoint, ci,"),
        ("config = 'x.toml'", "unknown key 'config'"),
        ("[bootstrap]\nn = 5", "unknown key 'bootstrap'"),
        ("n = 2.5", "'2.5' is not a valid integer"),
        ("n = true", "'True' is not a valid integer"),
        ("n = [5, 6]", "n cannot be [5, 6]"),
        ("n = {a = 1}", "n cannot be {'a': 1}"),
        ("n-quad = 3\nn_quad = 3", "'n_quad' twice"),
        ("kind = 'jackknife'", "'jackknife' is not one of 'parametric'"),
        ("n = ", "cannot be read as TOML"),
    ],
)
def test_bad_config(config, text, message):
    assert message in refused(("bootstrap", "--config", config(text)))


def test_config_that_is_not_there(tmp_path):
    assert "does not exist" in refused(BOOTSTRAP, "--config", tmp_path / "no.toml")


# ---- files -------------------------------------------------------------------------


@EACH
def test_plot_is_written(tmp_path, command):
    done(command, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_bootstrap_plot(dyestuff):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    boot = dyestuff.bootstrap(50, key=1, progress=False)
    basic = boot.confint(0.8, "basic")
    _, given = pyplot.subplots(2, 2)
    for axes, interval, shown in (
        (boot.plot(), boot.confint(), 3),
        (boot.plot(given, basic), basic, 4),
    ):
        assert [ax.get_title() for ax in axes] == list(boot.estimate.index)
        assert len(axes[0].figure.axes) == shown
        for ax, name in zip(axes, boot.estimate.index):
            assert sum(bar.get_height() for bar in ax.patches) == 50
            at = [line.get_xdata()[0] for line in ax.lines]
            assert at == [boot.estimate[name], *interval.loc[name]]
    with pytest.raises(ValueError, match="must hold 3 Axes; found 2"):
        boot.plot(given[0])
    pyplot.close("all")


@EACH
def test_checkpoint_is_resumed(tmp_path, command, monkeypatch):
    folder = tmp_path / "parts"
    command = (*command, "--no-progress")
    whole = done(command, "--checkpoint", folder)
    assert whole == done(command)
    parts = sorted(folder.rglob("chunk-*.parquet"))
    assert parts
    load, found = Checkpoint.load, []

    def spy(self, index, n):
        found.append(load(self, index, n))
        return found[-1]

    monkeypatch.setattr(Checkpoint, "load", spy)
    assert done(command, "--checkpoint", folder) == whole
    assert len(found) == len(parts)
    assert all(part is not None for part in found)
    parts[-1].unlink()
    assert done(command, "--checkpoint", folder) == whole
    assert parts[-1].exists()
    message = refused(command, "--checkpoint", folder, "--seed", 9)
    assert "holds a study that differs from this one in key" in message


# ---- bad input ---------------------------------------------------------------------


@EACH
def test_bad_input(tmp_path, command):
    assert "neither a file nor" in refused(command, source="nothing.csv")
    assert "no column 'Foo'" in refused(command, formula="Foo ~ 1 + (1 | Batch)")
    assert "knows gaussian" in refused(command, "--family", "foo")
    assert "not one of 'REML', 'ML'" in refused(command, "--method", "foo")
    assert "is not in the range" in refused(command, "--level", 95)
    assert "is not in the range" in refused(command, "--seed", -1)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(command, "--checkpoint", tmp_path / "file")
    assert "there is no folder" in refused(command, "--out", tmp_path / "no" / "t.csv")
    assert "there is no folder" in refused(command, "--plot", tmp_path / "no" / "p.png")
    assert "must end in one of" in refused(command, "--plot", tmp_path / "plot.foo")
    assert "must end in .csv" in refused(command, "--out", tmp_path / "t.parquet")
    (tmp_path / "own.csv").mkdir()
    assert "is a directory" in refused(command, "--out", tmp_path / "own.csv")
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "not_yet.csv")
    refused(command, "--out", link, formula="Foo ~ 1 + (1 | Batch)")
    assert link.is_symlink()
    assert not link.exists()
    data = tmp_path / "data.csv"
    jg.datasets.dyestuff().to_csv(data, index=False)
    message = refused(command, "--out", data, source=data)
    assert "the results would overwrite" in message
    assert len(data.read_text().splitlines()) == 31


@EACH
def test_a_fit_that_did_not_converge_is_no_truth(tmp_path, command):
    x = np.arange(60) % 2
    table = pd.DataFrame({"Yield": x, "x": x, "Batch": np.arange(60) // 10})
    table.to_csv(tmp_path / "separated.csv", index=False)
    message = refused(
        command, "--family", "binomial", source=tmp_path / "separated.csv",
        formula="Yield ~ x + (1 | Batch)",
    )  # fmt: skip
    assert "did not converge, so its estimates are no truth" in message


def test_bad_checkpoint(tmp_path):
    (tmp_path / "study.json").write_text("{")
    assert "is damaged" in refused(BOOTSTRAP, "--checkpoint", tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"kind": "'cases'"}))
    assert "differs" in refused(BOOTSTRAP, "--checkpoint", tmp_path)


def test_bad_power():
    none = ("power", "--n-sims", 50)
    assert "'--test'" in refused(none)
    message = refused(none, "--test", "Days")
    assert message == (
        "jaxglmm: test names 'Days', which is no fixed effect; there are (Intercept)"
    )
    assert "no grouping factor" in refused(POWER, "--along", "Foo", "--rows", 3)
    assert "at least 2" in refused(POWER, "--n-levels", 1)
    assert "not in the range" in refused(POWER, "--rows", "3,0")
    assert "not a finite number" in refused(POWER, "--effect", "1,nan")
    assert "not a valid float" in refused(POWER, "--effect", "1;2")
    assert "'--kind'" in refused(POWER, "--kind", "score")


def test_bad_bootstrap(monkeypatch):
    assert "'-n'" in refused(("bootstrap", "-n", 0))
    assert "by='Foo' is no grouping factor" in refused(BOOTSTRAP, "--by", "Foo")
    monkeypatch.setattr(jg.GLMM, "bootstrap", None)  # refused before the replicates
    crossed = {
        "source": "penicillin",
        "formula": "diameter ~ 1 + (1 | plate) + (1 | sample)",
    }
    assert "crossed" in refused(BOOTSTRAP, "--ci", "bca", **crossed)


def test_bad_recover():
    message = refused(RECOVER, "--beta", "1,2")
    assert "--beta takes a number for each of (Intercept), with" in message
    assert "found 3" in refused(RECOVER, "--theta", "1,0,1")
    assert "--sigma must be positive" in refused(RECOVER, "--sigma", 0)
    assert "not a valid float" in refused(RECOVER, "--beta", "")
    assert "not one of 'REML', 'ML'" in refused(RECOVER, "--methods", "REML,foo")
