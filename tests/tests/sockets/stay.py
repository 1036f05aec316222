"""A process with connected UDP sockets that asks again and again: stay.py ADDRESS PORT COUNT.

It connects a socket anew when the kernel says that it is broken, and then alone. For each line that it reads it prints a line: the
longest time in milliseconds that a socket got no answer since the last line, and who has answered last, each once.
"""

import os
import select
import socket
import sys
import time

address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Client:
    def __init__(self):
        self.heard = time.monotonic()
        self.backend = "nobody"
        self.connect()

    def connect(self):
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.connect((address, port))

    def step(self):
        try:
            while True:
                self.backend = self.socket.recv(100).split()[0].decode()
                self.heard = time.monotonic()
        except BlockingIOError:
            pass
        except ConnectionAbortedError:
            self.connect()
        self.socket.send(b"who?")


clients = [Client() for _ in range(count)]
silence = 0
while True:
    for client in clients:
        silence = max(silence, time.monotonic() - client.heard)
        client.step()
    if select.select([sys.stdin], [], [], 0.02)[0]:
        if not os.read(0, 100):
            break
        print(round(silence * 1000), *sorted({client.backend for client in clients}), flush=True)
        silence = 0
