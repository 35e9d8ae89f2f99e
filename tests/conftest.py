import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from servers import rpc_server

from griffin_gguf.runtime.ggml import rpc
from griffin_gguf.runtime.tuning import VARIABLE

# A slow machine is no failure, and files of one test may be shared by its examples.
settings.register_profile(
    "griffin", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("griffin")


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> Iterator[None]:
    """Ctrl-C works here, and in the processes that tests start: a job in the background is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def no_stored_tuning() -> Iterator[None]:
    """What a person has tuned on this machine is not for tests, nor for the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "")
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-rpc", action="store_true", help="run models on a device of another process (scripts/test-rpc)"
    )


@pytest.fixture(autouse=True, scope="session")
def best_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """ggml's best device is the CPU, or under --on-rpc that of a server, which shares no memory with the tests."""
    if not request.config.getoption("--on-rpc"):
        yield
        return
    with rpc_server() as server:
        rpc.connect(server.endpoint)
        yield
