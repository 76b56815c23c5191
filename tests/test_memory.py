"""What a run asks of the device. Metal is played by a stand-in: only its calls can be checked without one."""

import mlx.core as mx
import pytest

from phi3_mlx import memory


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: made.append(("cache", n)) or 111)
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: made.append(("wired", n)) or 222)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 333})
    return made


def test_on_metal_weights_are_wired_and_both_limits_restored_after_a_failure(calls, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    run = memory.bounded_run()
    run.__enter__()
    assert calls == [("cache", 1 << 30), ("wired", 333)]
    assert not run.__exit__(RuntimeError, RuntimeError(), None)
    assert calls[2:] == [("cache", 111), ("wired", 222)]


def test_elsewhere_only_the_buffer_cache_is_bounded(calls):
    with memory.bounded_run():
        pass
    assert calls == [("cache", 1 << 30), ("cache", 111)]
