"""The request's way: ingress, router, model replicas, and the engine behind them."""
