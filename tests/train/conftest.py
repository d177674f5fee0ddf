import pytest

from tests.train.tiny import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random tiny bases and 16 records."""
    return World(tmp_path_factory.mktemp("world"))
