"""The tables as queries see them. Their making is `migrations`, and a test compares the two."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

users = sa.Table(
    "users",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("valid_from", sa.BigInteger, nullable=False),
    sa.Column("items", sa.Integer, nullable=False),
    sa.Column("history_bytes", sa.BigInteger, nullable=False),
    sa.Column("history_digest", sa.LargeBinary, nullable=False),
    sa.Column("encoder", sa.Text, nullable=False),
    sa.Column("sum_items", sa.Integer, nullable=False),
    sa.Column("item_sum", sa.LargeBinary, nullable=False),
    sa.Column("route_bank", sa.Text),
    sa.Column("route_version", sa.BigInteger),
    sa.Column("route_anchors", sa.LargeBinary),
    sa.Column("route_weights", sa.LargeBinary),
    sa.Column("created_at_s", sa.Double, nullable=False),
    sa.Column("updated_at_s", sa.Double, nullable=False),
)
"""`valid_from`: the version since which items were only added.

`item_sum` is little-endian float32, `route_anchors` int32 anchor keys, `route_weights` float32.
"""

histories = sa.Table(
    "histories",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("lines", sa.LargeBinary, nullable=False),
)
"""JSON Lines, one item a line: appending reads no item. Apart from `users`, whose rows are read on every request."""

stacks = sa.Table(
    "stacks",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("scale", sa.Double, nullable=False),
    sa.Column("base_fingerprint", sa.Text, nullable=False),
    sa.Column("bank_version", sa.Text, nullable=False),
    sa.Column("history_version", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at_s", sa.Double, nullable=False),
    sa.Column("tensors", sa.LargeBinary, nullable=False),
)

citations = sa.Table(
    "citations",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("anchor_key", sa.Integer, primary_key=True),
)
"""Who cites an anchor: the routes of `users`, turned round, and indexed by anchor."""

stack_jobs = sa.Table(
    "stack_jobs",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("history_version", sa.BigInteger, nullable=False),
    sa.Column("asked_at_s", sa.Double, nullable=False),
    sa.Column("ready_at_s", sa.Double),
    sa.Column("lease", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failure", sa.Text),
)
"""`ready_at_s`: from when on a worker may take the job. A lease puts it into the future; none: it failed for good."""

banks = sa.Table(
    "banks",
    metadata,
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("base_fingerprint", sa.Text, nullable=False),
    sa.Column("encoder", sa.Text, nullable=False),
    sa.Column("needs_rebuild", sa.Boolean, nullable=False),
    sa.Column("published_at_s", sa.Double, nullable=False),
)

anchors = sa.Table(
    "anchors",
    metadata,
    sa.Column("anchor_key", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("is_retired", sa.Boolean, nullable=False),
)
"""One row a person, whatever the number of banks; a key is never used twice."""

bank_anchors = sa.Table(
    "bank_anchors",
    metadata,
    sa.Column("bank_version", sa.Text, primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True),
    sa.Column("anchor_key", sa.Integer, nullable=False),
)

bank_state = sa.Table(
    "bank_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("active_version", sa.Text),
    sa.Column("generation", sa.BigInteger, nullable=False),
)
"""One row. `generation` grows with everything that happens to a bank or an anchor."""

retired_anchors = sa.Table(
    "retired_anchors",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("retired_at_s", sa.Double, nullable=False),
)
"""Who must not be an anchor again: users who were deleted and anchors that were retired, as hashes of their names."""

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("secret_digest", sa.LargeBinary, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("requests_per_minute", sa.Integer, nullable=False),
    sa.Column("created_at_s", sa.Double, nullable=False),
    sa.Column("revoked_at_s", sa.Double),
)
