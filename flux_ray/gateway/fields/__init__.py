"""What all dialects do with a client's fields: other servers' names, empty ones, JSON, sizes."""
