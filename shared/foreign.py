"""Requests that a web page elsewhere made a browser send: refused by both servers before anything reads them.

Both servers listen on this machine without a password, and every page a person has open may post to 127.0.0.1. Two tricks are
known. A page of another origin sends a request whose answer it cannot read, which is bad enough when sending has an effect; the
browser names the page in `Origin` and `Sec-Fetch-Site` (Fetch Standard, and W3C Fetch Metadata). Or its own name is made to point
to 127.0.0.1 (DNS rebinding), and then it may read the answers, too; but the browser still says the name in `Host`.

So a request must be addressed to a name of this machine and must not come from another site. An address of numbers cannot be
rebound and always passes. Other names: ALLOWED_HOSTS=assistant.example,inference
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
WRONG_HOST = "This service is not known by that name. Use its address, or add the name to ALLOWED_HOSTS."
OTHER_SITE = "Pages of other sites may not call this service."


def allowed_hosts(listening: str = "") -> frozenset[str]:
    """Names this machine answers to, in lower case: its own, the one it listens on, and those in ALLOWED_HOSTS."""
    more = os.environ.get("ALLOWED_HOSTS", "").split(",")
    return frozenset(name.strip().lower() for name in (*NAMES, listening, *more) if name.strip())


def refusal(headers: Mapping[str, str], allowed: frozenset[str], any_host: bool = False) -> str | None:
    """Why a request (its headers by lower-case name) is refused; None when it may pass.

    `any_host`: a token protects the service, which no page elsewhere can know, so its name does not matter. A request without a
    `Host` comes from no browser.
    """
    host = headers.get("host", "")
    name = _name(host)
    if host and not any_host and name not in allowed and not _is_address(name):
        return WRONG_HOST
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return OTHER_SITE
    if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
        return OTHER_SITE
    return None


def _name(host: str) -> str:
    """The host without its port: `localhost:8000`, `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
