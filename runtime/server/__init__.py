"""Models behind HTTP, in the words of Ollama's API and of OpenAI's: `app.create_app`, run by `run.run`.

The `server` extra brings what this package needs beside the rest.
"""
