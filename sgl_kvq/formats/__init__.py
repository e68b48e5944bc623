"""What the bytes of a closed page mean; `families` holds the formats, `registry` finds them."""
