"""The router's policy in a simulated fleet, beside its peers' policies and beside oracles."""
