"""Public functions and classes, which the package `delta_selectivity` exports."""
