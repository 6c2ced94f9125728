"""A server under 50 clients at once and under one: texts, requests a second, and CPU seconds of the server.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    python benchmarks/serve.py RUN                                # one minute

The recordings are test utterances of the embedded corpus. Their texts are compared with those of task=transcribe.
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow.parquet

from sedtrain.data.paths import EMBEDDED

ROUTE = "/v1/audio/transcriptions"
BOUNDARY = "sedtrain-benchmark"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
CONNECTION = threading.local()


def recordings(folder, number):
    """The first test utterances as files."""
    rows = pyarrow.parquet.ParquetFile(EMBEDDED / "test.parquet").iter_batches(1)
    for row, batch in enumerate(islice(rows, number)):
        file = folder / f"{row:03}.opus"
        file.write_bytes(batch.to_pylist()[0]["audio"]["bytes"])
        yield file


def command(run, *overrides):
    return [sys.executable, "-m", "sedtrain", f"checkpoint={run}", *overrides]


def transcribed(run, folder, *overrides):
    """Texts of task=transcribe by the names of files."""
    transcribe = command(run, "task=transcribe", f"audio={folder}", *overrides)
    out = subprocess.run(transcribe, capture_output=True, text=True, check=True).stdout
    lines = (line.partition("\t") for line in out.splitlines())
    return {Path(path).name: text for path, _, text in lines}


def started(run, *overrides):
    """The process of a server, and its port."""
    server = subprocess.Popen(command(run, "task=serve", "serve.port=0", *overrides), stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if found := re.search(r"is served at http://127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(found[1])
    raise SystemExit("the server did not start")


def body_of(file):
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{file.name}"\r\n\r\n'.encode()
    return part + file.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()


def text_of(port, body):
    if getattr(CONNECTION, "port", None) != port:
        CONNECTION.port, CONNECTION.open = port, http.client.HTTPConnection("127.0.0.1", port)
    CONNECTION.open.request("POST", ROUTE, body, HEADERS)
    answer = CONNECTION.open.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {content.decode()}")
    return json.loads(content)["text"]


def cpu_seconds(process):
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measured(server, port, bodies, num_clients):
    """Texts in order; requests a second, and CPU milliseconds of the server for each."""
    with ThreadPoolExecutor(num_clients) as clients:
        cpu, start = cpu_seconds(server), time.perf_counter()
        texts = list(clients.map(lambda body: text_of(port, body), bodies))
        seconds, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu
    return texts, len(bodies) / seconds, 1000 * cpu / len(bodies)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training on the embedded corpus")
    parser.add_argument("overrides", nargs="*", help="of both tasks, such as decoding=beam")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--recordings", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = list(recordings(Path(name), options.recordings))
        expected = transcribed(options.run, name, *options.overrides)
        server, port = started(options.run, *options.overrides)
        bodies, found = [body_of(file) for file in files], {1: [], options.clients: []}
        measured(server, port, bodies, 2)  # warms up
        for _ in range(options.rounds):
            for num_clients, rounds in found.items():
                texts, *figures = measured(server, port, bodies, num_clients)
                different = sum(text != expected[file.name] for text, file in zip(texts, files, strict=True))
                rounds.append(figures)
                print(f"{num_clients} clients: {figures[0]:.1f} requests/s, {figures[1]:.1f} ms", end=", ")
                print(f"{different} of {len(texts)} texts differ", flush=True)
        fastest = {number: max(rate for rate, _ in rounds) for number, rounds in found.items()}
        least = {number: min(cpu for _, cpu in rounds) for number, rounds in found.items()}
        for number in found:
            print(f"best with {number}: {fastest[number]:.1f} requests/s, {least[number]:.1f} ms of CPU each")
        print(
            f"{fastest[options.clients] / fastest[1]:.2f} times as fast, {least[1] / least[options.clients]:.2f} by CPU"
        )
        server.send_signal(signal.SIGINT)
        print(f"the server ended with status {server.wait(30)}")


if __name__ == "__main__":
    main()
