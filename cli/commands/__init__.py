"""One module per command: its options, one call into the libraries, its output."""
