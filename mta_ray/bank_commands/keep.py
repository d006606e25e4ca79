"""`mta bank verify`, `mta bank import` and `mta bank prune`: what is in a bank store stays whole, and not for ever."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass

from mta_ray.bank_commands.place import BankPlace
from mta_ray.lora.bank_check import problems_of
from mta_ray.lora.bank_store import BankStore
from mta_ray.object_store import told
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_existing


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyBankConfig(BankPlace):
    """Look into every file of a bank, where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportBankConfig:
    """Take a bank into a store, as a version that never changes."""

    bank: str
    """Folder or URL of the bank."""
    store: str
    """The bank store: a folder, or an fsspec URL such as s3://bucket/banks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneBanksConfig:
    """Remove old versions from a bank store, for good."""

    store: str
    """The bank store."""
    keep: int
    """So many of the newest versions stay."""
    database: str | None = None
    """The service's store, a file or URL: no bank that is published there is removed. None: nobody is asked."""
    dry_run: bool = False
    """Only say what would go."""
    json: bool = False
    """Print JSON instead of text."""


def verify_bank(config: VerifyBankConfig) -> str:
    """One line where checksums, shapes and values are right. Raises ValueError that lists everything that is not."""
    path = config.path
    if problems := problems_of(path):
        many = f"{len(problems)} things are wrong" if len(problems) > 1 else "one thing is wrong"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{told(path)}: {many}; build or import the bank again\n{listed}")
    return f"{told(path)} is whole: checksums, shapes and values are right"


def import_bank(config: ImportBankConfig) -> str:
    """Where the bank lies now. A damaged one is not taken, and one that is there already changes nothing."""
    if problems := problems_of(config.bank):
        raise ValueError(f"{told(config.bank)} is damaged and was not taken: {problems[0]} (mta bank verify lists all)")
    store = BankStore(config.store)
    version, is_new = store.put(config.bank)
    return f"{told(store.path(version))}{'' if is_new else ' (it was there already)'}"


def prune_banks(config: PruneBanksConfig) -> str:
    """What was removed, or with `dry_run` would be."""
    store = BankStore(config.store)
    published: set[str] = set()
    if config.database is not None:
        with closing(open_existing(DatabaseConfig(url=config.database))) as database:
            banks = Banks(database)
            published = {banks.get(version).bank.hash for version in banks.versions()}
    leaving = store.to_prune(config.keep, published=published)
    for one in leaving if not config.dry_run else ():
        store.remove(one.version)
    if config.json:
        return json.dumps({"is_dry_run": config.dry_run, "removed": [one.version for one in leaving]}, indent=1)
    verb = "would be removed" if config.dry_run else "removed"
    size_mib = sum(one.manifest.bytes for one in leaving) / 2**20
    lines = [f"{one.version}  {one.manifest.created_at}  {verb}" for one in leaving]
    return "\n".join([*lines, f"{len(leaving)} versions {verb}, {size_mib:,.1f} MiB"])
