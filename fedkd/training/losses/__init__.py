"""Distillation losses: plain functions, one family a file.

They never detach and never hold a graph: gradients go wherever an argument asks for them, so that a caller
passes the teacher's tensors without one. `logits` and `answers` are what ``--loss`` names; the others want
features, which in a federation only those have who hold both models.
"""
