"""How the ingress finds a replica: in Ray Serve's own way, and nothing stays behind of a call that has found one."""

from __future__ import annotations

from typing import no_type_check

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest

from mta_ray.serving.identity import UserId

HOMES = 2**12
"""What is counted and kept for each id that Ray Serve routes by, it keeps for good, so there are no more ids."""


def home_of(user: UserId) -> str:
    """The id that Ray Serve routes a user's calls by; a few users share it, and no name shows in it."""
    return str(int.from_bytes(user.digest[:8]) % HOMES)


@no_type_check  # Ray Serve sends the class itself to where it is used, and what checks types at run time cannot be sent
class ForgetfulRouter(PowerOfTwoChoicesRequestRouter):
    """Ray Serve's, which of 2.60 lets go of a call only at the next one of its id: the last history, question or stack
    of every user who ever sent one would stay in the ingress.
    """

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        super()._remove_pending_request_from_indices(pending_request)
        self._get_pending_request_matching_multiplexed_model_id(pending_request.metadata)  # drops those that are done
