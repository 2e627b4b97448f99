#!/usr/bin/env python3
"""Tables, plots and a page from result files; `python report.py --help`."""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("report")
