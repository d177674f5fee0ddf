"""What the tests of this folder share: one wheel and one source distribution of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package.build import build, copy_tree


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the tree that builds may write into."""
    return copy_tree(tmp_path_factory.mktemp("package") / "source")


@pytest.fixture(scope="session")
def wheel(source) -> Path:
    return build(source, source.parent / "wheel", "wheel")


@pytest.fixture(scope="session")
def sdist(source) -> Path:
    return build(source, source.parent / "sdist", "sdist")
