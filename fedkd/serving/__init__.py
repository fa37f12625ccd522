"""A trained network answers images over HTTP: the parts of ``python -m fedkd.serve``. None of them imports PyTorch."""
