"""TrainState, Optax chains, the one train step, and the loop around it."""
