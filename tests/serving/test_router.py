from __future__ import annotations

from collections import Counter

from mta_ray.serving.identity import UserId
from mta_ray.serving.router import HOMES, home_of


def test_homes_are_few_and_evenly_filled() -> None:
    """What Ray Serve keeps for each of them, it keeps for good, and a replica's users come by them."""
    users = [UserId(tenant=tenant, id=f"user-{number}") for tenant in ("acme", "other") for number in range(20_000)]
    homes = [home_of(user) for user in users]
    sizes = Counter(homes)
    assert len(sizes) <= HOMES == 4096 and max(sizes.values()) < 4 * len(users) / HOMES
    assert homes == [home_of(user) for user in users]
    assert sum(homes[at] == homes[at + 20_000] for at in range(20_000)) < 40  # of two tenants: by chance


def test_a_home_tells_no_name() -> None:
    assert all(home_of(UserId(tenant=name, id=name)).isdigit() for name in ("ann", "\U0001f600" * 64))
