"""A region's fabric as the environment its ranks start with. Pure.

Sources: NVIDIA's NCCL user guide, "Environment Variables" (docs.nvidia.com/deeplearning/nccl/
user-guide/docs/env.html) for NCCL_*; Google's "Maximize GPU network bandwidth in Standard mode
clusters" (cloud.google.com/kubernetes-engine/docs/how-to/gpu-bandwidth-gpudirect-tcpx) for
NCCL_FASTRAK_*; the libfabric manual's fi_efa(7) for FI_*; PyTorch's "torch.distributed", section
"Common environment variables", for GLOO_SOCKET_IFNAME.

NCCL matches names by prefix unless the list begins with "=": `mlx5_1` would also be `mlx5_10`.
Where the network can be named (NCCL_NET) it is: NCCL then stops when it cannot use it, and does
not carry on over TCP at a hundredth of the speed.
"""

from __future__ import annotations

from cluster.regions import Efa, Ethernet, InfiniBand, Loopback, Tcpxo


def nccl_environment(fabric: InfiniBand | Efa | Tcpxo | Ethernet | Loopback) -> dict[str, str]:
    """Variables for every rank in a region with this fabric; the fabric's own `environment` last."""
    match fabric:
        case InfiniBand():
            derived = _infiniband(fabric)
        case Efa():
            derived = {"FI_PROVIDER": "efa", "NCCL_SOCKET_IFNAME": _exactly(fabric.socket_interface)}
        case Tcpxo():
            derived = _tcpxo(fabric)
        case Ethernet() | Loopback():
            derived = {
                "NCCL_NET": "Socket",
                "NCCL_IB_DISABLE": "1",
                "NCCL_SOCKET_IFNAME": _exactly(fabric.socket_interface),
            }
    return derived | {"GLOO_SOCKET_IFNAME": fabric.socket_interface} | fabric.environment


def _infiniband(fabric: InfiniBand) -> dict[str, str]:
    derived = {
        "NCCL_NET": "IB",
        "NCCL_IB_HCA": _exactly(*fabric.adapters),
        "NCCL_SOCKET_IFNAME": _exactly(fabric.socket_interface),
    }
    if fabric.rail_optimised:
        derived["NCCL_CROSS_NIC"] = "0"  # a ring stays on its rail; crossing goes over the spine
    if fabric.service_level is not None:
        derived["NCCL_IB_SL"] = str(fabric.service_level)
    if fabric.topology_file is not None:
        derived["NCCL_TOPO_FILE"] = fabric.topology_file
    return derived


def _tcpxo(fabric: Tcpxo) -> dict[str, str]:
    """Only what depends on the node: the plugin's own `nccl-env-profile.sh` sets, and checks, the rest.

    Plain interface names, as Google gives them: that check knows no "=".
    """
    return {
        "NCCL_FASTRAK_CTRL_DEV": fabric.socket_interface,
        "NCCL_FASTRAK_IFNAME": ",".join(fabric.data_interfaces),
        "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": fabric.aperture_devices,
        "NCCL_SOCKET_IFNAME": fabric.socket_interface,
    }


def _exactly(*names: str) -> str:
    return "=" + ",".join(names)
