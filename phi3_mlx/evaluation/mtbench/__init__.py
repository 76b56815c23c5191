"""MT-bench (arXiv 2306.05685): two turns a question, and a judge that rates the answers."""
