"""`python -m delta_selectivity` does what the console command `delta-selectivity` does."""

from delta_selectivity.cli.program import main

if __name__ == "__main__":
    main()
