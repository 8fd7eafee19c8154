"""Decisions: which tier serves a request, and what happens when its replica dies."""
