"""What went wrong beneath what Ray wrapped around it. Imports nothing heavy: a wrong command line is told at once."""

from __future__ import annotations

import errno

OURS = (ValueError, TypeError, LookupError, AttributeError, ImportError, ArithmeticError, AssertionError)
"""Wrong input, or a mistake in the program: the same again on the next try."""


def root_cause(error: BaseException) -> BaseException:
    """What our own code raised, in this process or in a worker, beneath what Ray wrapped around it."""
    seen: set[int] = set()
    while id(error) not in seen and _is_rays(error):
        seen.add(id(error))
        error = next(iter(_inner(error)), error)
    return error


def is_lasting(error: BaseException) -> bool:
    """Whether a new try would end in the same way; False for a worker, node or network that is gone.

    Looks at every worker's error: where one has failed, the others' connections break.
    """
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if _is_rays(one):
            waiting += _inner(one)
        elif isinstance(one, OURS) or isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
    return False


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "ray"


def _inner(error: BaseException) -> list[BaseException]:
    failures = getattr(error, "worker_failures", None) or {}
    inner = (
        getattr(error, "cause", None),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        *failures.values(),
        error.__cause__,
    )
    return [one for one in inner if isinstance(one, BaseException)]
