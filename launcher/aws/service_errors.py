"""Errors that AWS answers with: of which kind one is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from dreambooth_sm.printing import redact
from launcher.aws.advice import CHECK_NETWORK, LATER, RENEW, SET_CLOCK, advice_for


class Kind(Enum):
    """Why a service did not answer, and what to do about it; for where its answer does not say more."""

    CREDENTIALS = RENEW
    CLOCK = SET_CLOCK
    DENIED = "allow the action to your own credentials (`dreambooth-launcher iam` prints the policy)"
    MISSING = "correct the name, the region or the account"
    BUSY = LATER
    NETWORK = CHECK_NETWORK
    OTHER = ""

    @property
    def passes(self) -> bool:
        """Whether the same request may well be answered a little later."""
        return self in (Kind.BUSY, Kind.NETWORK)


_KINDS = {
    Kind.CREDENTIALS: """
        ExpiredToken ExpiredTokenException ExpiredTokenIdException InvalidClientTokenId InvalidToken InvalidAccessKeyId
        UnrecognizedClientException UnrecognizedClient AuthFailure MissingAuthenticationToken
        MissingAuthenticationTokenException IncompleteSignature SignatureDoesNotMatch InvalidSignatureException
        InvalidIdentityToken TokenRefreshRequired NotAuthorizedException UnauthorizedException InvalidGrantException
    """,
    Kind.CLOCK: "RequestTimeTooSkewed RequestExpired RequestInTheFuture",
    Kind.DENIED: """
        AccessDenied AccessDeniedException UnauthorizedOperation AuthorizationError Forbidden 403 OptInRequired
    """,
    Kind.MISSING: """
        NoSuchEntity NoSuchEntityException RepositoryNotFoundException ImageNotFoundException ResourceNotFound
        ResourceNotFoundException NoSuchResourceException NoSuchBucket NoSuchKey NotFound 404
    """,
    Kind.BUSY: """
        Throttling ThrottlingException ThrottledException Throttled RequestThrottled RequestThrottledException
        TooManyRequestsException ProvisionedThroughputExceededException RequestLimitExceeded BandwidthLimitExceeded
        LimitExceededException PriorRequestNotComplete SlowDown InternalFailure InternalServerError InternalError
        InternalServiceError InternalServerException ServiceUnavailable ServiceUnavailableException RequestTimeout
        RequestTimeoutException TransactionInProgressException
    """,
}
_KIND_OF_CODE = {code: kind for kind, codes in _KINDS.items() for code in codes.split()}
# botocore's own errors, by the names of their classes or of those that they are made from.
_KIND_OF_CLASS = {
    "NoCredentialsError": Kind.CREDENTIALS,
    "PartialCredentialsError": Kind.CREDENTIALS,
    "CredentialRetrievalError": Kind.CREDENTIALS,
    "MetadataRetrievalError": Kind.CREDENTIALS,
    "TokenRetrievalError": Kind.CREDENTIALS,
    "NoAuthTokenError": Kind.CREDENTIALS,
    "SSOError": Kind.CREDENTIALS,
    "UnauthorizedSSOTokenError": Kind.CREDENTIALS,
    "SSOTokenLoadError": Kind.CREDENTIALS,
    "LoginError": Kind.CREDENTIALS,
    "RefreshWithMFAUnsupportedError": Kind.CREDENTIALS,
    "HTTPClientError": Kind.NETWORK,
    "ConnectionError": Kind.NETWORK,
    "ResponseStreamingError": Kind.NETWORK,
    "IncompleteReadError": Kind.NETWORK,
    # An answer that is not AWS's: a proxy's or a hotel's page.
    "ResponseParserError": Kind.NETWORK,
}


class ServiceError(RuntimeError):
    """AWS does not do what it was asked: for lack of valid credentials, rights or a network, or for a fault of its own.

    Attributes:
        kind: of the reason.
        reason: in AWS's or botocore's words.
        advice: what to do about it; empty where nothing is known.
    """

    def __init__(self, message: str, kind: Kind, reason: str, advice: str) -> None:
        self.kind, self.reason, self.advice = kind, reason, advice
        super().__init__(message)

    @classmethod
    def of(cls, doing: str, error: Exception) -> ServiceError:
        """Makes the error of ``doing`` from one of boto3 or botocore."""
        kind, reason = kind_of(error), reason_of(error)
        passing = kind is Kind.DENIED and "PassRole" in reason
        advice = (advice_for(reason) if kind is Kind.OTHER or passing else None) or kind.value
        return cls(f"{doing}: {reason}" + (f"; {advice}" if advice else ""), kind, reason, advice)


def kind_of(error: Exception) -> Kind:
    """The kind of an error of boto3 or botocore."""
    answer: dict[str, Any] = getattr(error, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    message = str(answer.get("Error", {}).get("Message", ""))
    # A signature that is too old or too new has the code of one that is wrong.
    if any(words in message for words in ("Signature expired", "Signature not yet current")):
        return Kind.CLOCK
    if found := _KIND_OF_CODE.get(code):
        return found
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500 or status == 429:
        return Kind.BUSY
    if code.startswith("Validation") and any(words in message.lower() for words in ("not found", "could not find")):
        return Kind.MISSING
    if "still expired" in str(error):
        return Kind.CREDENTIALS
    names = [base.__name__ for base in type(error).__mro__]
    return next((_KIND_OF_CLASS[name] for name in names if name in _KIND_OF_CLASS), Kind.OTHER)


def reason_of(error: Exception) -> str:
    """Quotes AWS or botocore, in one line and without secrets."""
    answer = getattr(error, "response", None)
    if answer:
        found = answer.get("Error", {})
        text = ": ".join(str(found[name]) for name in ("Code", "Message") if found.get(name)) or str(error)
    else:
        text = str(error) or type(error).__name__
    return redact(" ".join(text.split()))


@contextmanager
def asking(doing: str) -> Iterator[None]:
    """Turns what AWS refuses inside the block into a :class:`ServiceError`.

    Args:
        doing: what was tried, for the message.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise ServiceError.of(doing, error) from error
    except RuntimeError as error:
        if "still expired" not in str(error):  # botocore's word on credentials that were renewed too late
            raise
        raise ServiceError.of(doing, error) from error


@contextmanager
def stopping(name: str, has_ended: Callable[[], bool]) -> Iterator[None]:
    """Asks inside to stop something; where it has ended already, what AWS says to that is not an error.

    Raises:
        ServiceError: AWS refuses, or can't be reached.
    """
    try:
        with asking(f"{name} can't be stopped"):
            yield
    except ServiceError as error:
        if error.kind not in (Kind.MISSING, Kind.OTHER) or not has_ended():
            raise
