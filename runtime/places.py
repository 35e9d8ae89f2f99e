"""Where a person's own things lie: documents that were read, conversations."""

import os
from pathlib import Path

import platformdirs

#: Environment variable: another folder in the place of the user's own.
VARIABLE = "GRIFFIN_DATA"


def data_folder() -> Path:
    """The folder of everything that is kept for a person between two runs; asking does not make it."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else platformdirs.user_data_path("griffin", appauthor=False)
