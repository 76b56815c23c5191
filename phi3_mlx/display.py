"""How chats, results and progress look in a notebook."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Conversion
    from .evaluation.quality import Comparison
    from .tuning.run import Result

_COLORS = {"system": "#8d99ae", "user": "#2a6f97", "assistant": "#c8553d"}
_EVERY = 0.1  # seconds between two pictures of a bar


class ProgressBar:
    """Follows long work in a notebook cell or on a terminal; silent in a pipe.

        stream_generate(model, tokenizer, prompt, on_prefill=ProgressBar("reading"))
        convert(source, destination, progress=ProgressBar())
        compare(model_a, tokenizer_a, model_b, tokenizer_b, text, progress=ProgressBar("comparing"))
        tune(model, data, output, on_step=ProgressBar("training"))

    Call it with (done, total), or with one report that has `done` and `total`, or `step` and `steps`.
    """

    def __init__(self, label: str = ""):
        self._label = label
        self._shown = 0.0
        self._handle: Any = None
        self._notebook = _in_notebook()

    def __call__(self, *report: Any) -> None:
        label, done, total, more = self._read(report)
        now = time.monotonic()
        if done < total and now - self._shown < _EVERY:
            return
        self._shown = now
        text = f"{label} {done:,} of {total:,}{more}".strip()
        if self._notebook:
            self._display(text, done, total)
        elif sys.stderr.isatty():
            filled = round(30 * done / total) if total else 30
            end = "\n" if done == total else ""
            print(f"\r[{'#' * filled:30}] {text}\033[K", end=end, file=sys.stderr, flush=True)

    def _read(self, report: Sequence[Any]) -> tuple[str, int, int, str]:
        """(label, done, total, what else there is to say)"""
        if len(report) == 2:
            return self._label, report[0], report[1], ""
        (one,) = report
        if hasattr(one, "steps"):
            return self._label, one.step, one.steps, f", loss {one.loss:.3f}"
        return self._label or one.stage, one.done, one.total, f" {one.unit}"

    def _display(self, text: str, done: int, total: int) -> None:
        from IPython.display import HTML, display

        bar = f'<progress value="{done}" max="{total}" style="width: 20em"></progress>'
        # The text alone for where no HTML is shown.
        data = {"text/html": HTML(f"{bar} {html.escape(text)}").data, "text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def conversation_html(messages: Sequence[Mapping[str, str]]) -> str:
    """A chat, a block a message."""
    blocks = []
    for message in messages:
        role, content = message["role"], html.escape(message["content"].strip()).replace("\n", "<br>")
        color = _COLORS.get(role, "#8d99ae")
        blocks.append(
            f'<div style="border-left: 4px solid {color}; padding: 0 0 0 0.8em; margin: 0.6em 0; max-width: 50em">'
            f'<b style="color: {color}">{html.escape(role)}</b><br>{content}</div>'
        )
    return "\n".join(blocks)


def comparison_markdown(found: Comparison) -> str:
    """Both models' figures as a table."""
    lines = ["| | A | B |", "|---|--:|--:|"]
    if found.kl is not None:
        lines.append(f"| perplexity | {found.a.perplexity:.3f} | {found.b.perplexity:.3f} |")
    a, b = found.a.perplexity_per_character, found.b.perplexity_per_character
    lines.append(f"| perplexity per character | {a:.4f} | {b:.4f} |")
    lines.append(f"| tokens predicted | {found.a.tokens:,} | {found.b.tokens:,} |")
    if found.kl is not None and found.top1 is not None:
        lines.append(f"| mean KL(A ‖ B), nats a token | | {found.kl:.5f} |")
        lines.append(f"| same likeliest token | | {found.top1:.2%} |")
    return "\n".join(lines if found.note is None else [*lines, "", found.note])


def conversion_markdown(made: Conversion) -> str:
    """Size, notes and, if there is a report, what it cost."""
    head = f"**{made.path.name}**: {made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.3f} bits per weight"
    parts = [head, *(f"*{note}*" for note in made.notes)]
    if made.report is not None:
        parts.append(f"A: {made.report.source}, B: {made.path.name}, on {made.report.text}")
        parts.append(comparison_markdown(made.report.comparison))
    return "\n\n".join(parts)


def result_markdown(result: Result) -> str:
    """How a fine-tuning run ended."""
    end = "stopped by Ctrl-C; `resume=True` goes on" if result.interrupted else "finished"
    best = ""
    if result.best_loss is not None:
        best = f", best validation loss {result.best_loss:.4f} nats a token at step {result.best_step:,}"
    head = f"**{result.step:,} steps**, {end}{best}; the adapter is in `{result.output.name}`"
    return "\n\n".join([head, *(f"*{note}*" for note in result.notes)])


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
