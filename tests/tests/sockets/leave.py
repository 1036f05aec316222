"""A process that connects a UDP socket, and then is in the network namespace of its parent: leave.py ADDRESS PORT.

It prints a line when it is there, and waits for one.
"""

import ctypes
import os
import socket
import sys

CLONE_NEWNET = 0x40000000

address, port = sys.argv[1], int(sys.argv[2])
client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
client.connect((address, port))
parent = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
if ctypes.CDLL(None, use_errno=True).setns(parent, CLONE_NEWNET) != 0:
    raise OSError(ctypes.get_errno(), "setns")
print("left", flush=True)
sys.stdin.readline()
