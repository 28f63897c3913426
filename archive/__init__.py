"""ZIP files: written, read in parts, streamed."""
