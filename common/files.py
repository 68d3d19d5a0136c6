"""Files. Those that others read are written under a temporary name and renamed, so that nobody sees half of one. Those
that grow by lines lose at most the last line when a process is killed. A download that breaks off is continued."""
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm


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


def first_bytes(path):
    with open(path, "rb") as file:
        return file.read(100_000)


def download(url, path, mark=b"", retries=5, wait=1.0):
    """Fetch `url` to `path`. What has arrived stays in path + ".part", and a later attempt continues from there.

    Gives up after retries + 1 attempts in a row without a new byte, or at once if the server refuses. A file without
    `mark` in its beginning is a page that a server sent instead, and is removed."""
    part, failures = path + ".part", 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(part, "ab").close()
    largest = os.path.getsize(part)
    while True:
        try:
            fetch_rest(url, part)
            break
        except (OSError, ValueError, HTTPException) as error:  # HTTPError is an OSError
            size, status = os.path.getsize(part), getattr(error, "code", None)
            failures = 0 if size > largest else failures + 1
            if failures > retries or status in (400, 401, 403, 404, 410):
                sys.exit(f"cannot download {url}: {error}. Run this again to continue after {size:,} bytes, check "
                         "--url, name a file that you have with --input=FILE, or make stories with python -m lab.world")
        if status == 416:  # the server has no byte after ours: ours are another file's, or all of this one
            os.truncate(part, 0)
        largest = max(size, largest)
        time.sleep(wait * (2**failures - 1))  # 0 s after progress, then 1, 3, 7, 15 and 31 s
    beginning = first_bytes(part)
    if mark not in beginning:
        os.remove(part)
        sys.exit(f"{url} is not a file of stories, it begins with {beginning[:60]}: check --url, or name a file that "
                 "you have with --input=FILE")
    rename(part, path)


def fetch_rest(url, part):
    """Append the rest of `url` to the file `part`. Raises OSError if the connection ends before that."""
    start = os.path.getsize(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as file:
        if response.status != 206:  # the server ignores ranges and sends the file from its start
            start = 0
            file.truncate(0)
        total = start + int(response.headers.get("Content-Length", 0))  # 0 if the server does not report the length
        with tqdm.wrapattr(response, "read", total=total or None, initial=start, desc=part, disable=None) as body:
            shutil.copyfileobj(body, file)
    if os.path.getsize(part) < total:
        raise OSError(f"{os.path.getsize(part):,} of {total:,} bytes arrived")
