"""What a run asks of the device. Metal is played by a stand-in: only its calls can be checked without one."""

import mlx.core as mx
import pytest

from phi3_mlx.engine import machine


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: made.append(("cache", n)) or 111)
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: made.append(("wired", n)) or 222)
    monkeypatch.setattr(
        mx, "device_info", lambda device=None: {"max_recommended_working_set_size": 333} if device else {}
    )
    return made


@pytest.fixture
def metal(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)


def run_on(monkeypatch, device):
    monkeypatch.setattr(mx, "default_device", lambda: device)


def test_on_metal_weights_are_wired_and_both_limits_restored_after_a_failure(calls, metal, monkeypatch):
    run_on(monkeypatch, mx.Device(mx.gpu))
    run = machine.bounded_run()
    run.__enter__()
    assert calls == [("cache", 1 << 30), ("wired", 333)]
    assert not run.__exit__(RuntimeError, RuntimeError(), None)
    assert calls[2:] == [("wired", 222), ("cache", 111)]


def test_on_a_mac_that_computes_on_the_cpu_nothing_is_wired(calls, metal, monkeypatch):
    run_on(monkeypatch, mx.Device(mx.cpu))
    with machine.bounded_run():
        pass
    assert calls == [("cache", 1 << 30), ("cache", 111)]


def test_of_two_runs_read_in_turn_the_last_to_end_restores(calls):
    first, second = machine.bounded_run(), machine.bounded_run()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert calls == [("cache", 1 << 30)]
    second.__exit__(None, None, None)
    assert calls == [("cache", 1 << 30), ("cache", 111)]


def test_elsewhere_only_the_buffer_cache_is_bounded(calls):
    with machine.bounded_run():
        pass
    assert calls == [("cache", 1 << 30), ("cache", 111)]
