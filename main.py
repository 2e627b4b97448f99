#!/usr/bin/env python3
"""Measure whether SAEs preserve what a language model knows: from texts to result files (`python main.py --help`)."""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("run")
