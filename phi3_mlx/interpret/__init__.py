"""Look inside a model: what it computes at named places, and what it would compute if those were others."""
