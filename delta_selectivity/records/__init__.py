"""Files of a run: results, stored scores, and figures that are computed from all results of an SAE."""
