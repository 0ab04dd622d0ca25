"""Golden environments: one fabric, one set of variables, and no other fabric's variables in it."""

import pytest
from pydantic import ValidationError

from cluster.nccl import nccl_environment
from cluster.regions import Efa, Ethernet, InfiniBand, Loopback, Tcpxo


def test_infiniband_names_its_adapters_exactly() -> None:
    """Without the "=", mlx5_1 would also take mlx5_10 to mlx5_19; CROSS_NIC 0 keeps rings on their rail."""
    fabric = InfiniBand(adapters=("mlx5_0:1", "mlx5_1:1"), socket_interface="eth0")
    assert nccl_environment(fabric) == {
        "NCCL_NET": "IB",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NCCL_CROSS_NIC": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def test_infiniband_without_rails_leaves_crossing_to_nccl() -> None:
    """On one switch NCCL's own default is right; service level and topology are passed on."""
    fabric = InfiniBand(
        adapters=("mlx5_ib0",),
        socket_interface="eth0",
        rail_optimised=False,
        service_level=1,
        topology_file="/opt/microsoft/ndv5-topo.xml",
        environment={"NCCL_IB_TIMEOUT": "20"},
    )
    assert nccl_environment(fabric) == {
        "NCCL_NET": "IB",
        "NCCL_IB_HCA": "=mlx5_ib0",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NCCL_IB_SL": "1",
        "NCCL_TOPO_FILE": "/opt/microsoft/ndv5-topo.xml",
        "NCCL_IB_TIMEOUT": "20",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def test_efa_goes_through_libfabric() -> None:
    """The plugin needs to be told its provider; EFA's own devices never appear as IP interfaces."""
    assert nccl_environment(Efa(socket_interface="ens32")) == {
        "FI_PROVIDER": "efa",
        "NCCL_SOCKET_IFNAME": "=ens32",
        "GLOO_SOCKET_IFNAME": "ens32",
    }


def test_tcpxo_names_control_and_data_interfaces_plainly() -> None:
    """Google's plugin compares the names as they are written, so there is no "=" in them."""
    fabric = Tcpxo(data_interfaces=("eth1", "eth2"))
    assert nccl_environment(fabric) == {
        "NCCL_FASTRAK_CTRL_DEV": "eth0",
        "NCCL_FASTRAK_IFNAME": "eth1,eth2",
        "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": "/dev/aperture_devices",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


@pytest.mark.parametrize(
    ("fabric", "interface"), [(Ethernet(socket_interface="bond0"), "bond0"), (Loopback(), "lo")]
)
def test_sockets_turn_verbs_off(fabric: Ethernet | Loopback, interface: str) -> None:
    """A stray RDMA device must not be tried, and fail, first."""
    assert nccl_environment(fabric) == {
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": f"={interface}",
        "GLOO_SOCKET_IFNAME": interface,
    }


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Efa, {"socket_interface": "ens32"}),
        (Tcpxo, {"data_interfaces": ("eth1",)}),
        (Ethernet, {"socket_interface": "eth0"}),
        (Loopback, {}),
    ],
)
def test_verbs_settings_are_refused_where_there_are_no_verbs(kind: type, fields: dict) -> None:
    """NCCL_IB_* copied from an InfiniBand cluster is an error with a fix, and other variables pass."""
    with pytest.raises(ValidationError, match="NCCL_IB_HCA has no meaning here: remove it"):
        kind(**fields, environment={"NCCL_IB_HCA": "mlx5_0"})
    tuned = kind(**fields, environment={"NCCL_DEBUG": "WARN"})
    assert nccl_environment(tuned)["NCCL_DEBUG"] == "WARN"


def test_an_interface_is_one_name() -> None:
    """Lists and NCCL's own operators are refused, since "=" is put before the name."""
    for written in ("=eth0", "eth0,eth1", "^docker0", ""):
        with pytest.raises(ValidationError):
            Ethernet(socket_interface=written)
