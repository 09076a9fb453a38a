"""Recognising that the client of a store has no login, and advice for the user."""

from __future__ import annotations

# raised by the clients of S3, Google, Azure and Hugging Face before they send anything
_ERRORS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoAuthTokenError",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError", "RefreshError",
    "CredentialUnavailableError", "ClientAuthenticationError", "LocalTokenNotFoundError",
}  # fmt: skip
_ADVICE = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
    "hf": "run hf auth login, or set HF_TOKEN",
    "http": "give them in the URL or in ~/.netrc",
}


class LoginError(Exception):
    """The client of a store has no login to send, or cannot use the one it has."""


def is_login_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, is a missing or unusable login.

    The classes are compared by name, because only the packages of the stores in use are installed.
    """
    while error is not None:
        if any(kind.__name__ in _ERRORS for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def login_advice(protocol: str) -> str:
    """Return how to log in to a store, for messages."""
    same = {"s3a": "s3", "gcs": "gs", "https": "http"}
    return _ADVICE.get(same.get(protocol, protocol), "give them in the environment")
