"""The envelope: `[envelope...][b""][body]`.

A REQ socket sends the empty frame and the body; a ROUTER puts the peer's identity before them; each further
hop adds a frame.  A server keeps everything up to and including the first empty frame as it came and sends
it back before the answer.  More than `MAX_ENVELOPE` frames before the empty one, one of more than `MAX_HOP_BYTES`,
or anything but one body behind it, is not zflake's.
"""

from __future__ import annotations

from typing import Final

MAX_ENVELOPE: Final = 4
MAX_FRAMES: Final = MAX_ENVELOPE + 3
"""One more than any message has: enough to see that it is none."""
MAX_HOP_BYTES: Final = 255
"""Bytes of an envelope's frame: what a routing identity may have.  A daemon keeps the envelope until it answers."""
MAX_REQUEST_BYTES: Final = 16 * 1024
"""Bytes of the largest frame that a server takes (`ZMQ_MAXMSGSIZE`): a full bundle has two thirds of that."""
MAX_RESPONSE_BYTES: Final = 1024 * 1024
"""Bytes of the largest frame that a client takes: a full page of leases, however long their names, has a quarter."""


def split(frames: list[bytes]) -> tuple[list[bytes], bytes] | None:
    """The prefix to send back and the body; None if the frames are not `[envelope...][b""][body]`."""
    if len(frames) == 3 and not frames[1] and frames[0]:  # noqa: PLR2004  (a REQ's message, the usual one)
        return frames[:2], frames[2]
    at = len(frames) - 2
    if (
        0 <= at <= MAX_ENVELOPE
        and not frames[at]
        and all(0 < len(hop) <= MAX_HOP_BYTES for hop in frames[:at])
    ):
        return frames[:-1], frames[-1]
    return None
