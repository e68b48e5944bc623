"""PD transfer: closed pages travel as the bytes they are, from prefill to decode, over ZMQ."""
