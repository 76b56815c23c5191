"""phi3-mlx."""
__version__ = "0.1.0.dev0"
