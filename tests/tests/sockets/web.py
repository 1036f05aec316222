"""A web server of this directory's files: web.py PORT."""

import http.server
import socket
import socketserver
import sys


# http.server.HTTPServer would ask for the name of its address, and there is nobody who knows it.
class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6


Server(("::", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
