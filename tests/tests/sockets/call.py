"""A process that calls a service: call.py tcp|connected|unconnected ADDRESS PORT COUNT.

For each call it prints who answers, and whom the process is shown as its peer; or the error.
"""

import errno
import socket
import sys

kind, address, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ":" in address else socket.AF_INET

for _ in range(count):
    with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        try:
            if kind == "unconnected":
                client.sendto(b"who?", (address, port))
                answer, peer = client.recvfrom(100)
            else:
                client.connect((address, port))
                if kind == "connected":
                    client.send(b"who?")
                answer = client.recv(100)
                peer = client.getpeername()
            print(answer.split()[0].decode(), peer[0], peer[1])
        except OSError as error:
            print(errno.errorcode.get(error.errno, error))
