"""Text, from its sources to groups of blocks of tokens."""
