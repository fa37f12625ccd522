"""A student in the files of other runtimes, each held against the original."""
