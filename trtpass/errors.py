"""Every failure that a user sees: what was found, what was expected, what to do.

Exit codes (one meaning each, used by every command): 0 done, 1 a check failed, 2 the input or the request was wrong.
"""

from __future__ import annotations


class TrtpassError(Exception):
    """A failure with three parts. ``found`` is required; the others are empty only where nothing useful can be said.

    Args:
        found: what is there, with the name of the file, node, option or value.
        expected: what would have been right.
        fix: what the user can do now, as an imperative.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found.rstrip(".") + "."]
        if expected:
            parts.append(f"Expected: {expected.rstrip('.')}.")
        if fix:
            parts.append(f"To do: {fix.rstrip('.')}.")
        super().__init__("\n  ".join(parts))


class InputError(TrtpassError):
    """The input or the request was wrong (a broken file, an unknown option, an unsupported model): exit code 2."""


class AnchorError(InputError):
    """A pass needs an anchor that the graph does not have; ``found`` says which and why it was not found."""


class CheckFailed(TrtpassError):
    """A proof or a comparison failed: exit code 1."""

    exit_code = 1
