"""An HTTP server that does nothing, to see how true the load generators are.

    python benchmarks/serving/empty.py PORT [STALL_MS EVERY_MS]

It answers what ends a request's head with a fixed body, in one thread. With the last two arguments it stands still for
STALL_MS in every EVERY_MS: what clients must then measure follows by arithmetic.
"""

import select
import socket
import sys
import time

BODY = b'{"class_id":[0]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
LENGTH = b"Content-Length: "


def whole(received: bytes) -> bool:
    """Whether a request is complete."""
    head, end, body = received.partition(b"\r\n\r\n")
    return bool(end) and len(body) >= int(head.partition(LENGTH)[2].partition(b"\r\n")[0] or 0)


def serve(port: int, stall_s: float, every_s: float) -> None:
    """Answer until the process is ended."""
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    clients: dict[int, tuple[socket.socket, bytes]] = {}
    while True:
        left = stall_s - time.monotonic() % every_s if every_s else 0.0
        time.sleep(max(0.0, left))
        for number, _ in epoll.poll(0.001 if every_s else -1):
            if number == listener.fileno():
                client = listener.accept()[0]
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                epoll.register(client, select.EPOLLIN)
                clients[client.fileno()] = client, b""
                continue
            client, before = clients[number]
            try:
                received = client.recv(65536)
            except OSError:
                received = b""
            if not received:
                epoll.unregister(client)
                clients.pop(number)[0].close()
            elif whole(before + received):
                client.sendall(ANSWER)
                clients[number] = client, b""
            else:
                clients[number] = client, before + received


if __name__ == "__main__":
    stall, every = (float(argument) / 1000 for argument in sys.argv[2:4]) if len(sys.argv) > 2 else (0.0, 0.0)
    serve(int(sys.argv[1]), stall, every)
