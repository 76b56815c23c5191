"""/metrics: counts and sizes in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .work import Figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Requests:
    """Counts the requests that were answered, by address and status."""

    def __init__(self) -> None:
        self._answered: Counter[tuple[str, int]] = Counter()

    def count(self, path: str, status: int) -> None:
        self._answered[path, status] += 1

    def lines(self) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests answered.")
        for (path, status), count in sorted(self._answered.items()):
            yield f'phi3_mlx_requests_total{{path="{path}",status="{status}"}} {count}'


def metrics_text(figures: Figures, requests: Requests) -> str:
    lines = list(requests.lines())
    for name, kind, about, value in (
        ("requests_running", "gauge", "Requests that the engine works on.", figures.running),
        ("requests_waiting", "gauge", "Requests that wait for memory or their turn.", figures.waiting),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were read.", figures.read_tokens),
        ("reused_tokens_total", "counter", "Tokens of prompts that had been read before.", figures.reused_tokens),
        ("generated_tokens_total", "counter", "Tokens of answers.", figures.made_tokens),
        ("memory_bytes", "gauge", "Memory that MLX holds.", figures.memory),
        ("memory_limit_bytes", "gauge", "Memory that MLX may hold.", figures.memory_limit),
        ("prefix_memory_bytes", "gauge", "Memory of what is kept for later prompts.", figures.prefix_memory),
    ):
        if value is not None:
            lines += [*_head(name, kind, about), f"phi3_mlx_{name} {value}"]
    lines += _head("model_loaded", "gauge", "1 for each model in memory.")
    lines += [f'phi3_mlx_model_loaded{{model="{_escaped(name)}"}} 1' for name in figures.loaded]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP phi3_mlx_{name} {about}"
    yield f"# TYPE phi3_mlx_{name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
