"""The command line: a file for each command, which takes words apart, calls the library, prints, and exits."""
