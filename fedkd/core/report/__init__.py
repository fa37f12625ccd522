"""How rows and results are shown: screen, tables, figures."""
