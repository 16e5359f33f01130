"""Shards at an address (a local server): downloaded once, compared with their hashes, in a cache of limited size."""

import http.server
import multiprocessing
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from colt5dist.data.config import DataConfig
from colt5dist.data.read.batch import make_batch
from colt5dist.data.read.remote import SCHEMES, is_remote
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import DamagedShardError, TokenReader, UnreadableShardError
from colt5dist.errors import ConfigError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

CONFIG = DataConfig(input_length=256, target_length=128)


class Server:
    """Serves a folder, counts the requests, and fails when a test sets it to."""

    def __init__(self, folder: Path) -> None:
        server = self
        self.asked: list[str] = []
        self.failures = 0
        self.spoilt = ""
        self.has_ranges = True
        self.ranges: list[tuple[str, int, int]] = []
        self.flips = 0  # answers to come with a wrong bit

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                if self.path.endswith(".tar") and server.failures > 0:
                    server.failures -= 1
                    self.send_error(503)
                elif server.spoilt and self.path.endswith(server.spoilt):
                    content = bytearray((folder / self.path.lstrip("/")).read_bytes())
                    content[1000] ^= 1
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                elif server.has_ranges and (asked := self.headers.get("Range")):
                    self.send_range(*map(int, asked.removeprefix("bytes=").split("-")))
                else:
                    super().do_GET()

            def send_range(self, first: int, last: int) -> None:
                content = bytearray((folder / self.path.lstrip("/")).read_bytes()[first : last + 1])
                if self.path.endswith(".tar"):
                    server.ranges.append((self.path, first, last + 1))
                if self.path.endswith(".tar") and server.flips > 0:
                    server.flips -= 1
                    content[len(content) // 2] ^= 1
                self.send_response(206)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The shards that were requested."""
        return [path for path in self.asked if path.endswith(".tar")]


@pytest.fixture
def server(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The shard set on a server, and an empty cache; the waits between attempts are short."""
    monkeypatch.setenv("COLT5DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("colt5dist.data.read.remote.FIRST_WAIT", 0.001)
    server = Server(shards.folder)
    yield server
    server.close()


def test_the_same_samples(shards: ShardSet, server: Server) -> None:
    """The samples are those from the folder; each shard is downloaded once, even if the set is opened again."""
    expected = make_batch(Samples(shards, CONFIG, seed=1), range(60))
    for _ in range(2):
        remote = open_shards(server.address)
        assert remote.fingerprint == shards.fingerprint
        found = make_batch(Samples(remote, CONFIG, seed=1), range(60))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)  # type: ignore[literal-required]
    assert sorted(server.fetched()) == sorted(set(server.fetched()))
    whole = TokenReader(remote.validation, cache_bytes=1 << 20).read(0, remote.validation.num_tokens)
    assert np.array_equal(
        whole, TokenReader(shards.validation, cache_bytes=1 << 20).read(0, shards.validation.num_tokens)
    )


def test_the_cache_is_bounded(shards: ShardSet, server: Server, tmp_path: Path) -> None:
    """The shard that was unused for the longest time is removed first; an open one can still be read."""
    sizes = [entry.bytes for entry in shards.manifest.shards]
    assert len(sizes) >= 3
    remote = open_shards(server.address, cache_bytes=2 * max(sizes))
    assert remote.remote is not None and remote.remote.reads_members
    remote.remote.reads_members = False  # as where other sets fill the cache
    reader = TokenReader(remote, cache_bytes=1)
    tokens = reader.read(0, remote.num_tokens)
    cached = list((tmp_path / "cache/shards").glob("*.tar"))
    assert sum(path.stat().st_size for path in cached) <= 2 * max(sizes) and cached
    assert np.array_equal(reader.read(0, remote.num_tokens), tokens)


def test_a_set_beyond_the_cache_is_read_by_members(shards: ShardSet, server: Server, tmp_path: Path) -> None:
    """The samples are the same; no shard is downloaded whole, no part twice, and nothing is kept on disk."""
    expected = make_batch(Samples(shards, CONFIG, seed=1), range(60))
    found = make_batch(Samples(open_shards(server.address, cache_bytes=1000), CONFIG, seed=1), range(60))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)  # type: ignore[literal-required]
    assert len(server.ranges) > 3 and len(set(server.ranges)) == len(server.ranges) == len(server.fetched())
    assert not list((tmp_path / "cache/shards").glob("*.tar"))


