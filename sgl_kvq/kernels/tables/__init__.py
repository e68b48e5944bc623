"""Page tables of a decode step."""
