"""What both sides share: event loop, request state, worker pool, CURVE, metrics."""
