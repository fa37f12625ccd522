"""What everything else is built on; it imports nothing else of fedkd."""
