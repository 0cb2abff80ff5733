"""The rating page as strangers use it, in a real browser: by mouse and by keys, over killed servers, and with bad intentions.

CROSSMODAL_RATINGS=1000 makes the crowd of the last test the whole one: ten raters, a hundred ratings each, five kills."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from crossmodal.workbook.studies import Item, Study, create_study, dots

SECRET = "SecretPainter"
HOSTILE = """<script>document.title = "owned"</script><img src=x onerror="document.title = 'owned'"> "quotes" 'quotes' $x$ {{ 7 * 7 }} &amp;"""
CROWD = int(os.environ.get("CROSSMODAL_RATINGS", "24"))
BY_COMMAND = "import sys; from crossmodal.cli import main; sys.exit(main(['rate', sys.argv[1], '--serve', '--port', sys.argv[2]]))"
DIRECTLY = "import sys; from crossmodal.workbook.ratings import serve; serve(sys.argv[1], port=int(sys.argv[2]))"


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port, process):
    "Until somebody listens."
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try: return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError: time.sleep(.05)
    raise RuntimeError("the server did not start")


class Server:
    "A study's page in a process of its own, which can be killed."

    def __init__(self, study, code=DIRECTLY):
        self.study, self.code, self.port = study, code, free_port()
        with Study(study) as opened: self.tokens = opened.invite()
        self.start()

    def start(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", self.code, str(self.study), str(self.port)], **quiet)
        wait_for(self.port, self.process)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def link(self, rater): return f"http://127.0.0.1:{self.port}/?rater={self.tokens[rater]}"

    def ask(self, method, path, headers=()):
        "Status, headers and body. The path goes out as it is: a browser would tidy it up."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally: connection.close()

    def kernels(self): return subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()


def stored(server, rater):
    "place -> mark of one rater, and how many clicks there were."
    with Study(server.study) as study:
        query = "SELECT place, value FROM answer JOIN assignment USING (rater, item) WHERE rater = ?"
        return dict(map(tuple, study.db.execute(query, (rater,)))), study.db.execute("SELECT COUNT(*) FROM click WHERE rater = ?", (rater,)).fetchone()[0]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    items = [Item(HOSTILE if k == 2 else f"sentence {k}", {SECRET: dots(1 + k % 9)}, f"Source{k}") for k in range(12)]
    server = Server(create_study(tmp_path_factory.mktemp("scores") / "sheet", "scores", items, 6, share=0, seed=1), BY_COMMAND)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    items = [Item(f"sentence {k}", {f"{SECRET}{name}": dots(1 + (k + j) % 9) for j, name in enumerate("ABCD")}, f"Source{k}") for k in range(5)]
    server = Server(create_study(tmp_path_factory.mktemp("orders") / "sheet", "correlation", items, 2, share=.2, seed=1))
    yield server
    server.stop()


def answered(page): return int(page.locator(".xm-progress").inner_text().split()[0])


READY = "document.querySelector('.xm-sheet[role=region]:not(.xm-waiting) .xm-out')"     # nothing is awaited, and what comes last on a page is there


def wait_until(page, number): page.wait_for_function(f"n => parseInt(document.querySelector('.xm-progress')?.innerText) === n && {READY}", arg=number)


def press(page, key):
    "A key, when the page can take it: until the last press is answered it takes no other."
    page.wait_for_function("() => " + READY)
    page.keyboard.press(key)


def enter(page, server, rater):
    "Open a link and agree, if that is asked."
    page.goto(server.link(rater))
    page.locator(".xm-sheet[role=region] button").first.wait_for()
    if page.get_by_role("button", name="I agree").count(): page.get_by_role("button", name="I agree").click()
    page.wait_for_function(f"() => document.querySelector('.xm-progress') && {READY}")


# One rater


def test_consent_comes_first(page, scores):
    page.goto(scores.link(1))
    page.get_by_text("Before you begin").wait_for()
    assert "Taking part is voluntary" in page.locator(".xm-consent").inner_text() and page.locator("img").count() == 0
    page.locator(".xm-sheet[role=region]").wait_for()
    page.keyboard.press("1")                                    # agreeing takes more than a key
    time.sleep(.3)
    with Study(scores.study) as study: assert study.progress()[0].consented == ""
    page.get_by_role("button", name="I agree").click()
    page.locator(".xm-progress").wait_for()
    with Study(scores.study) as study: assert study.progress()[0].consented != ""


def test_by_mouse_by_keys_back_and_again(page, scores):
    enter(page, scores, 2)
    page.get_by_role("button", name="4 match completely").click()
    wait_until(page, 1)
    press(page, "1")
    wait_until(page, 2)
    page.get_by_role("button", name="2 somewhat").focus()
    press(page, "Enter")
    wait_until(page, 3)
    press(page, "9")                                    # no such mark
    press(page, "ArrowLeft")                            # back to the third
    page.locator("button.xm-chosen", has_text="2 somewhat").wait_for()
    press(page, "3")
    page.locator("button.xm-chosen").wait_for(state="detached")
    assert answered(page) == 3 and stored(scores, 2) == ({1: 4, 2: 1, 3: 3}, 4)
    page.reload()
    page.locator(".xm-progress").wait_for()
    assert answered(page) == 3 and page.complaints == []


def test_a_second_press_does_not_judge_what_nobody_saw(page, scores):
    enter(page, scores, 3)
    page.evaluate("for (let k = 0; k < 5; k++) document.querySelector('.xm-key-2').click()")
    wait_until(page, 1)
    page.get_by_role("button", name="1 unrelated").dblclick()
    wait_until(page, 2)
    time.sleep(.5)
    assert answered(page) == 2 and stored(scores, 3) == ({1: 2, 2: 1}, 2)


def test_a_slow_double_click_does_not_judge_what_nobody_saw(page, scores):
    "A hand's second click comes when the next item already lies under the mouse."
    enter(page, scores, 6)
    for count in (1, 2):
        page.wait_for_function("() => [...document.querySelectorAll('.xm-sheet img')].every(image => image.complete)")          # nothing moves any more
        box = page.get_by_role("button", name="1 unrelated").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down(click_count=count)                      # as a browser counts clicks that are close in time and place
        page.mouse.up(click_count=count)
        wait_until(page, 1)
        time.sleep(.2)
    time.sleep(.5)
    assert answered(page) == 1 and stored(scores, 6) == ({1: 1}, 1)
    page.get_by_role("button", name="1 unrelated").click()      # one of its own counts
    wait_until(page, 2)


def test_hostile_text_is_text(page, scores):
    enter(page, scores, 4)
    for k in range(12):
        if page.locator(".xm-text").inner_text().startswith("<script>"): break
        press(page, "1")
        wait_until(page, k + 1)
    assert page.locator(".xm-text").inner_text() == HOSTILE and page.locator(".xm-text *").count() == 0
    assert page.title() == "Rating sheet" and page.complaints == []
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_order_is_kept_click_by_click(page, orders):
    enter(page, orders, 1)
    page.locator("img[alt='picture B']").click()
    page.locator("button.xm-chosen", has_text="B: 1st").wait_for()
    page.reload()
    page.locator("button.xm-chosen", has_text="B: 1st").wait_for()
    assert answered(page) == 0 and stored(orders, 1)[1] == 1    # half an order
    press(page, "4")
    page.locator("button.xm-chosen", has_text="D: 2nd").wait_for()
    press(page, "0")
    page.locator("button.xm-chosen").first.wait_for(state="detached")
    for key in "cad":
        press(page, key)
        page.locator(".xm-key-" + key + ".xm-chosen").wait_for(state="attached") if key != "d" else wait_until(page, 1)
    with Study(orders.study) as study:
        [(item, shown)] = map(tuple, study.db.execute("SELECT item, shown FROM assignment WHERE rater = 1 AND place = 1"))
        places = dict(map(tuple, study.db.execute("SELECT entry, value FROM answer WHERE rater = 1 AND item = ?", (item,))))
    assert [places[int(entry)] for entry in shown.split()] == [2, 4, 1, 3] and page.complaints == []


def test_who_withdraws_leaves_nothing(page, scores):
    enter(page, scores, 5)
    press(page, "2")
    wait_until(page, 1)
    page.get_by_role("button", name="Withdraw").click()
    page.get_by_role("button", name="No, go on").click()
    wait_until(page, 1)
    page.get_by_role("button", name="Withdraw").click()
    page.get_by_role("button", name="Delete my answers").click()
    page.get_by_text("You have withdrawn").wait_for()
    assert stored(scores, 5) == ({}, 0)
    page.reload()
    page.get_by_text("You have withdrawn").wait_for()


def test_the_page_names_no_system(page, orders):
    "Neither in what it shows nor in what travels to it."
    heard = []
    page.on("websocket", lambda found: found.on("framereceived", lambda frame: heard.append(frame if isinstance(frame, bytes) else frame.encode())))
    page.on("request", lambda request: heard.append(request.url.encode()))
    enter(page, orders, 2)
    for key in ("1", "2"):
        press(page, key)
        page.locator(f".xm-key-{key}.xm-chosen").wait_for()
    all_of_it = b"".join(heard) + page.content().encode()
    with Study(orders.study) as study: digests = [row[0].encode() for row in study.db.execute("SELECT picture FROM entry")]
    assert len(heard) > 20 and b"data:image/png" in all_of_it
    for word in (SECRET.encode(), b"Source", b"study.sqlite", str(orders.study).encode(), orders.tokens[1].encode(), *digests): assert word not in all_of_it
    hosts = {url.split(b"/")[2] for url in heard if url.startswith((b"http:", b"https:"))}
    assert hosts == {f"127.0.0.1:{orders.port}".encode()}        # a rater's browser talks to nobody else


def test_in_jupyterlab_the_same_sheet_has_the_same_keys(page, tmp_path):
    "There digits are Lab's own keys (1 makes a cell a heading), and messages of widgets come in threads."
    import nbformat
    items = [Item(f"sentence {k}", {name: dots(1 + j) for j, name in enumerate("abc")}) for k in range(2)]
    study = create_study(tmp_path / "sheet", "correlation", items, 1, share=0)
    with Study(study) as opened: [token] = opened.invite().values()
    code = f"from crossmodal.workbook.ratings import RatingSheet\nRatingSheet({str(study)!r}, {token!r})"
    (tmp_path / "lab").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": KERNEL}), tmp_path / "lab" / "sheet.ipynb")
    port = free_port()
    words = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=x", f"--ServerApp.root_dir={tmp_path / 'lab'}"]
    apart = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=os.environ | apart, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, lab)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/sheet.ipynb?token=x")
        page.locator(".jp-Notebook .cm-content").click()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        page.locator(".jp-Notebook .cm-content").press("Control+Enter")
        page.locator(".xm-sheet[role=region]").wait_for()
        page.get_by_role("button", name="I agree").click()
        page.wait_for_function("() => " + READY)
        page.locator("img[alt='picture B']").click()
        page.locator(".xm-key-2.xm-chosen").wait_for()
        press(page, "1")
        wait_until(page, 1)
        assert page.locator(".jp-CodeCell").count() == 1 and page.locator(".jp-MarkdownCell").count() == 0
    finally:
        lab.terminate()
        lab.wait()


# Strangers


def test_without_a_token_nothing_is_started(page, scores):
    before, answers = scores.kernels(), set()
    for token in ("", "?rater=", "?rater=forged", f"?rater={scores.tokens[1][:-1]}", "?rater=%00", "?rater=" + "a" * 5000, "?token=" + scores.tokens[1],
                  f"?rater={scores.tokens[1]}&rater=x", "?rater=" + quote("' OR 1 = 1 --")):
        status, headers, body = scores.ask("GET", "/" + token)
        answers.add((status, body))
    [(status, body)] = answers                                  # one and the same answer
    assert status == 403 and b"not valid" in body and b"kernel" not in body
    assert set(scores.kernels()) <= set(before)                 # one that idles may go
    page.goto(f"http://127.0.0.1:{scores.port}/?rater=forged")
    assert "not valid" in page.locator("body").inner_text()


DOORS = """/voila/files/rating.ipynb /voila/files/study.sqlite /voila/files/../study.sqlite /voila/files/%2e%2e/%2e%2e/etc/passwd /voila/files//etc/passwd
    /voila/static/../../../../../../etc/passwd /voila/templates/rating/static/../index.html.j2 /voila/templates/../../static/x /voila/tree
    /voila/render/rating.ipynb /voila/api/contents /api/contents /api/kernels /api/sessions /api/terminals /study.sqlite /pictures/ /rating.ipynb
    /lab /tree /voila/execution/0-0-0-0-0 /voila/query/0-0-0-0-0"""


@pytest.mark.parametrize("path", DOORS.split())
def test_no_other_door_is_open(scores, path):
    status, headers, body = scores.ask("GET", path)
    if status == 302: status, headers, body = scores.ask("GET", headers["Location"])
    assert status in (400, 403, 404, 500) and b"SQLite format" not in body and b"root:" not in body and b"crossmodal" not in body


def test_kernels_are_not_for_the_asking(scores):
    assert [scores.ask(method, "/api/kernels")[0] for method in ("POST", "DELETE", "PUT")] == [403] * 3
    assert scores.ask("GET", f"/api/kernels/{uuid.uuid4()}")[0] == 404
    socket = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert scores.ask("GET", f"/api/kernels/{uuid.uuid4()}/channels", socket.items())[0] == 404


ALLOWED = {"comm_info_reply", "kernel_info_reply", "status", "comm_open", "comm_msg", "comm_close", "stream"}        # a kernel complains in its stream
ASKING = {
    "execute_request": lambda code: {"code": code, "silent": False, "store_history": False, "user_expressions": {"x": code}, "allow_stdin": False},
    "complete_request": lambda code: {"code": code, "cursor_pos": len(code)},
    "inspect_request": lambda code: {"code": "open", "cursor_pos": 3, "detail_level": 1},
    "is_complete_request": lambda code: {"code": code},
    "history_request": lambda code: {"hist_access_type": "tail", "n": 99, "output": True, "raw": True},
    "debug_request": lambda code: {"type": "request", "seq": 1, "command": "evaluate", "arguments": {"expression": code}},
    "create_subshell_request": lambda code: {},
    "input_reply": lambda code: {"value": code},
    "interrupt_request": lambda code: {},
    "shutdown_request": lambda code: {"restart": True},
}


class Line:
    "A socket to a kernel, spoken to without a browser and without manners."

    def __init__(self, server, kernel, protocol):
        import websocket
        address = f"ws://127.0.0.1:{server.port}/api/kernels/{kernel}/channels?session_id=x"
        self.socket, self.protocol = websocket.create_connection(address, timeout=90, subprotocols=[protocol] if protocol else []), protocol

    def send(self, kind, content, channel, header=None):
        from jupyter_server.services.kernels.connection.base import serialize_msg_to_ws_v1
        usual = {"msg_id": uuid.uuid4().hex, "username": "", "session": "x", "msg_type": kind, "version": "5.3", "date": "2026-01-01T00:00:00Z"}
        message = {"header": header or usual, "parent_header": {}, "metadata": {}, "content": content, "buffers": []}
        pack = lambda part: part if isinstance(part, bytes) else json.dumps(part).encode()
        if self.protocol: self.socket.send_binary(serialize_msg_to_ws_v1(message, channel, pack))
        else: self.socket.send(json.dumps({**message, "channel": channel}))

    def heard_until(self, reply):
        "The kinds of messages that come, up to a reply."
        from jupyter_server.services.kernels.connection.base import deserialize_binary_message, deserialize_msg_from_ws_v1
        kinds = []
        while reply not in kinds:
            frame = self.socket.recv()
            if self.protocol: header = json.loads(deserialize_msg_from_ws_v1(frame)[1][0])
            else: header = (json.loads(frame) if isinstance(frame, str) else deserialize_binary_message(frame))["header"]
            kinds.append(header["msg_type"])
        return kinds


@pytest.mark.parametrize("protocol", ["", "v1.kernel.websocket.jupyter.org"])
def test_a_rater_cannot_execute_code(scores, tmp_path, protocol):
    "What Voila lets through to a kernel: messages of widgets, and nothing that runs code, on no channel of either protocol."
    page = urlopen(scores.link(6)).read().decode()              # a rater with a valid link
    kernel = re.search(r'"kernelId": "([-0-9a-f]+)"', page)[1]
    line, mark = Line(scores, kernel, protocol), tmp_path / "owned"
    code = f"open({str(mark)!r}, 'w').write('owned')"
    for channel in ("shell", "control", "stdin", "iopub"):
        for kind, content in ASKING.items(): line.send(kind, content(code), channel)
    if protocol:                                                # two types in one header: whoever checks must read the same one as whoever obeys
        for first, second in (("execute_request", "comm_msg"), ("comm_msg", "execute_request")):
            header = f'{{"msg_id": "a", "session": "x", "username": "", "version": "5.3", "msg_type": "{first}", "msg_type": "{second}"}}'
            line.send("", ASKING["execute_request"](code), "shell", header.encode())
    heard = []
    for channel, kind in (("control", "kernel_info"), ("shell", "kernel_info"), ("shell", "comm_info")):
        line.send(f"{kind}_request", {}, channel)               # which does come through, after whatever came before it
        heard += line.heard_until(f"{kind}_reply")
    assert not mark.exists()
    assert set(heard) <= ALLOWED and heard.count("kernel_info_reply") == 2
    line.socket.close()


# A crowd, and a server that dies


ANSWERED_OR_NEW = f"n => {READY} && (parseInt(document.querySelector('.xm-progress')?.innerText) > n || !window.pressed)"


def reload(page):
    "A page that begins to reload by itself at this very moment ends our reload, which is as good."
    from playwright.sync_api import Error
    try: page.reload(wait_until="commit")
    except Error as error:
        if "ERR_ABORTED" not in str(error): raise


def test_many_raters_at_once_lose_nothing_when_the_server_is_killed(chromium, tmp_path):
    raters, kills = (10, 5) if CROWD >= 1000 else (3, 1)
    each = CROWD // raters
    items = [Item(f"sentence {k}", {SECRET: dots(1 + k % 9)}) for k in range(each)]
    server, started = Server(create_study(tmp_path / "sheet", "scores", items, raters, share=0, seed=2)), time.monotonic()
    context = chromium.new_context(viewport={"width": 800, "height": 900})
    context.set_default_timeout(300_000)
    pages = {rater: context.new_page() for rater in server.tokens}
    try:
        for rater, page in pages.items(): enter(page, server, rater)
        deaths, shown = {(k + 1) * each // (kills + 1) for k in range(kills)}, dict.fromkeys(pages, 0)
        while min(shown.values()) < each:
            busy = {rater: page for rater, page in pages.items() if shown[rater] < each}
            for rater, page in busy.items():                    # all press, then all look
                number = int(page.locator(".xm-text").inner_text().split()[1])
                page.evaluate("window.pressed = true")
                page.keyboard.press(str(1 + (7 * number + rater) % 4))
            if max(shown.values()) in deaths:                   # no answer has been waited for
                deaths.discard(max(shown.values()))
                server.kill()
                server.start()
                for page in list(busy.values())[::2]: reload(page)          # the others notice by themselves
            for rater, page in busy.items():
                page.wait_for_function(ANSWERED_OR_NEW, arg=shown[rater])
                assert answered(page) in (shown[rater], shown[rater] + 1)   # what was shown as saved is saved
                shown[rater] = answered(page)
        seconds = time.monotonic() - started
        with Study(server.study) as study:
            rows = list(map(tuple, study.db.execute("SELECT rater, text, value, turn FROM answer JOIN item USING (item)")))
            clicks = study.db.execute("SELECT COUNT(*) FROM click").fetchone()[0]
        assert len(rows) == raters * each == clicks and {turn for *_, turn in rows} == {1}                  # none lost, none doubled
        assert all(value == 1 + (7 * int(text.split()[1]) + rater) % 4 for rater, text, value, _ in rows)   # and each is the rater's own
        assert all("Thank you" in page.locator(".xm-question").inner_text() for page in pages.values())
        print(f"\n{len(rows)} ratings by {raters} raters with {kills} kills of the server in {seconds:.0f} s")
    finally:
        context.close()
        server.stop()
