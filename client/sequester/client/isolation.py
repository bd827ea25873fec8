"""Whether a process can reach a network, seen from outside; and how a process gives its network up.

`leave_network` is called by compute before it imports a reader; `probe` by the gate, which does not take compute's word
for it. Linux: a network namespace of its own in a user namespace of its own, for root as for any other account.
"""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class Verdict:
    """`sentence` says what was found, for the log, the approval and the receipt."""

    isolated: bool
    sentence: str


def leave_network() -> bool:
    """Move this process into a network namespace without a usable interface; False where the host does not allow it.

    Into a user namespace too: root that stayed in the host's would go back to the host's network by one call. Where a host
    lets root have no user namespace, it has the other one, and `probe` says what that is worth.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends; ends at once if it already has."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def no_core_dumps() -> None:
    """A crash of this process, or of one it starts, leaves no copy of its memory on a disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def probe(pid: int, proc: Path = Path("/proc")) -> Verdict:
    """What the kernel says of the process: its namespace, its interfaces, its routes, its power to leave them."""
    try:
        own = (proc / "self/ns/net").readlink()
        theirs = (proc / str(pid) / "ns/net").readlink()
        interfaces = [line.split(":")[0].strip() for line in (proc / f"{pid}/net/dev").read_text().splitlines()[2:]]
        routes = (proc / f"{pid}/net/route").read_text().splitlines()[1:]
        same_users = (proc / "self/ns/user").readlink() == (proc / str(pid) / "ns/user").readlink()
        permitted = next(
            int(line.split()[1], 16)
            for line in (proc / f"{pid}/status").read_text().splitlines()
            if line.startswith("CapPrm:")
        )
        routes6 = [line for line in _lines(proc / f"{pid}/net/ipv6_route") if not line.endswith("lo")]
    except (OSError, StopIteration) as error:
        why = getattr(error, "strerror", None) or "nothing of its capabilities"
        return Verdict(False, f"the kernel does not say what network compute has ({why})")
    if own == theirs:
        return Verdict(False, "compute shares this host's network")
    if same_users and permitted >> _CAP_SYS_ADMIN & 1:
        return Verdict(False, "compute could take this host's network back: it is root in this host's user namespace")
    usable = [name for name in interfaces if name != "lo"]
    if usable or routes or routes6:
        return Verdict(False, f"compute's namespace has interfaces {usable} and {len(routes) + len(routes6)} routes")
    return Verdict(True, f"compute has a network namespace of its own ({theirs}) with no usable interface")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
