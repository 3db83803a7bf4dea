"""From a name and options to a finished run."""
