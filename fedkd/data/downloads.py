"""Torchvision's data sets: found on disk, extracted from an archive, or downloaded, each verified by its MD5."""

from __future__ import annotations

import http.client
import os
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedkd.core.errors import DataError
from fedkd.data import places

if TYPE_CHECKING:
    from fedkd.data.sources import Source

ATTEMPTS = 10  # in one run; the next run resumes
CHUNK = 1 << 20  # bytes
MISSING = (RuntimeError, FileNotFoundError, NotADirectoryError)  # torchvision: missing, incomplete or another MD5


@dataclass(frozen=True)
class File:
    """A file of a download: its URL, its path in torchvision's root, and its MD5."""

    url: str
    path: Path
    md5: str


def dataset(source: Source, split: str, data_dir: str) -> Any:
    """The torchvision data set of a source: from the first place that has it, else downloaded into the cache.

    Raises:
        DataError: it is damaged where it was found, or it is nowhere and cannot be downloaded.

    """
    import torchvision

    kind = getattr(torchvision.datasets, source.argument)
    options: dict[str, Any] = {"train": split == "train"}
    if source.argument in ("SVHN", "STL10"):
        options = {"split": split}
    elif source.argument == "EMNIST":
        options |= {"split": source.train_part}
    files = _files(kind, split)
    extracted = _extracted(kind, files)
    target = places.downloaded()
    for root in places.searched(data_dir):
        folders = places.torchvision_folders(source, root, extracted, [file.path.name for file in files])
        for folder in folders:
            try:
                return kind(str(folder), **options)
            except MISSING:
                continue
        if root == target or not files:
            continue
        if archives := _archives(folders, files):
            return _from_archives(archives, files, kind, options)
        if damaged := [folder / extracted for folder in folders if (folder / extracted).exists()]:
            raise DataError(
                f"{damaged[0]} is damaged, incomplete or another version of {source.name}: torchvision does not accept "
                "it. Remove it, or extract its archive again."
            )
    if not files:
        return kind(str(target), download=True, **options)
    _download(source, files, data_dir)
    return _from_archives([target / file.path for file in files], files, kind, options)


def _files(kind: Any, split: str) -> list[File]:
    """What torchvision's class downloads; nothing if it does not list it, then it downloads by itself."""
    if hasattr(kind, "split_list"):
        listed = [kind.split_list[split]]
    elif kind.__name__ == "EMNIST":
        listed = [(kind.url, f"EMNIST/raw/{kind.url.rpartition('/')[2]}", kind.md5)]
    elif hasattr(kind, "resources"):
        folder = f"{kind.__name__}/raw"
        listed = [(f"{kind.mirrors[0]}{name}", f"{folder}/{name}", md5) for name, md5 in kind.resources]
    else:
        listed = [(kind.url, kind.filename, kind.tgz_md5)] if hasattr(kind, "tgz_md5") else []
    return [File(url, Path(path), md5) for url, path, md5 in listed]


def _extracted(kind: Any, files: list[File]) -> str:
    """The folder in torchvision's root that it reads, or the file."""
    if len(files) > 1:
        return str(files[0].path.parent)
    return getattr(kind, "base_folder", "") or (str(files[0].path) if files else "")


def _archives(folders: list[Path], files: list[File]) -> list[Path]:
    """The archives that a user downloaded, all in the same folder or where torchvision puts them."""
    for folder in folders:
        for archives in ([folder / file.path for file in files], [folder / file.path.name for file in files]):
            if all(archive.is_file() for archive in archives):
                return archives
    return []


