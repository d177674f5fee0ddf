"""What several tests of releasing start from, made once."""

from __future__ import annotations

import pytest

from tests.release.card_runs import make_sources


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny run with its reports; tests that change it take `copy`."""
    return make_sources(tmp_path_factory.mktemp("card"))


@pytest.fixture
def copy(made, tmp_path):
    return made.copy(tmp_path)
