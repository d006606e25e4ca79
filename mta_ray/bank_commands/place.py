"""Which bank a command means: a folder or URL, or a version in a bank store."""

from __future__ import annotations

from dataclasses import dataclass

from mta_ray.lora.bank_store import BankStore


@dataclass(frozen=True, slots=True, kw_only=True)
class BankPlace:
    """One bank: `bank`, or `store` and `version`."""

    bank: str | None = None
    """Folder or URL of the bank."""
    store: str | None = None
    """Or the bank store that holds it."""
    version: str | None = None
    """And its version there; the first characters do, where no other one begins so."""

    def __post_init__(self) -> None:
        is_one = self.bank is not None and self.store is None and self.version is None
        is_other = self.bank is None and self.store is not None and self.version is not None
        if not is_one and not is_other:
            raise ValueError("which bank? give --bank PATH_OR_URL, or --store STORE and --version VERSION")

    @property
    def path(self) -> str:
        """Folder or URL of the bank that is meant."""
        if self.bank is not None:
            return self.bank
        assert self.store is not None and self.version is not None
        return BankStore(self.store).find(self.version)
