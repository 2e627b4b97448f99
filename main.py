#!/usr/bin/env python3
"""Does an SAE keep what a language model knows? All of it in one program; `python main.py --help`."""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("run")
