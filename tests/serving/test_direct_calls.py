"""Calls past Serve's handles: who may, what comes back, and what a death, a restart or a stranger does."""

import asyncio
import ssl
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serving import direct_calls
from serving.direct_calls import SECRET_BYTES, Address, DirectReplicas, DirectService, Door, ray_tls
from serving.errors import ReplicaGone
from serving.messages import decode
from tests.serving.fleet_fakes import eventually

HOST = "127.0.0.1"
CLIENT: ContextVar[str] = ContextVar("CLIENT", default="nobody")


class Deployment:
    """What Serve would hold: it has methods, a door, and a handle that says where the door is."""

    def __init__(self) -> None:
        self.door: Door | None = None
        self.num_asked = 0
        self.num_hanging = 0
        self.cancelled = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self, tls=None) -> "Deployment":
        self.door = await Door.open(self, ("double", "hang", "fail", "leave", "whose"), HOST, tls)
        return self

    async def double(self, payload: bytes, times: list[int]) -> bytes:
        return payload * times[0]

    async def hang(self) -> None:
        self.num_hanging += 1
        try:
            await asyncio.sleep(60)
        finally:
            self.cancelled.set()

    async def fail(self) -> None:
        raise ValueError("a secret prompt")

    async def leave(self) -> None:
        raise ReplicaGone("this one")

    async def whose(self) -> str:
        return CLIENT.get()

    async def not_named(self) -> None:
        """Behind no door."""

    # Serve's handle
    async def call(self, method: str, *args: object) -> bytes:
        assert method == "door" and not args
        self.num_asked += 1
        await self.gate.wait()
        if self.door is None:
            raise ReplicaGone("gone")
        return self.door.address

    def stream(self, method: str, *args: object):
        raise AssertionError("streams are Serve's")


@asynccontextmanager
async def serving(tls=None):
    deployment = await Deployment().open(tls)
    yield deployment, DirectService(deployment, "it", tls)
    deployment.door.close()


async def test_many_calls_at_once_get_each_its_own_answer():
    """Large and small, over one connection that was asked for once."""
    async with serving() as (deployment, service):
        calls = [service.call("double", bytes([n]), [n * n * 40]) for n in range(100)]
        assert await asyncio.gather(*calls) == [bytes([n]) * (n * n * 40) for n in range(100)]
        assert deployment.num_asked == 1


async def test_a_slow_call_holds_up_no_other():
    """Answers come in any order."""
    async with serving() as (_, service):
        slow = asyncio.create_task(service.call("hang"))
        assert await asyncio.wait_for(service.call("double", b"a", [2]), 5) == b"aa"
        assert not slow.done()
        slow.cancel()


async def test_errors_are_the_callers_to_see_and_their_words_are_not():
    """ReplicaGone stays what it is; anything else is the callee's fault, and its message stays there."""
    async with serving() as (_, service):
        with pytest.raises(ReplicaGone):
            await service.call("leave")
        with pytest.raises(RuntimeError, match="ValueError") as failed:
            await service.call("fail")
        assert "prompt" not in str(failed.value)
        assert await service.call("double", b"a", [1]) == b"a"


async def test_a_callee_that_ends_ends_the_calls_and_its_successor_is_found():
    """What was under way raises ReplicaGone at once; the next call asks anew where the door is."""
    async with serving() as (deployment, service):
        hanging = asyncio.create_task(service.call("hang"))
        await eventually(lambda: deployment.num_asked == 1)
        await service.call("double", b"a", [1])
        first = decode(deployment.door.address, Address)
        for transport in connections():
            transport.abort()
        deployment.door.close()
        with pytest.raises(ReplicaGone):
            await asyncio.wait_for(hanging, 5)
        await deployment.open()
        assert await service.call("double", b"a", [3]) == b"aaa"
        assert deployment.num_asked == 2 and decode(deployment.door.address, Address) != first


async def test_a_caller_that_leaves_cancels_what_it_asked():
    """As Serve does: nobody is left to hear the answer."""
    async with serving() as (deployment, service):
        calling = asyncio.create_task(service.call("hang"))
        await service.call("double", b"a", [1])
        for transport in connections():
            transport.abort()
        await asyncio.wait_for(deployment.cancelled.wait(), 5)
        with pytest.raises(ReplicaGone):
            await calling


async def test_a_door_that_does_not_open_is_a_callee_that_is_gone():
    """Nobody listens there, or Serve knows none: ReplicaGone, and the next call tries again."""
    async with serving() as (deployment, service):
        deployment.door.close()
        with pytest.raises(ReplicaGone):
            await service.call("double", b"a", [1])
        deployment.door = None
        with pytest.raises(ReplicaGone):
            await service.call("double", b"a", [1])
        await deployment.open()
        assert await service.call("double", b"a", [1]) == b"a"


