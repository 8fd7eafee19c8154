"""API keys: their classes, the file that holds them, and how changes of it take effect."""
