"""``python -m fedkd.compare``: separate runs, or the runs of a scenario file, in one table."""
