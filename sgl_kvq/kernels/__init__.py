"""Operations on pages: one folder an op, `reference.py` in plain torch is the specification."""
