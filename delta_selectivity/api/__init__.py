"""The public functions and classes; `delta_selectivity` itself gives them by name."""
