"""Federated distillation, simulated: clients share soft labels, a server distills a student."""

__version__ = "0.1.0"
