"""System services: files, locks, memory, CPU cores, signals, the terminal, and package versions."""
