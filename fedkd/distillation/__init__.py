"""Distillation as a tool of its own: from any teacher to any student."""
