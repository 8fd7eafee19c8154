"""One file a change of the tables, each of which names the one before it."""
