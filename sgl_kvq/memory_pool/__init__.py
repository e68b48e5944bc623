"""The KV pool: capacity arithmetic, who owns open-page and sink slots, and the host's interface."""
