"""Distillation losses: plain functions, one family a file."""
