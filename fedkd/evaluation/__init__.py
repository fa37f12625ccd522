"""Metrics of rounds and models, and how they are shown."""
