"""A folder that appears whole or not at all.

Files are written into a hidden sibling, synced, and the sibling takes the folder's
name: by one atomic exchange where the system has it (Linux), else by two renames. A
process killed in between leaves a hidden sibling that the next save removes.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; stale siblings then stay
    fcntl = None

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Write a folder under a temporary name and move it into place at the end.

    Args:
        path: the folder to create or replace.

    Yields:
        The temporary folder to write into. If the block raises, it is removed and what
        was at `path` before stays as it was.
    """
    target = pathlib.Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.saving-"
    _remove_stale(target.parent, prefix)
    work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    lock = os.open(work, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
        # mkdtemp makes private folders; an export is as readable as its parent allows.
        work.chmod(0o777 & ~_umask())
        # What the disk refuses late (delayed allocation) must fail before the move.
        for file in work.iterdir():
            _sync(file)
        _sync(work)
        _move_into_place(work, target)
        _sync(target.parent)
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def replace_file(path: pathlib.Path, text: str) -> None:
    """Write a small text file so that readers see the old or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _move_into_place(work: pathlib.Path, target: pathlib.Path) -> None:
    if not target.exists():
        os.rename(work, target)
        return
    if _exchange(work, target):
        return  # `work` is now the old folder, which the caller removes
    aside = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)
    )
    os.rename(target, aside / target.name)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(aside / target.name, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Swap two folders in one step; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    status = renameat2(
        _AT_FDCWD,
        os.fsencode(first),
        _AT_FDCWD,
        os.fsencode(second),
        _RENAME_EXCHANGE,
    )
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove_stale(parent: pathlib.Path, prefix: str) -> None:
    """Remove siblings left by killed processes: those whose lock nobody holds."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
