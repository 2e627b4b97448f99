"""Files, locks, memory, cores, signals, the terminal, and versions of libraries."""
