"""Messages between ranks: they come whole and in their order, whoever is slow, and a peer that is gone is told of."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from maestrale.parallel.connections import Connections

LARGE = 40 << 20  # bytes: more than the kernel takes at once


class Words:
    """What ranks tell each other before they are connected."""

    def __init__(self):
        self.said, self.news = {}, threading.Condition()

    def tell(self, word, value):
        with self.news:
            self.said[word] = value.encode()
            self.news.notify_all()

    def ask(self, word):
        with self.news:
            assert self.news.wait_for(lambda: word in self.said, 10)
            return self.said[word]


def message(size, seed):
    return memoryview(np.random.default_rng(seed).bytes(size))


@contextlib.contextmanager
def ranks(count, timeout=10.0, words=None):
    words = words or Words()
    with ThreadPoolExecutor(count) as pool:
        opened = [
            pool.submit(Connections, rank, count, "127.0.0.1", timeout, words.tell, words.ask) for rank in range(count)
        ]
        ends = [one.result(20) for one in opened]
        yield ends
        list(pool.map(Connections.close, ends))


def test_every_rank_reaches_every_other():
    with ranks(4) as ends:
        for source in range(4):
            for to in set(range(4)) - {source}:
                ends[source].send(to, memoryview(bytes([source, to])))
        for to in range(4):
            for source in set(range(4)) - {to}:
                assert bytes(ends[to].receive(source)) == bytes([source, to])


def test_messages_of_all_sizes_come_whole_and_in_order_though_nobody_reads_while_they_are_sent():
    sent = [message(size, i) for i, size in enumerate([8, LARGE, 0, 3, LARGE, 1, 100_000])]
    with ranks(2) as (a, b):
        for here, there in ((a, 1), (b, 0)):  # both at once: who waited until all is taken would wait for ever
            for content in sent:
                here.send(there, content)
                here.say_alive()
        for here, there in ((a, 1), (b, 0)):
            for content in sent:
                assert here.receive(there) == content


def test_a_message_goes_where_it_should_lie_if_it_is_as_long_as_expected():
    with ranks(2) as (a, b):
        room = bytearray(5)
        a.send(1, memoryview(b"first"))
        b.receive(0, memoryview(room))
        assert room == b"first"
        a.send(1, memoryview(b"fourth"))
        with pytest.raises(ConnectionError, match="6 bytes in place of 5"):
            b.receive(0, memoryview(room))


@pytest.mark.alone
def test_a_peer_that_is_gone_is_told_of_at_once_and_what_it_had_sent_still_comes():
    with ranks(2) as (a, b), ThreadPoolExecutor(1) as pool:
        a.send(1, memoryview(b"last words"))
        b.send(0, memoryview(b"never read"))
        leaving = pool.submit(a.close)
        begun = time.monotonic()
        assert bytes(b.receive(0)) == b"last words"
        with pytest.raises(ConnectionError):
            b.receive(0)
        assert time.monotonic() - begun < 2
        b.close()
        leaving.result(10)


@pytest.mark.alone
def test_a_silent_peer_is_waited_for_as_long_as_it_was_said_and_no_longer():
    with ranks(2, timeout=0.5) as (a, b):
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            b.receive(0)
        assert 0.4 < time.monotonic() - begun < 3
        a.send(1, memoryview(b"late"))
        assert bytes(b.receive(0)) == b"late"


@pytest.mark.alone
def test_who_says_that_it_lives_is_not_given_up():
    with ranks(2, timeout=1.0) as (a, b):

        def live():
            for _ in range(6):
                time.sleep(0.4)
                a.say_alive()
            a.send(1, memoryview(b"done"))

        threading.Thread(target=live).start()
        assert bytes(b.receive(0)) == b"done"


@pytest.mark.alone
def test_a_peer_that_takes_nothing_is_told_of_when_more_is_sent():
    with ranks(2, timeout=0.5) as (a, b):
        a.send(1, message(LARGE, 0))
        time.sleep(1.5)
        with pytest.raises(TimeoutError, match="nothing has been taken"):
            a.send(1, memoryview(b"more"))
        b.close()


def test_a_stranger_who_calls_first_is_turned_away():
    words = Words()

    def call(word, value):
        if word == "address 0":
            port = int(value.split()[0])
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[0].sendall(bytes(32) + (1).to_bytes(8, "little"))  # as rank 1 would, without the secret
        Words.tell(words, word, value)

    strangers: list[socket.socket] = []
    words.tell = call
    with ranks(2, words=words) as (a, b):
        b.send(0, memoryview(b"it is me"))
        assert bytes(a.receive(1)) == b"it is me"
    strangers[0].settimeout(5)
    assert strangers[0].recv(1) == b""
    strangers[0].close()
