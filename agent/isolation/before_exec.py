"""What a job gives up between the start of its process and the start of its program.

The fork server loads this module ahead, so that no Python has to be started for it; the
supervisor knows nothing of it but a function that takes one argument. It is called in a thread
of its own: what a thread has given up, its children never had, and the supervisor keeps what
it needs to end them.

An exception means that the job must not be started.
"""

from __future__ import annotations

from typing import Any

from agent.isolation import ruleset, seccomp
from agent.isolation.system_calls import forbid_new_privileges, give_up_root


def lasting_steps(network: bool) -> dict[str, object]:
    """Return the steps that a supervisor takes for good, for all jobs of this kind alike."""
    return {"new_privileges": False, "filter": seccomp.is_supported(), "network": network}


def prepare(steps: dict[str, Any]) -> None:
    """Take the steps that are named, in the order in which they must come.

    ``user``: ``[uid, gid, [groups]]`` to become. ``new_privileges``: False forbids them.
    ``landlock``: the policy of :func:`ruleset.restrict`, or None for its scopes alone.
    ``filter``: whether the filter of :mod:`seccomp` is installed. ``network``: False takes it
    away, as far as Landlock and the filter do.
    """
    if user := steps.get("user"):
        uid, gid, groups = user
        give_up_root(uid, gid, groups)
    if not steps.get("new_privileges", True):
        forbid_new_privileges()
    if "landlock" in steps:
        policy = steps["landlock"]
        if policy is None:
            ruleset.restrict_scope()
        else:
            ruleset.restrict(policy, without_network=not steps["network"])
    if steps.get("filter"):
        seccomp.restrict(without_network=not steps["network"])