def _from_archives(archives: list[Path], files: list[File], kind: Any, options: dict[str, Any]) -> Any:
    """The data set, extracted into the cache directory. No file is there before it is complete."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    target = places.downloaded()
    for archive, file in zip(archives, files, strict=True):
        if not check_integrity(archive, file.md5):
            raise DataError(f"{archive} is damaged or another file: its MD5 is not {file.md5}. Fetch {file.url} again.")
    try:
        with _locked(target, kind.__name__), tempfile.TemporaryDirectory(dir=target) as temporary:
            try:
                return kind(str(target), **options)
            except MISSING:  # not extracted yet
                pass
            for archive, file in zip(archives, files, strict=True):
                folder = Path(temporary, file.path.parent)
                folder.mkdir(parents=True, exist_ok=True)
                extract_archive(str(archive), str(folder))
            for inner in Path(temporary).rglob("*.gz"):  # EMNIST is an archive of archives
                if inner.name.startswith(f"emnist-{options['split']}-"):
                    extract_archive(str(inner), str(inner.parents[1]))
                inner.unlink()
            for path in filter(Path.is_file, Path(temporary).rglob("*")):
                place = target / path.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            return kind(str(target), **options)
    except OSError as error:
        raise DataError(
            f"{archives[0]} cannot be extracted into {target} ({error.strerror}); free some space there, or set "
            "FEDKD_CACHE to another folder."
        ) from error


def _download(source: Source, files: list[File], data_dir: str) -> None:
    target = places.downloaded()
    help_ = (
        f"{source.name} is not in {', '.join(map(str, places.searched(data_dir)))} and {{}}. Point --data-dir (or "
        "FEDKD_DATA) to a folder with torchvision's files or parquet files, or try --dataset digits, which needs no "
        "download."
    )
    missing = [file.url for file in files if not (target / file.path).is_file()]
    if missing and not is_reachable(missing[0]):
        raise DataError(help_.format(f"{_address(missing[0])[0]} cannot be reached within ten seconds"))
    try:
        with _locked(target, source.argument):
            for file in files:
                fetch(file.url, target / file.path, file.md5)
    except Exception as error:  # urllib, ssl, a full disk, a checksum: all have the same remedy
        raise DataError(help_.format(f"its download failed ({type(error).__name__}: {error})")) from error


def _address(url: str) -> tuple[str, int]:
    """The host and port to connect to for a URL: the proxy's, if the environment names one for it."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_reachable(url: str, seconds: float = 10.0) -> bool:
    """Whether a connection to the host of a URL, or to its proxy, opens in time, including the name lookup."""
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(_address(url), timeout=seconds).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file. An interrupted download is resumed, in this run or in the next one, from PATH.part.

    Raises:
        OSError, http.client.HTTPException: the server refuses or sends nothing, or `ATTEMPTS` connections were lost.
        RuntimeError: the whole file has another MD5.

    """
    from torchvision.datasets.utils import check_integrity

    if check_integrity(path, md5):
        return
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        start = part.stat().st_size if part.exists() else 0
        try:
            resumed = _receive(url, part, start)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            resumed = True  # the part has all bytes, or too many
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS or not part.exists() or part.stat().st_size <= start:
                raise
            _say(f"the download of {url} was interrupted ({error}); it is resumed.")
            continue
        if check_integrity(part, md5):
            os.replace(part, path)
            return
        part.unlink()
        if not resumed:
            break
        _say(f"the resumed download of {url} is damaged; it is started again.")
    raise RuntimeError(f"{url} does not have the MD5 {md5}")


def _receive(url: str, part: Path, start: int) -> bool:
    """Append the rest of a file from byte ``start`` on, or write the whole file; whether it is the rest."""
    headers = {"User-Agent": "fedkd"} | ({"Range": f"bytes={start}-"} if start else {})
    opener = urllib.request.build_opener()  # with the proxies of the environment
    with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as response:
        resumed: bool = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if resumed else 0
        total = done + int(response.headers.get("Content-Length", 0))
        _say(f"downloading {url} to {part.parent}, from MB {done / 1e6:.0f} to {total / 1e6:.0f}.")
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                done += len(chunk)
                _show(f"fedkd: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        _show("")
    if done < total:
        raise ConnectionError(f"after {done} of {total} bytes")
    return resumed


def _say(text: str) -> None:
    print(f"fedkd: {text}", file=sys.stderr, flush=True)


def _show(text: str) -> None:
    """Replace the line of the progress, if there is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time download and extract a data set; the system unlocks it if that process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: the MD5 finds what two processes mixed
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process downloads or extracts {name} in {folder}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
