"""The optimizer: penalty, exact orthogonality, schedule, as optax links."""
