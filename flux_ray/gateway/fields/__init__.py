"""Read a client's fields for every dialect: other servers' names, empty values, JSON and sizes."""
