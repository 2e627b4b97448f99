"""Distribution of a request over many workers."""
