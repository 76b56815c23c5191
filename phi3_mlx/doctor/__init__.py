"""What of this machine runs Phi-3: `facts.look()` gathers facts, `checks.examine` reads them."""
