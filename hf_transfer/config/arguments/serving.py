"""Keys of `serve` and `demo`: where they listen, how requests share batches, and how large they may be."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ListenArguments:
    """Where it listens."""

    host: str = setting(
        "127.0.0.1", "address to listen on; 127.0.0.1 is reached from this machine only, 0.0.0.0 from any other"
    )
    port: int | None = setting(
        None, "port to listen on; 0 takes a free one (default: 8000 for serve, 7860 for demo)", minimum=0, maximum=65535
    )


@dataclass(frozen=True)
class ServeArguments:
    """How requests share batches."""

    batch_wait: float = setting(
        0.005, "seconds that a request waits for others to share its batch", minimum=0, maximum=10
    )


@dataclass(frozen=True)
class Limits:
    """What a request may hold, and how many may be open at once."""

    max_inputs: int = setting(256, "inputs per request, counted once for each task", above=0)
    max_characters: int = setting(100_000, "characters per text", above=0)
    max_request_mb: float = setting(20.0, "size of a request with its uploads, in MB", above=0)
    max_pixels: int = setting(25_000_000, "pixels per image, as its file says, before it is decoded", above=0)
    max_waiting: int = setting(
        128, "requests that are read or wait for their answer at once; others get status 503", above=0
    )

    @property
    def max_bytes(self) -> int:
        """Bytes per request."""
        return int(self.max_request_mb * MEGABYTE)
