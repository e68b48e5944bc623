"""What the bytes of a closed page mean: one file a scheme, `page_layout` for where they lie."""
