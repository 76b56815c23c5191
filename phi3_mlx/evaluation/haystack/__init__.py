"""Questions about long texts, made from a seed: task types of RULER (arXiv 2404.06654), in our own words."""
