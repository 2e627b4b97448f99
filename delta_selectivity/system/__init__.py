"""What every room above stands on: files, locks, memory, cores, signals, the terminal, the libraries in use."""
