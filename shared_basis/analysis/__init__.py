"""What a trained network has learned: bases, coefficients, gradients."""
