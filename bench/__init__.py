"""What the numbers of the README and of docs/ come from.

Each file is a command, `python -m bench.NAME`, and writes bench/results/.
"""

import phi3_mlx  # noqa: F401  (before any bench imports MLX: both packages then multiply with the same BLAS)
