"""One file for each change of the tables, which names the change before it."""
