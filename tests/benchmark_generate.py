"""How fast generate.py takes in answers: PYTHONPATH=. python tests/benchmark_generate.py"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from test_generate import SCRIPT, Server


def generate_stories(n=5000, concurrency=64):
    """(stories per second, start included; peak memory in MiB) of a run against a server on loopback."""
    letters = "abcdefghijklmnopqrst"
    words = {kind: {"all": [kind[0] + letter for letter in letters]} for kind in ("verbs", "nouns", "adjectives")}
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        with open(os.path.join(folder, "words.json"), "w") as file:
            json.dump(words, file)
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, SCRIPT, f"--base_url={server.url}", "--model=writer", "--words=words.json", f"--n={n}",
             f"--concurrency={concurrency}"], cwd=folder, env=environment, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    assert f"{n:,} stories, 0 given up; 0 answers rejected" in out.stdout
    return n / seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


if __name__ == "__main__":
    print("{:.0f} stories/s, {:.0f} MiB at its peak".format(*generate_stories()))
