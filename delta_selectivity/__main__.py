"""Run the console command `delta-selectivity` as `python -m delta_selectivity`."""

from delta_selectivity.cli.program import main

if __name__ == "__main__":
    main()
