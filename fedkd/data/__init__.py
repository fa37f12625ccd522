"""Data as tensors: sources, proxy sets, partitions and augmentation."""
