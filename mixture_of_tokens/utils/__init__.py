"""Files, processes and text, for all rooms."""
