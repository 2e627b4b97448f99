"""One request spread over many workers: units, the worker's side, clusters, merging, and what it will cost."""
