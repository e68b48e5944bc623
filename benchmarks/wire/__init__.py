"""The KV transfer over loopback, without a server."""
