"""The one error type for bad input, and the exit codes of a job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dreambooth_sm.printing import safe

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
# 128 + SIGTERM, as a shell reports a process that a signal ended.
EXIT_STOPPED = 143


class UserError(Exception):
    """Something that the person who started the job can put right.

    Args:
        problems: one sentence a problem: what is wrong, where, and what to write instead.
            All problems that are known at this point belong into one error. Each becomes one line that is safe to
            print, whatever names and values from outside it quotes.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [safe(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        if not self.problems:
            raise ValueError("a UserError needs at least one problem")
        super().__init__("\n".join(self.problems))


class Problems:
    """Collects what several checks find, so that all of it can be put right at once.

    Examples:
        >>> problems = Problems()
        >>> with problems.collected():
        ...     raise UserError("the first")
        >>> with problems.collected():
        ...     raise UserError("the second")
        >>> problems.found
        ['the first', 'the second']
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """One check. A file or directory that the system refuses to look at is a problem of the input as well."""
        try:
            yield
        except UserError as error:
            self.found += error.problems
        except OSError as error:
            self.found.append(str(error))

    def raise_any(self) -> None:
        """Raises UserError with everything that was found, each problem once."""
        if self.found:
            raise UserError(dict.fromkeys(self.found))


class SubjectsFailed(Exception):  # noqa: N818 - the job did what it could
    """Some subjects of a fleet have no model; a line says how many, and one a subject why."""


class StopRequested(Exception):  # noqa: N818 - not an error: the platform asked the job to end
    """The job was asked to stop (SIGTERM) and has reached a point where it can."""
