"""From Mixture of Tokens to a sparse model, and to plain transformers."""
