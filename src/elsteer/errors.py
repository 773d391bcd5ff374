"""Errors that a user can mend. Their text is one sentence that says what was wrong and what to do.

The command line prints the sentence without a traceback and exits with `exit_code` (2 unless a subclass says otherwise).
Anything else that is raised is a defect of elsteer.
"""

from __future__ import annotations

__all__ = [
    "ElsteerError",
    "JudgeError",
    "LandscapeError",
    "ModelError",
    "NothingHelps",
    "PromptError",
    "RunError",
    "SteeringError",
]


class ElsteerError(Exception):
    """Base of all errors with a sentence for the user."""

    exit_code = 2


class PromptError(ElsteerError):
    """A prompt file or data set that cannot be used; names the file and the line."""


class ModelError(ElsteerError):
    """A model that cannot be found, loaded or understood."""


class JudgeError(ElsteerError):
    """A judge that is unknown or cannot be used."""


class LandscapeError(ElsteerError):
    """A landscape that is corrupt, of a newer format, or made for another model."""


class SteeringError(ElsteerError):
    """Steering that cannot be done safely: attached twice, hooks that did not fire, an unsupported way to generate."""


class RunError(ElsteerError):
    """A run folder that is in use, or whose files do not fit together."""


class NothingHelps(ElsteerError):
    """Tuning found no setting that helps without harm. The landscape was written with strength 0."""

    exit_code = 3
