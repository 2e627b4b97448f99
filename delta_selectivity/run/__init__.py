"""One run: a request, its plan, the thread that makes activations and the thread that probes them."""
