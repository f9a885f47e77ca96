"""Errors that a caller can act on and that belong to no single room. Bad input is a `ValueError` everywhere."""


class RunFailed(RuntimeError):
    """A training run or an application could not go on; the message says what broke and what to do."""
