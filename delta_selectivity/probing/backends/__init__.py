"""Solvers of the probes, one a file, behind the door `probes`."""
