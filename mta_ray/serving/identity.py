"""Who a user is: a name within a tenant, any Unicode up to a length, compared by code points, never a path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DEFAULT_TENANT = "default"
"""Of users, and of banks' anchors, where nobody says otherwise."""
TENANT_CHARS_MAX = 64
ID_CHARS_MAX = 256
"""Four bytes each at most: together with the tenant it fits an index entry of PostgreSQL (2,700 bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class UserId:
    """A user, or an anchor, which is a user too."""

    tenant: str
    id: str

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant", TENANT_CHARS_MAX)
        check_name(self.id, "user id", ID_CHARS_MAX)

    @property
    def digest(self) -> bytes:
        """What may be kept of a user who is gone: a hash from which the name cannot be read."""
        return hashlib.sha256(f"{self.tenant}\0{self.id}".encode()).digest()


def check_name(name: str, what: str, chars_max: int) -> None:
    """Raise ValueError for a name that is empty, too long, or no text that every database and client can hold."""
    if not 0 < len(name) <= chars_max:
        raise ValueError(f"{what} has {len(name)} characters, wanted 1 to {chars_max}")
    if "\0" in name or "\n" in name:
        raise ValueError(f"{what} holds a NUL character or a line break; leave it out")
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise ValueError(f"{what} holds half a surrogate pair; send valid Unicode")
