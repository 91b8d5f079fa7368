"""Examples in docstrings run; the README shows what the program prints."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import jaxglmm
from jaxglmm.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(jaxglmm.__path__, "jaxglmm.")
    if not m.name.endswith("__main__")
)


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_public_names_have_docstrings():
    for name in jaxglmm.__all__:
        assert getattr(jaxglmm, name).__doc__, name


def test_readme_shows_what_is_printed():
    (run,) = [b for b in blocks("bash") if "jaxglmm fit" in b]
    arguments = re.search(r'jaxglmm fit (\w+) "(.*)"', run)
    assert arguments is not None
    result = CliRunner().invoke(main, ["fit", *arguments.groups()])
    assert result.exit_code == 0
    shown = next(b for b in blocks("") if b.startswith("Linear mixed model"))
    assert result.output.startswith(shown)
    assert "Converged" in result.output


def test_readme_examples_run():
    """One after the other, as a reader would."""
    scope = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), scope)
    assert bool(scope["lanes"].converged.all())
    assert scope["family"].n_own == 1
    assert scope["m"].method == "AGQ"
