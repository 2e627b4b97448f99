"""What a run leaves on disk: result files, the scores behind them, and what follows from all results of an SAE."""
