"""API keys: their classes, the file that holds them, and the watch on that file."""
