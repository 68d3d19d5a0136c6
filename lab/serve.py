"""Answer requests as OpenAI's API does, so that other programs can talk to a run: python sample.py out/a --serve=8000

For one user: only programs of this machine can send requests, and they are answered one after the other. A model of
stories does not chat: it continues the prompt, or the last message.
"""
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.ask import text_of
from sample import write_story

LONGEST = 1 << 16  # bytes of a request
RANGES = {"max_tokens": (1, 4096), "temperature": (0, 100), "top_p": (0.01, 1), "seed": (0, 2**31)}


def read_request(request, is_chat):
    """(prompt, settings) of a request, a dict of parameters. Raises ValueError if something in it cannot be done."""
    messages = request.get("messages") if is_chat else [{"content": request.get("prompt")}]
    content = messages[-1].get("content") if isinstance(messages, list) and messages else None
    prompt = text_of(content)  # it may be a list of parts
    if content is None:
        raise ValueError("the last message, or the prompt, must be one text")
    if (request.get("n") or 1) != 1 or request.get("stop"):
        raise ValueError("one story is written at a time, and to its end: leave out n and stop")
    settings = {name: request[name] for name in RANGES if request.get(name) is not None}
    if request.get("max_completion_tokens") is not None:
        settings["max_tokens"] = request["max_completion_tokens"]
    for name, value in settings.items():
        low, high = RANGES[name]
        types = (int, float) if name in ("temperature", "top_p") else (int,)
        if type(value) not in types or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low} to {high}")
    return prompt, settings


class Handler(BaseHTTPRequestHandler):
    """One request."""
    timeout = 30  # seconds for a client to send its request, or to read on

    def do_GET(self):
        if self.path.rstrip("/").endswith("/models"):
            self.reply(200, {"object": "list", "data": [{"id": self.server.run, "object": "model"}]})
        else:
            self.reply(404, {"error": {"message": "there is only /v1/models to get", "type": "invalid_request_error"}})

    def do_POST(self):
        is_chat = self.path.endswith("/chat/completions")
        try:
            length = int(self.headers.get("Content-Length", 0))
            if not self.path.endswith("/completions") or not 0 < length <= LONGEST:
                raise ValueError(f"post at most {LONGEST} bytes to /v1/chat/completions or /v1/completions")
            request = json.loads(self.rfile.read(length))
            if not isinstance(request, dict) or request.get("stream") not in (None, True, False):
                raise ValueError("send a JSON object, in which stream is true or false")
            prompt, settings = read_request(request, is_chat)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # not JSON, or no object
            return self.reply(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
        if "Story:" not in prompt:
            prompt = self.server.instructions + prompt.rstrip()
        with self.server.lock:
            self.answer(prompt, {**self.server.settings, **settings}, is_chat, request.get("stream"))
            self.server.settings["seed"] += 1  # else the next request that names none would get the same story

    def answer(self, prompt, settings, is_chat, stream):
        """Write a story, and send it token by token if it is to be streamed."""
        if stream:
            self.start(200, "text/event-stream")
        text, n_tokens = "", 0
        for piece in write_story(self.server.story_model, self.server.encoding, prompt, **settings):
            text, n_tokens = text + piece, n_tokens + 1
            if stream:
                self.send_event(self.body(is_chat, "delta", piece, None))
        finish = "length" if n_tokens >= settings["max_tokens"] else "stop"
        n_prompt = len(self.server.encoding.encode_ordinary(prompt))
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_tokens, "total_tokens": n_prompt + n_tokens}
        if stream:
            self.send_event({**self.body(is_chat, "delta", "", finish), "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.reply(200, {**self.body(is_chat, "message", text, finish), "usage": usage})

    def body(self, is_chat, key, text, finish):
        """A reply, or a part of a streamed one, whose key is "delta"."""
        content = {key: {"role": "assistant", "content": text}} if is_chat else {"text": text}
        kind = "chat.completion" if is_chat else "text_completion"
        return {"id": "story", "object": f"{kind}.chunk" if is_chat and key == "delta" else kind,
                "created": int(time.time()), "model": self.server.run,
                "choices": [{"index": 0, "finish_reason": finish, **content}]}

    def send_event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.start(status, "application/json", len(body))
        self.wfile.write(body)

    def start(self, status, kind, length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:  # a stream ends where the connection does
            self.send_header("Content-Length", str(length))
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True  # a connection on which nothing is said must not keep others waiting

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # the client has gone, or is silent
            super().handle_error(request, client_address)


def serve(port, run, model, encoding, instructions, settings):
    """Answer requests on this machine until Ctrl-C. A request can change the settings, such as the temperature, and has
    the instructions before its prompt, unless it has its own."""
    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        sys.exit(f"port {port} cannot be used ({error.strerror}): choose another port")
    server.run, server.story_model, server.encoding = run, model, encoding
    server.instructions, server.settings, server.lock = instructions, settings, threading.Lock()
    print(f"{run} answers at http://127.0.0.1:{server.server_port}/v1 (--base_url of generate.py); Ctrl-C ends")
    with server:
        server.serve_forever()
