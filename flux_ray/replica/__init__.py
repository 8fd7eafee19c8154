"""The Serve deployment of a tier: a leader, its rank group and the step loop. Knows no HTTP."""
