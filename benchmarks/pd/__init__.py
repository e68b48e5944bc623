"""Prefill and decode instances with a link between them."""
