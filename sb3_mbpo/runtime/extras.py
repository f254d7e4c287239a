"""Names the extra to install if a package is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """
    Imports in this context need an extra of this package.

    :param extra: name of the extra
    :param what: what needs it, for the error
    :raises ModuleNotFoundError: a package is missing; the message says how to install it
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sb3_mbpo"):
            raise
        missing = f'{what} needs {error.name}: in the checkout of sb3_mbpo, pip install ".[{extra}]"'
        raise ModuleNotFoundError(missing, name=error.name) from None
