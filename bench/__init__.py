"""What the README's numbers come from: each file is a command, `python -m bench.NAME`, and writes bench/results/."""
