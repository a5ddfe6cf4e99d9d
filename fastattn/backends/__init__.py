"""One module per backend: what it is, what it refuses and why, and how it would run a problem."""
