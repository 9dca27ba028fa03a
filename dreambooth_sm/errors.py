"""The one error type for bad input, and the exit codes of a job."""

from __future__ import annotations

from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
# 128 + SIGTERM, as a shell reports a process that a signal ended.
EXIT_STOPPED = 143


class UserError(Exception):
    """Something that the person who started the job can put right.

    Args:
        problems: one sentence a problem: what is wrong, where, and what to write instead.
            All problems that are known at this point belong into one error.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if not self.problems:
            raise ValueError("a UserError needs at least one problem")
        super().__init__("\n".join(self.problems))


class StopRequested(Exception):  # noqa: N818 - not an error: the platform asked the job to end
    """The job was asked to stop (SIGTERM) and has reached a point where it can."""
