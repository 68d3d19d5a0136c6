"""lab/serve.py: programs that know OpenAI's API get the stories of sample.py."""
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import sample
from common.runs import load_run
from lab import serve
from sample import write_stories

PROMPT = "Once upon a time Lily"
SETTINGS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 20, "seed": 1}


@pytest.fixture
def port(run, in_prepared, monkeypatch):
    """The port of a server with a run, which works in a thread."""
    model, _, encoding = load_run(run)
    servers = []

    class Recorded(serve.Server):
        def serve_forever(self, *args):
            servers.append(self)
            started.set()
            super().serve_forever(0.02)
    monkeypatch.setattr(serve, "Server", Recorded)
    started = threading.Event()
    thread = threading.Thread(target=serve.serve, args=(0, "out/a", model, encoding, "", dict(SETTINGS)))
    thread.start()
    started.wait(10)
    yield servers[0].server_port
    servers[0].shutdown()
    thread.join()


def post(port, request, path="/v1/chat/completions"):
    """(status, body) of a request; the body is text if it is streamed, else JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, request if isinstance(request, str) else json.dumps(request))
    reply = connection.getresponse()
    body = reply.read().decode()
    return reply.status, body if "event" in reply.headers["Content-Type"] else json.loads(body)


def expected(run, **changed):
    """What sample.py adds to PROMPT."""
    model, _, encoding = load_run(run)
    settings = {**SETTINGS, **changed}
    ids, = write_stories(model, encoding, PROMPT, settings.pop("max_tokens"), [settings.pop("seed")], **settings)
    return encoding.decode(ids).removeprefix(PROMPT)


@pytest.mark.parametrize("changed", [
    {"seed": 1}, {"seed": 1, "temperature": 0, "max_tokens": 12}, {"seed": 7, "top_p": 0.5}])
def test_both_interfaces_and_streams_give_the_story_of_sample_py(run, port, changed):
    text = expected(run, **changed)
    status, reply = post(port, {"messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": PROMPT}],
                                **changed})
    assert status == 200 and reply["choices"][0]["message"]["content"] == text
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == changed.get("max_tokens", 20)
    status, reply = post(port, {"prompt": PROMPT, **changed}, "/v1/completions")
    assert status == 200 and reply["choices"][0]["text"] == text
    status, body = post(port, {"messages": [{"role": "user", "content": PROMPT}], "stream": True, **changed})
    *events, done = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    pieces = [json.loads(event)["choices"][0]["delta"]["content"] for event in events]
    assert done == "[DONE]" and "".join(pieces) == text and len(pieces) > 10


def test_a_prompt_may_be_a_list_of_parts_and_each_request_gets_another_story(port):
    request = {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], "n": None}
    first, second = (post(port, request)[1]["choices"][0]["message"]["content"] for _ in range(2))
    assert first != second and post(port, {**request, "seed": 1})[1]["choices"][0]["message"]["content"] == first


def test_a_finished_story_ends_with_stop(port, monkeypatch):
    monkeypatch.setattr(serve, "write_story", lambda *args, **settings: iter([" slept", "."]))
    _, reply = post(port, {"messages": [{"role": "user", "content": PROMPT}]})
    assert reply["choices"][0]["finish_reason"] == "stop" and reply["choices"][0]["message"]["content"] == " slept."


@pytest.mark.parametrize("request_, path", [
    ("{", "/v1/completions"), ("[1]", "/v1/completions"), ({}, "/v1/completions"),
    ({"prompt": [1, 2]}, "/v1/completions"),
    ({"messages": []}, "/v1/chat/completions"), ({"messages": [{"content": None}]}, "/v1/chat/completions"),
    ({"prompt": "a", "max_tokens": 10**9}, "/v1/completions"), ({"prompt": "a", "temperature": -1}, "/v1/completions"),
    ({"prompt": "a", "temperature": float("nan")}, "/v1/completions"), ({"prompt": "a", "n": 2}, "/v1/completions"),
    ({"prompt": "a" * 70_000}, "/v1/completions"), ({"prompt": "a"}, "/etc/passwd"), ("[" * 60_000, "/v1/completions"),
    ({"prompt": "a"}, "/v1/completions/../../etc"),
    ({"prompt": "a", "stream": "false"}, "/v1/completions"),
    ({"prompt": "a", "seed": True}, "/v1/completions")])
def test_a_request_that_cannot_be_answered_is_refused_and_the_next_is_answered(port, request_, path):
    status, reply = post(port, request_, path)
    assert status == 400 and reply["error"]["message"]
    assert post(port, {"prompt": PROMPT, "max_tokens": 1}, "/v1/completions")[0] == 200


def test_a_silent_connection_keeps_nobody_waiting(port):
    with socket.create_connection(("127.0.0.1", port)):
        assert post(port, {"prompt": PROMPT, "max_tokens": 1}, "/v1/completions")[0] == 200


def test_a_client_that_leaves_ends_its_story_only(port, monkeypatch, capfd):
    written = []

    def long_story(*args, **settings):
        for number in range(10**6):
            written.append(number)
            yield " word" * 1000
    with monkeypatch.context() as patch:
        patch.setattr(serve, "write_story", long_story)
        client = socket.create_connection(("127.0.0.1", port))
        body = json.dumps({"prompt": PROMPT, "stream": True})
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        client.recv(1000)
        client.close()
        for _ in range(100):
            before = len(written)
            time.sleep(0.05)
            if len(written) == before:
                break
    assert 0 < len(written) == before < 10**6, "it went on writing"
    assert post(port, {"prompt": PROMPT, "max_tokens": 1}, "/v1/completions")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_openai_library_and_the_command_line(run, in_prepared):
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, sample.__file__, run, f"--serve={port}", "--max_tokens=20", "--device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"127.0.0.1:{port}/v1" in process.stdout.readline()
        client = openai.OpenAI(api_key="any", base_url=f"http://127.0.0.1:{port}/v1", timeout=20)
        assert client.models.list().data[0].id == run
        reply = client.chat.completions.create(model="any", messages=[{"role": "user", "content": PROMPT}])
        assert reply.choices[0].message.content == expected(run)
        chunks = client.completions.create(model="any", prompt=PROMPT, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected(run, temperature=0)
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
