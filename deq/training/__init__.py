"""The training loop, its state, and what a terminal shows of it."""
