"""Token ids in, token ids out: prefill, decoding, sampling, and the plan of a run's memory. Knows no text."""
