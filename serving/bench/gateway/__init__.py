"""What a request costs between its client and its replica, on a real cluster with mock engines."""
