"""`python -m phi3_mlx` is `phi3-mlx`, for where the command is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
