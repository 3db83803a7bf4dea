"""Run directories: what they hold, and what is loaded from them."""
