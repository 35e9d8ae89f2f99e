"""The `griffin` command: arguments in, one library call, output. The only part that prints or exits."""

__version__ = "0.1.0"
