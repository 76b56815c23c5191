"""Texts for training before a model learns them: statistics, rules, duplicates, evaluations, shares, synthesis."""
