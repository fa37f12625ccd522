"""What a run costs on this machine, beside what it must cost and what others take."""
