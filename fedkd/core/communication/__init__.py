"""What is sent: codecs, entropy coding, deltas, and how many bytes they take."""
