"""The command line: flags in, exit codes out."""
