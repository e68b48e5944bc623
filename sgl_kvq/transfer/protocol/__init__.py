"""The wire format: block headers, control messages, handshake."""
