"""One gateway process for all clients: starting it takes longer than most of their tests."""

from collections.abc import Iterator

import pytest

from tests.clients.served import Served, served_for_clients


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The running gateway; what a test leaves behind in it may not matter to another."""
    with served_for_clients(tmp_path_factory.mktemp("served")) as running:
        yield running
