"""Who may work on this host: one job whose times count, or any number of others. Processes hold it, whoever began them:
two nodes of a cluster may be one host, and what a dead command left may still save itself."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def held(*, alone: bool) -> Iterator[int]:
    """Waits until this host is free for a job that is alone on it, or for one that is not; -> an open file, by which
    a process that inherits it holds the host too. Raises OSError where there is no file to lock."""
    # Not in the user's own folders, which hosts may share.
    path = pathlib.Path(tempfile.gettempdir()) / f"xformers_lab-{os.getuid()}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield handle
    finally:
        os.close(handle)
