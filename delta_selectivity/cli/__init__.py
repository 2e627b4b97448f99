"""The command line: parses flags and returns exit codes."""
