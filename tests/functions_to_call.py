"""What a user might name as a scorer, good and bad."""

from __future__ import annotations

import os
import sys
import time
from fractions import Fraction

import embedgrad as eg

CALLS: list[str] = []


def same(reply: str, answer: str) -> bool:
    return reply.strip() != "" and reply == answer


def share(reply: str, answer: str) -> Fraction:
    """Of the answer's words, those that the reply holds."""
    words = answer.split()
    return Fraction(sum(word in reply.split() for word in words), len(words))


def loud(reply: str, answer: str) -> int:
    print('{"value": 0.25}', flush=True)
    os.write(1, b'{"value": 0.25}\n')
    sys.stderr.write(f"seen {reply!a}\n")
    return int(reply == answer)


def count(reply: str, answer: str) -> float:
    """The reply is how often this process was called, in hundredths."""
    CALLS.append(reply)
    return len(CALLS) / 100


def curious(reply: str, answer: str) -> bool:
    return input(reply) == answer


def careless(reply: str, answer: str) -> bool:
    return float(reply) == float(answer)


def unprintable(reply: str, answer: str) -> bool:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise Silent


def lines(reply: str, answer: str) -> bool:
    raise KeyError("one\ntwo \x1b[31m \ud800 " + "x" * 10_000)


def quits(reply: str, answer: str) -> bool:
    sys.exit(3)


def dies(reply: str, answer: str) -> bool:
    os._exit(3)


def slow(reply: str, answer: str) -> bool:
    """Sleeps for as many seconds as the reply says."""
    time.sleep(float(reply))
    return True


def stuck(reply: str, answer: str) -> bool:
    """Holds the interpreter's lock, so that nothing else in its process runs."""
    return len(str(7**10**8)) > 0 if reply == "stuck" else True


def forks(reply: str, answer: str) -> bool:
    """Starts a copy of its process; both sleep for as many seconds as the reply says."""
    if reply != "0":
        os.fork()
    time.sleep(float(reply))
    return True


def value(reply: str, answer: str) -> object:
    """Something that is no score."""
    return {"none": None, "text": "1", "two": 2, "less": -0.1, "nan": float("nan")}[reply]


@eg.scorer
def close_enough(reply: str, answer: str) -> float:
    return 1.0 / (1.0 + abs(float(reply) - float(answer)))


NUMBER = 3
