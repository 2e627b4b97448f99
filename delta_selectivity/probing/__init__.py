"""The metric: folds, probes, out-of-fold scores and their statistics."""
