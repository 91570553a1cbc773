"""What docstrings show is what comes of it."""

import doctest
import importlib
from pathlib import Path

import pytest

import lrrobust

PACKAGE = Path(lrrobust.__file__).parent
SHOWN = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", SHOWN)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
