#!/usr/bin/env python3
"""Print tables, and write plots and pages, from result files (`python report.py --help`)."""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("report")
