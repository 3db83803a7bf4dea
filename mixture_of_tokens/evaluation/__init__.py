"""The loss of a trained model, and what leaks in it."""
