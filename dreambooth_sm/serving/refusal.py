"""The one error of a request that is not answered with pictures."""

from __future__ import annotations

from collections.abc import Iterable

from dreambooth_sm.errors import UserError


class Refusal(UserError):  # noqa: N818 - what becomes of a request
    """Something that whoever sent a request can put right.

    Args:
        problems: one sentence each; see :class:`~dreambooth_sm.errors.UserError`.
        status: of the HTTP answer.
    """

    def __init__(self, problems: str | Iterable[str], status: int = 400) -> None:
        super().__init__(problems)
        self.status = status
