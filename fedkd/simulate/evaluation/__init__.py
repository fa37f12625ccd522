"""Metrics of rounds and clients, and when a run ends."""