def test_a_part_that_comes_damaged_is_asked_for_again(shards: ShardSet, server: Server) -> None:
    """A network error changes no sample; a failed request is repeated; permanent damage is reported."""
    remote = open_shards(server.address, cache_bytes=1000)
    expected = TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens)
    server.flips, server.failures = 1, 2
    assert np.array_equal(TokenReader(remote, cache_bytes=1).read(0, shards.num_tokens), expected)
    assert server.flips == server.failures == 0
    server.flips = 2
    with pytest.raises(DamagedShardError, match=r"http://127.*000000\.tar: at byte 0: record \d+ of member"):
        TokenReader(remote, cache_bytes=1).read(0, shards.num_tokens)


def test_a_server_without_ranges_is_named(server: Server) -> None:
    """The error says which setting to change; the whole file is not downloaded for every part."""
    remote = open_shards(server.address, cache_bytes=1000)
    server.has_ranges = False
    with pytest.raises(UnreadableShardError, match=r"sends whole files only; raise data\.cache_gb"):
        TokenReader(remote, cache_bytes=1).read(0, 10)
    assert len(server.fetched()) == 1


@pytest.mark.parametrize("cache_bytes", [1000, 1 << 30])
def test_any_file_system_of_fsspec(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    """A file system without a server gives the same tokens, by members and by shards."""
    monkeypatch.setenv("COLT5DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SCHEMES, "memory", "fsspec")
    fsspec.filesystem("memory").put(str(shards.folder), "/shards", recursive=True)
    remote = open_shards("memory://shards", cache_bytes=cache_bytes)
    tokens = TokenReader(remote, cache_bytes=1).read(0, remote.num_tokens)
    assert np.array_equal(tokens, TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens))


def test_failures_that_pass_are_waited_for(server: Server) -> None:
    """A short failure of the server only delays the download."""
    remote = open_shards(server.address)
    server.failures = 3
    assert len(TokenReader(remote, cache_bytes=1).read(0, 100)) == 100
    assert server.failures == 0


def test_failures_that_stay_are_named(server: Server) -> None:
    """The error names the address; so does that for a shard with wrong bytes."""
    remote = open_shards(server.address)
    server.failures = 1000
    with pytest.raises(UnreadableShardError, match=r"http://127.*000000\.tar: at byte 0: cannot be read"):
        TokenReader(remote, cache_bytes=1).read(0, 10)
    server.failures, server.spoilt = 0, "000000.tar"
    with pytest.raises(UnreadableShardError, match="its hash is not the one in the manifest"):
        TokenReader(remote, cache_bytes=1).read(0, 10)


def test_what_is_missing_is_found_at_the_start(shards: ShardSet, server: Server) -> None:
    """A shard, and the set itself."""
    path = shards.folder / "000001.tar"
    moved = path.rename(shards.folder / "gone")
    try:
        with pytest.raises(ConfigError, match=r"http://127.*000001\.tar cannot be fetched"):
            open_shards(server.address)
    finally:
        moved.rename(path)
    with pytest.raises(ConfigError, match=r"http://127.*/elsewhere cannot be fetched"):
        open_shards(f"{server.address}/elsewhere")


def fetch(address: str, results: "multiprocessing.Queue[int]") -> None:
    """Read everything; run in a separate process."""
    remote = open_shards(address)
    results.put(int(TokenReader(remote, cache_bytes=1).read(0, remote.num_tokens).astype(np.int64).sum()))


def test_several_processes_share_the_cache(shards: ShardSet, server: Server) -> None:
    """At the same time; no process sees an incomplete shard, and each shard is downloaded once."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=fetch, args=(server.address, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    expected = TokenReader(shards, cache_bytes=1).read(0, shards.num_tokens).astype(np.int64).sum()
    assert sums == {int(expected)}
    assert sorted(server.fetched()) == sorted(set(server.fetched()))


@pytest.mark.parametrize(
    "path", ["pipe:cat x", "pipe://cat", "ftp://host/x", "http://a/x::pipe:touch y", "file://x", "zip://a::s3://b"]
)
def test_other_addresses_are_refused(path: str, tmp_path: Path) -> None:
    """No shell, no chains; before anything is opened."""
    with pytest.raises(ConfigError, match=r"is not a supported address; give a folder, or one of http, https, s3, gs"):
        is_remote(path)
    assert not os.listdir(tmp_path)


def test_folders_are_no_addresses() -> None:
    """Whatever their names are."""
    assert not any(map(is_remote, ("shards", "/data/a:b", "./http", "C:/shards")))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setattr("colt5dist.data.read.remote.find_spec", lambda name: None if name == "s3fs" else name)
    with pytest.raises(ConfigError, match="needs the package s3fs; pip install s3fs"):
        is_remote("s3://bucket/shards")
