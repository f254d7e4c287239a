"""Names the extra to install if a package is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is missing. The message says how to install it."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """
    Imports in this context need an extra of this package.

    :param extra: name of the extra
    :param what: what needs it, for the error
    :raises MissingExtra: a package is missing
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "sb3_mbpo"):
            raise
        missing = f'{what} needs {package}: in the checkout of sb3_mbpo, pip install ".[{extra}]"'
        raise MissingExtra(missing, name=package) from None
