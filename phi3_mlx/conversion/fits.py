"""What fitting the weights of each matrix to a text did, as a section of REPORT.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibrating import MatrixFit


_AFTER_STEP: dict[str, Callable[[MatrixFit], float]] = {
    "the source's matrices": lambda fit: fit.inherited,
    "targets, which keep the source's outputs": lambda fit: fit.target,
    "the source's matrices, rounded to the nearest values": lambda fit: fit.nearest,
    "targets, rounded column by column": lambda fit: fit.columns,
    "these refitted, as written": lambda fit: fit.rounded,
}


def fits_markdown(fits: Sequence[MatrixFit], *, fitted_kl: float | None, other_kl: float | None) -> str:
    """The section: KL divergence on the text that was read and on the report's, and each matrix's errors."""
    lines = ["## What fitting to a text gave", ""]
    if fitted_kl is not None and other_kl is not None:
        lines += [
            f"Mean KL divergence in nats a token: {fitted_kl:.5f} on the beginning of the text that weights were "
            f"fitted to, {other_kl:.5f} on the report's. The further apart, the more a longer text would give.",
            "",
        ]
    few = [f"{fit.few} of `{fit.path}`" for fit in fits if fit.few]
    if few:
        lines += [f"Experts that saw few tokens are rounded for what all experts get: {', '.join(few)}.", ""]
    lines += [
        "Dampings are of each target, and of its rounding. Relative output errors are on the quarter of that text by",
        "which dampings were chosen; where outputs are added to the residual stream, they are the sum's. Their means",
        "over all matrices, after each step; before rounding, the packed model's inputs alone are wrong:",
        "",
        "| step | mean error |",
        "|---|--:|",
    ]
    lines += [f"| {step} | {sum(map(error, fits)) / max(1, len(fits)):.5f} |" for step, error in _AFTER_STEP.items()]
    lines += [
        "",
        "| matrix | damping | rounding's | source's | target | nearest | columns | written |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for fit in fits:
        damping = "none" if fit.damping is None else f"{fit.damping:.3g}"
        errors = " | ".join(f"{error(fit):.5f}" for error in _AFTER_STEP.values())
        lines.append(f"| {fit.path} | {damping} | {fit.rounding:.3g} | {errors} |")
    return "\n".join(lines) + "\n"
