"""What a person sees: the screen while a run goes on, tables and figures after it."""
