"""Page specifications, layouts, rotation and the Gluon dialect, shared by GPU kernels."""
