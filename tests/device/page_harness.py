"""Asking the page of `--serve`."""

import http.client
import socket

LOOPBACK = "127.0.0.1"


def ask(address, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(LOOPBACK, address.port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def raw(address, data, wait_s=20):
    with socket.create_connection((LOOPBACK, address.port), timeout=wait_s) as client:
        client.sendall(data)
        return read_all(client)


def read_all(client):
    return b"".join(iter(lambda: client.recv(65536), b""))
