"""Finished runs side by side: tables, curves, a page."""
