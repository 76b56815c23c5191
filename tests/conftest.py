"""What the tests share. `shared` is real material beside the checkout; tests that use it skip where it is not."""

import os
import signal
from pathlib import Path

import pytest

import phi3_mlx  # noqa: F401  (before any test imports MLX, which then multiplies with a fast BLAS)

# In the background of some shells Ctrl-C is ignored, by the processes that tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real configs, tokenizers and text: $PHI3_MLX_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("PHI3_MLX_SHARED", ROOT.parent / "shared"))
    if not (folder / "configs").is_dir():
        pytest.skip("no shared material beside the checkout")
    return folder
