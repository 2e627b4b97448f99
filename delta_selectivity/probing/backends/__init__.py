"""Solvers of the probes, one per file; `probing.probes` chooses one."""
