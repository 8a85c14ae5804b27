"""What daemons answer to a client."""

from __future__ import annotations

from typing import Any, Final

from zflake.core.layout import PRESETS, Layout
from zflake.wire.codec import Response, WireError

LAYOUT: Final = PRESETS["snowcloud"]


def hello(service: str, layout: Layout | None = LAYOUT, store_id: str | None = None) -> dict[str, Any]:
    shown = layout and layout.to_map()
    return {"service": service, "protocol": 1, "layout": shown, "store_id": store_id}


def directory(*workers: str) -> dict[str, Any]:
    return {"workers": [{"address": worker} for worker in workers]}


def result(value: Any) -> Response:
    return Response(1, None, value)


def error(code: str, retry_after_ms: int | None = None) -> Response:
    return Response(1, WireError(code, f"says {code}", retry_after_ms), None)
