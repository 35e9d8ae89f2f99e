"""The demo model behind a server, and by itself."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served_models import Alone, write_document, write_models
from serving import running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("data")
    write_document(files[0], data)
    with running(*files, data=data) as server, httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def alone(files: list[Path]) -> Iterator[Alone]:
    found = Alone(files[0])
    yield found
    found.model.close()
