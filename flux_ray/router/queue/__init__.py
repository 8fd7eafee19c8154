"""The queue of a tier: who is taken in, whose turn it is, and on which replica. Pure."""
