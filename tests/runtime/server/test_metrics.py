"""What the metrics page says, read by Prometheus's own parser."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from griffin_gguf.runtime.server.metrics import Metrics

SECOND = 10**9


def reply(**changes: int) -> Any:
    counts = {"prompt_tokens": 20, "cached_tokens": 15, "answer_tokens": 5, "total_ns": 3 * SECOND, "answer_ns": SECOND}
    return SimpleNamespace(**counts | changes)


def loaded(name: str, **values: int) -> Any:
    counts = {"running": 0, "waiting": 0, "cache_nbytes": 0, "cache_snapshots": 0}
    return SimpleNamespace(entry=SimpleNamespace(name=name), **counts | values)


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names...) -> value."""
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, *(s.labels[name] for name in sorted(s.labels))): s.value for s in samples}


def test_tokens_and_times_of_answers() -> None:
    metrics = Metrics(list)
    metrics.answered("a", reply())
    metrics.answered("a", reply(answer_tokens=1))
    metrics.answered("b", reply(answer_tokens=0, cached_tokens=0))
    found = values(metrics)
    assert found["griffin_prompt_tokens_total", "a"] == 40
    assert found["griffin_cached_tokens_total", "a"] == 30
    assert found["griffin_answer_tokens_total", "a"] == 6
    assert (found["griffin_first_token_seconds_count", "a"], found["griffin_first_token_seconds_sum", "a"]) == (2, 4.0)
    # A single token tells nothing of the time between two.
    assert (found["griffin_token_seconds_count", "a"], found["griffin_token_seconds_sum", "a"]) == (1, 0.25)
    assert found["griffin_prompt_tokens_total", "b"] == 20
    assert ("griffin_first_token_seconds_count", "b") not in found


def test_requests_by_route_and_status() -> None:
    metrics = Metrics(list)
    for status in (200, 200, 429):
        metrics.requested("/api/chat", status)
    found = values(metrics)
    assert found["griffin_requests_total", "/api/chat", "200"] == 2
    assert found["griffin_requests_total", "/api/chat", "429"] == 1


def test_gauges_are_read_when_somebody_asks() -> None:
    now = [loaded("a", running=2, waiting=3, cache_nbytes=4096, cache_snapshots=7), loaded("b", running=1)]
    metrics = Metrics(lambda: now)
    found = values(metrics)
    assert found["griffin_models_loaded",] == 2
    assert [found["griffin_running", name] for name in "ab"] == [2, 1]
    assert (found["griffin_waiting", "a"], found["griffin_waiting", "b"]) == (3, 0)
    assert (found["griffin_cache_bytes", "a"], found["griffin_cache_snapshots", "a"]) == (4096, 7)
    now.clear()
    found = values(metrics)
    assert found["griffin_models_loaded",] == 0
    assert ("griffin_running", "a") not in found


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(list), Metrics(list)
    one.requested("/", 200)
    assert ("griffin_requests_total", "/", "200") not in values(other)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä"])
def test_any_name_of_a_model_is_a_label(name: str) -> None:
    metrics = Metrics(list)
    metrics.answered(name, reply())
    assert values(metrics)["griffin_answer_tokens_total", name] == 5
