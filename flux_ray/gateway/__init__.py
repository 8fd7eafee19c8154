"""HTTP: reads what clients send, checks all of it, and answers in their dialect."""
