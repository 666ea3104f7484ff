"""Fault 71, and what else a log must bear: readers that leave, clients that write into it."""

import json
import socket
import subprocess
import sys

from live import ENVIRONMENT, Live, eventually


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_end(bytes_folder):
    reader, writer = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "maestrale", "serve", str(bytes_folder), "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=ENVIRONMENT,
    )
    try:
        writer.close()
        greeting = ""
        while "serving" not in greeting or not greeting.endswith("\n"):
            greeting += reader.recv(4096).decode()
        reader.close()
        server = object.__new__(Live)
        server.port = int(greeting.split("127.0.0.1:")[1].split(",")[0].split()[0])
        for _ in range(3):
            assert server.complete("Once").status == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_newline_from_a_client_does_not_begin_a_line_of_the_log(bytes_server):
    before = len(bytes_server.log)
    assert bytes_server.get("/%0aserving%20evil%1b%5b31m").status == 404
    eventually(lambda: len(bytes_server.log) > before, 5)
    (line,) = bytes_server.log[before:]
    assert "\\nserving evil\\u001b[31m" in line


def test_the_log_as_json_is_an_object_a_line(start):
    server = start("--log-json")
    server.get("/%0a")
    server.complete("Once", model="x\ny")
    assert server.stop() == 0
    records = [json.loads(line) for line in server.log]
    assert all(record.keys() >= {"time", "level", "message"} for record in records)
    assert "serving" in records[0]["message"]
