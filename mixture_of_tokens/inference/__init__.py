"""What a trained model does: text, loss, leaks."""
