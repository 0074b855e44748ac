import pytest

from tests.training.runs import tiny_flags


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    return tiny_flags(tmp_path_factory.mktemp("tiny"))
