"""The quality of a model, and how it differs from another."""
