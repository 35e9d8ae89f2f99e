"""The chat in the terminal: input, commands, output."""
