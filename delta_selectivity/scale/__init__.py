"""One request over many workers."""
