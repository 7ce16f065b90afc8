"""Analysis of trained networks: bases, coefficients, gradients."""
