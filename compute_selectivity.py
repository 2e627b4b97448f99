#!/usr/bin/env python3
"""Compute the numbers of main.py with many workers (`python compute_selectivity.py --help`)."""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("scale")
