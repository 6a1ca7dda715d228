"""The socket that the page is served at."""

import socket

import pytest

from lego_pipeline.app.server import listen


def test_port_0_is_any_that_is_free() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert port > 0
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port)).close()


def test_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ValueError, match=f"got 127.0.0.1:{port} .*--port {port + 1}"), listen("127.0.0.1", port):
            pass


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"`--port` must be from 0 to 65535, got {port}"), listen("127.0.0.1", port):
        pass


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="must be an address of this machine"), listen("192.0.2.1", 0):
        pass
