"""The errors that people see: what went wrong, why, and what to type next.

Exit codes of the command line: 0 ok, 1 failure, 2 usage, 3 environment, 4 model, 5 resources,
6 partial results, 130 interrupted.
"""


class PenstockError(Exception):
    """A failure with a message for people. Printed without a traceback, in at most six lines.

    what: one sentence, the fact. why: the cause, if known. hint: what to type or change next.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.hint) if line)


class UsageError(PenstockError):
    """The command line or an option is wrong."""

    exit_code = 2


class EnvironmentFault(PenstockError):
    """The machine is not as it must be: a port in use, a file that cannot be read, a missing package."""

    exit_code = 3


class ModelError(PenstockError):
    """The model is unknown, damaged, or of a kind that Penstock cannot run."""

    exit_code = 4


class ResourceError(PenstockError):
    """Too little memory or disk; the message says need, have and which flags help."""

    exit_code = 5


class PartialResults(PenstockError):
    """Some rows are done and stay; a rerun continues."""

    exit_code = 6


class InvalidRequest(PenstockError):
    """One request was refused before it ran. The text is what the client sees."""

    exit_code = 2


def by_exit_code(exit_code: int, what: str, why: str = "", hint: str = "") -> PenstockError:
    """Rebuild an error that another process reported by its exit code."""
    for kind in (UsageError, EnvironmentFault, ModelError, ResourceError, PartialResults):
        if kind.exit_code == exit_code:
            return kind(what, why, hint)
    return PenstockError(what, why, hint)
