"""Discrete-event simulation of a whole cluster, with the production policy, scheduler and block pool."""

from serving.simulator.contract import (
    DONE,
    LATE,
    LOST,
    MODEL,
    REFUSED,
    MakePolicy,
    Policy,
    SimReplica,
    SimRequest,
    SimResult,
    SimSetup,
)
from serving.simulator.run import simulate

__all__ = [
    "DONE",
    "LATE",
    "LOST",
    "MODEL",
    "REFUSED",
    "MakePolicy",
    "Policy",
    "SimReplica",
    "SimRequest",
    "SimResult",
    "SimSetup",
    "simulate",
]
