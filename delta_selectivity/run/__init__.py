"""One run: request, plan, producer thread, consumer thread."""
