"""What PiSSA (arXiv 2404.02948) and OLoRA (2406.01775) subtract from a base before they train it.

Their A and B begin as a part of the weight W (outputs, inputs), and the base keeps the rest: they train W - s B0 A0
plus s B A, so the change of W itself is s (B A - B0 A0). The product B0 A0 is W projected onto r directions. Unlike B0
and A0 it does not depend on the signs that a decomposition chooses.
"""

from __future__ import annotations

import numpy as np


def taken_out(kind: str, weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """s B0 A0 of a weight (outputs, inputs) as two factors, (outputs, r) and (r, inputs) float64.

    "pissa": the part of W with its r largest singular values, for every s. "olora": s Q_r R_r, where W = Q R.
    """
    weight = weight.astype(np.float64)
    if kind == "olora":
        basis = np.linalg.qr(weight[:, :rank])[0]
        return scale * basis, basis.T @ weight
    # Singular vectors are eigenvectors of the smaller Gram matrix: many times cheaper than a full decomposition.
    if weight.shape[0] <= weight.shape[1]:
        left = _largest(weight @ weight.T, rank)
        return left, left.T @ weight
    right = _largest(weight.T @ weight, rank)
    return weight @ right, right.T


def _largest(gram: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of the `rank` largest eigenvalues, as columns; `eigh` sorts them from the smallest."""
    return np.linalg.eigh(gram)[1][:, -rank:]
