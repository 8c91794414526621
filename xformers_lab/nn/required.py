"""Methods that a shelf's base class asks for and a subclass defines."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

Method = TypeVar("Method", bound=Callable)


def required(method: Method) -> Method:
    """Marks a method that a subclass must define, where it is asked for: a call without that says so.

    Not `abc.abstractmethod`: a class may leave out what its use never calls, as training does `cost`.
    """

    @functools.wraps(method)
    def missing(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} must define {method.__name__}")

    missing.__dict__["required"] = True
    return cast(Method, missing)
