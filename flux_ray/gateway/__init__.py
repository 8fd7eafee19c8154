"""The HTTP side: read what clients send, check it completely, and answer in their API dialect."""
