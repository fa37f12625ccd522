"""Distillation losses: plain functions, one family per file.

They never detach: every argument that requires gradients gets them, so the caller passes the teacher's tensors
without. ``--loss`` names the losses in `logits` and `output_relations`. The others need features of both models,
which in a federation are available only on a client that has both.
"""