async def test_the_connection_belongs_to_no_request():
    """The first caller is cancelled while it is made: the others' calls go through, in no one's context."""
    async with serving() as (deployment, service):
        deployment.gate.clear()
        CLIENT.set("somebody")
        first = asyncio.create_task(service.call("whose"))
        await eventually(lambda: deployment.num_asked == 1)
        second = asyncio.create_task(service.call("whose"))
        await asyncio.sleep(0)
        first.cancel()
        deployment.gate.set()
        assert await second == "nobody" and deployment.num_asked == 1


@pytest.mark.parametrize("said", [b"x" * SECRET_BYTES, b"", b"x" * 100, b"x" * (SECRET_BYTES - 1)])
async def test_a_stranger_is_turned_away(said):
    """Without the secret the connection ends, and no method runs."""
    async with serving() as (deployment, _):
        address = decode(deployment.door.address, Address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        call = b"\x93\x01\xa4hang\x90"
        for message in (said, call):
            writer.write(len(message).to_bytes(4, "little") + message)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
        assert deployment.num_hanging == 0


async def test_who_says_nothing_is_turned_away(monkeypatch):
    """A connection without the secret does not stay, though it sends nothing wrong."""
    monkeypatch.setattr(direct_calls, "CONNECT_TIMEOUT_S", 0.05)
    async with serving() as (deployment, service):
        address = decode(deployment.door.address, Address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()
        assert await service.call("double", b"a", [2]) == b"aa"
        await asyncio.sleep(0.1)
        assert await service.call("double", b"a", [3]) == b"aaa"  # the known one stays


async def test_what_is_not_named_cannot_be_called():
    """A method of the deployment that is behind no door ends the connection."""
    async with serving() as (_, service):
        with pytest.raises(ReplicaGone):
            await asyncio.wait_for(service.call("not_named"), 5)


async def test_replicas_are_called_by_name():
    """Each on a connection of its own; one that is gone is forgotten, and not confused with another."""

    class Handle:
        def __init__(self, **deployments: Deployment) -> None:
            self.all = deployments

        def running(self):
            return frozenset(self.all)

        async def call(self, replica_id: str, method: str, *args: object) -> bytes:
            if replica_id not in self.all:
                raise ReplicaGone(replica_id)
            return await self.all[replica_id].call(method, *args)

        def stream(self, replica_id: str, method: str, *args: object):
            raise AssertionError("streams are Serve's")

    async with serving() as (a, _), serving() as (b, _):
        replicas = DirectReplicas(Handle(a=a, b=b), None)
        assert replicas.running() == {"a", "b"}
        await asyncio.gather(*(replicas.call(name, "double", b"", [1]) for name in ("a", "b", "a", "b")))
        assert a.num_asked == b.num_asked == 1
        with pytest.raises(ReplicaGone):
            await replicas.call("c", "double", b"", [1])


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """The file of one that is its own authority, named in Ray's environment."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "it")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for variable, content in (
        ("RAY_TLS_SERVER_CERT", made.public_bytes(pem)),
        ("RAY_TLS_CA_CERT", made.public_bytes(pem)),
        ("RAY_TLS_SERVER_KEY", secret),
    ):
        (tmp_path / variable).write_bytes(content)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "RAY_TLS_CA_CERT"


async def test_with_rays_certificates_everything_is_encrypted(certificate, monkeypatch):
    """Both sides show one; who shows none is not heard. Without RAY_USE_TLS there is no TLS."""
    assert ray_tls() is None
    monkeypatch.setenv("RAY_USE_TLS", "1")
    tls = ray_tls()
    async with serving(tls) as (deployment, service):
        assert await service.call("double", b"a", [100_000]) == b"a" * 100_000
        with pytest.raises(ReplicaGone):
            await DirectService(deployment, "in the clear", None).call("double", b"a", [1])
        bare = ssl.create_default_context(cafile=certificate)
        address = decode(deployment.door.address, Address)
        reader, writer = await asyncio.open_connection(HOST, address.port, ssl=bare)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            writer.write(SECRET_BYTES.to_bytes(4, "little") + address.secret)
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()


def connections() -> list[asyncio.Transport]:
    """Every connection of this loop, both ends of each."""
    loop = asyncio.get_running_loop()
    return list(loop._transports.values())  # type: ignore[attr-defined]
