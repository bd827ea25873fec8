"""A process that answers a custodian as compute does, with an array of the test's own."""

from __future__ import annotations

import socket
import subprocess
import sys

from sequester.client.gate.custodian import Custodian
from sequester.client.socket import Channel

# answers each question after some seconds with an array that may depend on the step that was asked for
SLOW = """
import socket, sys, time
import numpy as np
from sequester.client.socket import Channel
from sequester.protocols import arrays
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
while True:
    letter = channel.receive()
    time.sleep(float(sys.argv[2]))
    step = letter.header["step"]
    channel.send("contribution", payload=arrays.encode({"step": eval(sys.argv[3])}))
"""


def slow() -> Custodian:
    return answering("np.array([float(step)])", 1.0)


def answering(what: str, after_s: float = 0.0) -> Custodian:
    """A process that answers each question with one array, `step`."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", SLOW, str(theirs.fileno()), str(after_s), what]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    return Custodian(process, Channel(ours), False)
