"""The optimizer: penalty, exact orthogonality and schedule, as optax transformations."""
