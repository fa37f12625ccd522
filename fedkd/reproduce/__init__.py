"""Published tables, run with the settings of their papers, beside the published numbers."""
