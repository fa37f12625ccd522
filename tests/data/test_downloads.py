"""Downloads from a server of this process: interrupted, resumed, verified, through a proxy, by two at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torchvision

from fedkd.core.errors import DataError
from fedkd.data import downloads, sources
from fedkd.data.readers import read
from tests.data.tiny_sets import extracted, packed


class Server(ThreadingHTTPServer):
    """Serves one content under every path; ``requests`` are the paths and ranges that were requested."""

    content = b""
    cuts: tuple[int, ...] = ()  # after so many bytes the connection of the first, second, ... request is lost
    ranges = True  # whether ranges are served

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []
        self.before = lambda: None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted, content, number = self.headers.get("Range", ""), self.server.content, len(self.server.requests)
        self.server.requests.append((self.path, wanted))
        self.server.before()
        start = int(wanted.removeprefix("bytes=").removesuffix("-") or 0) if self.server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.server.cuts[number] if number < len(self.server.cuts) else len(content)
        self.wfile.write(content[start : start + cut])

    def do_CONNECT(self) -> None:
        self.server.requests.append((f"CONNECT {self.path}", ""))
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    (archive,) = packed("CIFAR10", tmp_path / "server", monkeypatch)
    with Server() as server:
        server.content = archive.read_bytes()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server.address}/{archive.name}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def is_downloaded() -> bool:
    return [read(sources.cifar10(), split).labels.tolist() for split in ("train", "test")] == [[1, 0], [1, 0]]


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "cache" / "data" / "cifar-10-python.tar.gz.part"
    path.parent.mkdir(parents=True)
    return path


def test_a_download_is_said_verified_extracted_and_not_repeated(server, part, capsys):
    assert is_downloaded()
    archive = part.with_suffix("")
    assert (part.exists(), archive.read_bytes()) == (False, server.content)
    assert sorted(path.name for path in part.parent.iterdir()) == ["CIFAR10.lock", "cifar-10-batches-py", archive.name]
    assert f"fedkd: downloading {server.address}/{archive.name} to {part.parent}" in capsys.readouterr().err
    assert len(server.requests) == 1
    read(sources.cifar10(train=1), "train")
    assert len(server.requests) == 1


def test_an_archive_in_the_cache_needs_no_server(server, part, monkeypatch):
    part.with_suffix("").write_bytes(server.content)
    monkeypatch.setattr(downloads, "is_reachable", lambda url: False)
    assert is_downloaded()
    assert server.requests == []


def test_a_lost_connection_is_resumed_in_the_same_run(server, capsys):
    server.cuts = (100, 50)
    assert is_downloaded()
    assert [wanted for _, wanted in server.requests] == ["", "bytes=100-", "bytes=150-"]
    assert "was interrupted (after 100 of" in capsys.readouterr().err


def test_a_server_that_is_gone_for_long_is_an_error_and_the_next_run_resumes(server, part):
    server.cuts = (10,) * downloads.ATTEMPTS
    with pytest.raises(DataError, match=r"cifar10 is not in .*its download failed \(ConnectionError: after 100 of"):
        is_downloaded()
    assert part.read_bytes() == server.content[:100]
    assert is_downloaded()
    assert server.requests[-1][1] == "bytes=100-"


def test_a_server_that_sends_nothing_is_asked_once(server):
    server.cuts = (0,) * downloads.ATTEMPTS
    with pytest.raises(DataError, match="after 0 of"):
        is_downloaded()
    assert len(server.requests) == 1


def test_a_server_without_ranges_sends_the_whole_file_again(server):
    server.ranges, server.cuts = False, (100,)
    assert is_downloaded()
    assert [wanted for _, wanted in server.requests] == ["", "bytes=100-"]


@pytest.mark.parametrize("wrong", [b"wrong", b"wrong" * 10**5])
def test_a_damaged_part_is_discarded_and_the_retry_says_so(wrong, server, part, capsys):
    part.write_bytes(wrong)
    assert is_downloaded()
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(wrong)}-", ""]
    assert "is damaged; it is started again" in capsys.readouterr().err


def test_a_part_that_is_complete_is_used(server, part):
    part.write_bytes(server.content)
    assert is_downloaded()


def test_a_file_with_another_md5_is_refused_and_not_kept(server, part):
    server.content = b"a page that asks for a password"
    with pytest.raises(DataError, match="does not have the MD5"):
        is_downloaded()
    assert len(server.requests) == 1
    assert [path.name for path in part.parent.iterdir()] == ["CIFAR10.lock"]


def test_a_proxy_is_used_for_names_that_only_it_knows(server, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://data.invalid/cifar-10-python.tar.gz")
    with pytest.raises(DataError, match=r"data\.invalid cannot be reached"):
        is_downloaded()
    monkeypatch.setenv("http_proxy", server.address)
    assert is_downloaded()
    assert server.requests == [("http://data.invalid/cifar-10-python.tar.gz", "")]


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_a_proxy_that_refuses_is_an_error(name, server, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "https://data.invalid/cifar-10-python.tar.gz")
    monkeypatch.setenv(name, server.address.removeprefix("http://"))
    with pytest.raises(DataError, match=r"its download failed .*403"):
        is_downloaded()
    assert server.requests == [("CONNECT data.invalid:443", "")]


def test_hosts_without_a_proxy_are_reached_directly(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    with pytest.raises(DataError, match=r"proxy\.invalid cannot be reached"):
        is_downloaded()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert is_downloaded()


def test_two_processes_do_not_download_the_same_file(server, monkeypatch):
    """Threads stand for processes: the lock belongs to the open file."""
    other = threading.Event()
    monkeypatch.setattr(downloads, "_say", lambda text: other.set() if "another process" in text else None)
    server.before = lambda: other.set() if len(server.requests) > 1 else other.wait(120)
    found: list[int] = []

    def load() -> None:
        found.append(len(downloads.dataset(sources.cifar10(), "train", "")))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert found == [2, 2]
    assert len(server.requests) == 1


def test_progress_is_one_line_on_a_terminal(server, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert is_downloaded()
    shown = capsys.readouterr().err
    assert "\r\x1b[Kfedkd: 0 of 0 MB\r\x1b[K" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", ["SVHN", "FashionMNIST"])
def test_other_data_sets(name, server, tmp_path, monkeypatch):
    """Several files, or files that are no archives."""
    kind = getattr(torchvision.datasets, name)
    if name == "SVHN":
        folder = extracted(name, tmp_path / name, monkeypatch)
        for split, (_, file, md5) in list(kind.split_list.items()):
            monkeypatch.setitem(kind.split_list, split, [f"{server.address}/{file}", file, md5])
    else:
        folder = packed(name, tmp_path / name, monkeypatch)[0].parent
        monkeypatch.setattr(kind, "mirrors", [f"{server.address}/"])

    original = Handler.do_GET

    def get(self: Handler) -> None:
        self.server.content = (folder / self.path.removeprefix("/")).read_bytes()
        original(self)

    monkeypatch.setattr(Handler, "do_GET", get)
    source = sources.svhn() if name == "SVHN" else sources.fashion_mnist()
    for split in ("train", "test"):
        assert read(source, split).labels.tolist() == [1, 0]
    assert len(server.requests) == (2 if name == "SVHN" else 4)


def test_a_host_that_does_not_respond_is_not_waited_for(monkeypatch):
    asked, over = threading.Event(), threading.Event()

    def never(*_: object, **__: object) -> None:
        asked.set()
        over.wait()
        raise OSError

    monkeypatch.setattr(downloads.socket, "create_connection", never)
    try:
        assert not downloads.is_reachable("http://host.invalid/", seconds=0.1)  # else it is still waiting
        assert asked.wait(120)
    finally:
        over.set()
