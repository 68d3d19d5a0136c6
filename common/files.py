"""Files. Those that others read are written under a temporary name and renamed, so that nobody sees half of one. Those
that grow by lines lose at most the last line when a process is killed."""
import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file for writing under a temporary name, and rename it to `path` once all of it is on the disk.

    Whenever this is interrupted, `path` holds either the whole old file or the whole new one."""
    temporary = path + ".tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def rename(old, new):
    """Rename a file, in place of another one if that exists. Windows denies it while a virus scanner or an indexer
    reads either of them, so it is tried again for a second."""
    for _ in range(10):
        try:
            return os.replace(old, new)
        except PermissionError:
            time.sleep(0.1)
    os.replace(old, new)


def check_writable(folder, n_bytes=1):
    """End the program unless n_bytes can be written to a folder, or to where it would be made. Called before long work,
    so that a write-protected folder, a full disk or a quota does not cost it."""
    parents = [Path(folder), *Path(folder).absolute().parents]
    try:
        with tempfile.TemporaryFile(dir=next((path for path in parents if path.exists()), folder)) as file:
            for start in range(0, n_bytes, 1 << 20):
                file.write(bytes(min(1 << 20, n_bytes - start)))
    except OSError as error:
        sys.exit(f"cannot write {math.ceil(n_bytes / 2**20)} MB to {folder} ({error.strerror}): change its permissions "
                 "or free some space, or work in another folder")


def lock(path):
    """Lock a file for this process, or exit. The system unlocks it when the process ends, even if it is killed, or when
    the returned file is closed. Where the file system has no locks, a line says so."""
    file = open(path, "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = os.path.dirname(path)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            sys.exit(f"another process is writing to {folder}: wait until it ends, or choose another folder")
        print(f"no file can be locked in {folder} ({error.strerror}): see to it that no other process writes there",
              file=sys.stderr)
    return file


def file_hash(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path):
    """Yield the objects of a file, if it exists. A last line that is only half written is skipped."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    sys.exit(f"{path}, line {number} is not JSON: correct or delete that line")


def open_to_append(path):
    """Open a file to append lines to. A last line that is only half written is cut off first."""
    last = b"\n"  # for an empty file
    with open(path, "a+b") as file:
        file.seek(0)
        for last in file:
            pass
        if not last.endswith(b"\n"):
            try:
                json.loads(last)
                file.write(b"\n")  # only the newline was missing
            except ValueError:
                file.truncate(file.tell() - len(last))
    return open(path, "a", encoding="utf-8")


def read_list(option, path, is_valid):
    """The list in the JSON file that an option names, all of whose items must be valid."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
            items = json.load(file)
        if items and all(is_valid(item) for item in items):
            return items
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"cannot read --{option}={path}: {error}")
    sys.exit(f"--{option}={path} does not have the form of data/{option}.json")
