"""The metric: folds, probes, their scores on rows that they have not seen, and what those say."""
