"""Opens the way to a device: a Unix socket, TLS with a certificate on both sides, or a socket through ssh."""

from __future__ import annotations

import asyncio
import concurrent.futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from edgellm.client._credentials import credentials
from edgellm.client._ssh import CONNECT_S, Tunnel
from edgellm.devices import Device, DeviceBook
from edgellm.errors import DeviceUnreachableError

# A board is never behind the proxy that the environment names for the web.
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_http_proxy", 0),
    # A link that swallows everything is found out while a call waits, not by the call's deadline.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Otherwise gRPC waits up to two minutes before it tries a device again that was away.
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
# A call that met ssh while it died must not keep gRPC from dialling once ssh has connected again.
_TUNNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
_METHODS = (
    "intercept_unary_unary",
    "intercept_unary_stream",
    "intercept_stream_unary",
    "intercept_stream_stream",
)


def resolved(device: str | Device) -> Device:
    """The device of that name in `devices.toml`, or the one given; raises UnknownDeviceError."""
    return DeviceBook().find(device) if isinstance(device, str) else device


class Way:
    """The channel of a blocking client, and what it goes through.

    Args:
        to: An address, or a device with the files to use.
        ssh_config: Configuration file for ssh; None means the user's.

    Raises EdgellmError if the address is malformed or a TLS file cannot be used.
    """

    def __init__(self, to: str | Device, ssh_config: Path | None = None) -> None:
        device = Device(to, to) if isinstance(to, str) else to
        self.target = device.target
        self._tunnel: Tunnel | None = None
        self.channel: grpc.Channel
        if device.over == "unix":
            self.channel = grpc.insecure_channel(self.target, options=_OPTIONS)
        elif device.over == "tls":
            secrets, options = credentials(device)
            self.channel = grpc.secure_channel(self.target, secrets, options=(*_OPTIONS, *options))
        else:
            self._tunnel = Tunnel(self.target, ssh_config)
            channel = grpc.insecure_channel(
                f"unix:{self._tunnel.socket}", options=(*_OPTIONS, *_TUNNEL_OPTIONS)
            )
            self.channel = grpc.intercept_channel(channel, _interceptor(self._tunnel))

    def close(self) -> None:
        """Ends what runs on the channel, and ssh."""
        self.channel.close()
        if self._tunnel is not None:
            self._tunnel.close()


class AsyncWay:
    """The channel of an asyncio client; the twin of `Way`."""

    def __init__(self, to: str | Device, ssh_config: Path | None = None) -> None:
        device = Device(to, to) if isinstance(to, str) else to
        self.target = device.target
        self._tunnel: Tunnel | None = None
        if device.over == "unix":
            self.channel = grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        elif device.over == "tls":
            secrets, options = credentials(device)
            self.channel = grpc.aio.secure_channel(self.target, secrets, options=(*_OPTIONS, *options))
        else:
            self._tunnel = Tunnel(self.target, ssh_config)
            self.channel = grpc.aio.insecure_channel(
                f"unix:{self._tunnel.socket}",
                options=(*_OPTIONS, *_TUNNEL_OPTIONS),
                interceptors=_async_interceptors(self._tunnel),
            )

    async def close(self) -> None:
        """Ends what runs on the channel, and ssh."""
        await self.channel.close()
        if self._tunnel is not None:
            await asyncio.to_thread(self._tunnel.close)


# gRPC has an interface for each of the four kinds of call; what goes before a call is the same for all.


def _interceptor(tunnel: Tunnel) -> Any:
    """Has the tunnel stand before a call begins."""

    def intercept(_self: object, continuation: Any, details: Any, request: Any) -> Any:
        try:
            tunnel.ready().result(details.timeout)
        except concurrent.futures.TimeoutError:
            raise _late(tunnel) from None
        return continuation(details, request)

    kinds = (
        grpc.UnaryUnaryClientInterceptor,
        grpc.UnaryStreamClientInterceptor,
        grpc.StreamUnaryClientInterceptor,
        grpc.StreamStreamClientInterceptor,
    )
    return type("Through", kinds, dict.fromkeys(_METHODS, intercept))()


def _async_interceptors(tunnel: Tunnel) -> list[Any]:
    """Have the tunnel stand before a call begins; grpc.aio takes one object for each kind of call."""

    async def intercept(_self: object, continuation: Any, details: Any, request: Any) -> Any:
        try:
            await asyncio.wait_for(asyncio.wrap_future(tunnel.ready()), details.timeout)
        except asyncio.TimeoutError:
            raise _late(tunnel) from None
        return await continuation(details, request)

    kinds = (
        grpc.aio.UnaryUnaryClientInterceptor,
        grpc.aio.UnaryStreamClientInterceptor,
        grpc.aio.StreamUnaryClientInterceptor,
        grpc.aio.StreamStreamClientInterceptor,
    )
    return [
        type("AsyncThrough", (kind,), {method: intercept})()
        for kind, method in zip(kinds, _METHODS, strict=True)
    ]


def _late(tunnel: Tunnel) -> DeviceUnreachableError:
    return DeviceUnreachableError(
        f"cannot reach {tunnel.target}: ssh has not connected in time",
        f"allow more time: ssh itself gives up after {CONNECT_S:g} s and says why",
    )
