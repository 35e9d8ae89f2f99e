"""`python -m griffin_gguf.cli` is `griffin`."""

from griffin_gguf.cli.main import main

if __name__ == "__main__":
    main()
