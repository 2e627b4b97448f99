"""Files of a run: results, the scores behind them, and the figures that need all results of an SAE."""
