"""The Serve deployment of a tier: a leader that takes requests, and the ranks that it calls.

`Leader` is the deployment; it owns the `RankGroup` of GPU processes and the `StepLoop` that calls
them. Nothing here knows HTTP.
"""
