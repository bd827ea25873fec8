"""What the exchange tells Flower and asks it: nodes, runs, stop, over the Control API on loopback.

Flower's status says whether the dispatcher lives, no more: studies, rounds and outcomes are the exchange's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

from sequester.protocols.errors import SequesterError, StudyError
from sequester.server.flower.bundle import bundle_sha256

TIMEOUT_S = 5.0
_KEY_IN_USE, _ALREADY_FINISHED, _NO_SUCH_RUN = 23, 18, 16
_GONE = "unregistered"


class SuperLinkError(SequesterError):
    """The SuperLink does not answer, or answers with an error nobody expects."""

    exit_status = 50


def same_key(openssh: bytes, pem: bytes) -> bool:
    """Whether an OpenSSH public key and a PEM public key, as Flower keeps them, are the same NIST curve's point."""
    try:
        return _point(load_ssh_public_key(openssh)) == _point(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm):
        return False


def _point(key: object) -> ec.EllipticCurvePublicNumbers:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not a key on a NIST curve")
    return key.public_numbers()


class Control:
    """The Control API of the SuperLink whose private listener is on this port. Calls block, at most seconds each."""

    def __init__(self, private_port: int) -> None:
        import httpx
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient(
            f"http://127.0.0.1:{private_port}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            verify=False,
        )
        self._client._client.close()
        # Not through the proxy that the environment may name, and not for 30 s.
        self._client._client = httpx.Client(verify=False, timeout=TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, supernode_key: bytes, site: str) -> None:
        """Let in the SuperNode of a site by its OpenSSH public key; older keys under its name go. Repeating is fine."""
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        try:
            key = load_ssh_public_key(supernode_key)
            _point(key)
        except (ValueError, UnsupportedAlgorithm):
            raise StudyError(
                f"the SuperNode key of `{site}` is not an OpenSSH key on a NIST curve", hint="let the site enrol again"
            ) from None
        pem = public_key_to_bytes(key)
        self._call(
            lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=site)), allowed=_KEY_IN_USE
        )
        nodes = self._nodes()
        if not any(node.name == site and same_key(supernode_key, node.public_key) for node in nodes):
            # Flower never forgets a key: one that was struck off, or is another site's, stays "in use".
            raise StudyError(
                f"the SuperNode key of `{site}` was struck off before or belongs to another site",
                hint="strike the site off and let it enrol again, with new keys",
            )
        for node in nodes:
            if node.name == site and not same_key(supernode_key, node.public_key):
                self._unregister(node.node_id)

    def unregister(self, site: str) -> None:
        """Withdraw a site: its SuperNode ends within seconds. Nothing happens where none is registered."""
        for node in self._nodes():
            if node.name == site:
                self._unregister(node.node_id)

    def nodes(self) -> dict[str, str]:
        """Each registered site's status: registered (never seen), online or offline."""
        return {str(node.name): str(node.status) for node in self._nodes()}

    def start(self, bundle: bytes, study_digest: str) -> str:
        """The id of a new run that dispatches the study."""
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        request = StartRunRequest(
            fab=Fab(hash_str=bundle_sha256(bundle), content=bundle),
            override_config=user_config_to_proto({"study": study_digest}),
        )
        answer = self._call(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise SuperLinkError("the SuperLink did not start a run", hint="see its log")
        return str(answer.run_id)

    def status(self, run_id: str) -> str:
        """pending, starting, running, or finished:completed, finished:failed, finished:stopped; "" for an unknown run."""
        from flwr.proto.control_pb2 import ListRunsRequest

        if not run_id.isdecimal():
            return ""
        answer = self._call(lambda: self._client.ListRuns(ListRunsRequest(run_id=int(run_id))), allowed=_NO_SUCH_RUN)
        run = None if answer is None else answer.run_dict.get(int(run_id))
        if run is None:
            return ""
        return ":".join(part for part in (run.status.status, run.status.sub_status) if part)

    def stop(self, run_id: str) -> None:
        """Stop a run; one that has finished or is unknown stays as it is."""
        from flwr.proto.control_pb2 import StopRunRequest

        if self.status(run_id).startswith(("pending", "starting", "running")):
            self._call(lambda: self._client.StopRun(StopRunRequest(run_id=int(run_id))), allowed=_ALREADY_FINISHED)

    def _nodes(self) -> list[Any]:
        from flwr.proto.control_pb2 import ListNodesRequest

        answer = self._call(lambda: self._client.ListNodes(ListNodesRequest()))
        return [node for node in answer.nodes_info if node.status != _GONE]

    def _unregister(self, node_id: int) -> None:
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def _call(self, call: Callable[[], Any], allowed: int = 0) -> Any:
        """The answer; None where Flower answers with the error code that is as good as success."""
        import httpx

        try:
            return call()
        except httpx.HTTPStatusError as error:
            code = _code(error.response.text)
            if code and code == allowed:
                return None
            raise SuperLinkError(
                f"the SuperLink answered {error.response.status_code}, error {code}", hint="see its log"
            ) from None
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise SuperLinkError(
                f"the SuperLink does not answer on 127.0.0.1 ({type(error).__name__})",
                hint="`sequester-server run` starts it; running studies go on without it",
            ) from None


def _code(text: str) -> int:
    try:
        return int(json.loads(text)["code"])
    except (ValueError, KeyError, TypeError):
        return 0
